"""A site of the federation: an ordinary ClientApp, with one of Flower's own mods."""

from __future__ import annotations

import torch
from flwr.app import Context
from flwr.clientapp.mod import arrays_size_mod
from sklearn.datasets import load_digits
from what_is_learned import INFO, METHOD, TASK

import atoll.flower
from atoll.data.dataset import Dataset, SiteData


def rows(context: Context) -> SiteData:
    """This node's digits: every n-th image. A real site would read its own files here."""
    raw = load_digits()
    mine = slice(int(context.node_config["partition-id"]), None, int(context.node_config["num-partitions"]))
    x = torch.tensor(raw.images[mine], dtype=torch.uint8)[:, None]
    data = Dataset({"x": x, "y": torch.tensor(raw.target[mine])}, INFO)
    cut = len(data) * 4 // 5
    return SiteData(data.select(range(cut)), data.select([]), data.select(range(cut, len(data))))


app = atoll.flower.client_app(TASK, METHOD, rows, mods=[arrays_size_mod])
