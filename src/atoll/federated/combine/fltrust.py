"""FLTrust: trust what points the way of the server's own update (Cao et al., 2021, arXiv 2012.13995).

Assumes  the server's public data is clean and like the sites' data; any number of sites may be hostile.
Sees     every single update, so it cannot run above secure summation.
Departs  the model's buffers (e.g. running statistics) are part of an update like its parameters.
Shapes   N updates, D numbers each; g_0 is the server's own update.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atoll.core.card import Card, Cite
from atoll.core.errors import AtollError
from atoll.core.message import Message
from atoll.core.tree import Tree, clone, copy_, named_tensors, pick, sub
from atoll.federated.combine._rows import CHUNK, Rows, rows_of, vector_of
from atoll.federated.local.training import Training
from atoll.federated.method import Combine, MergeContext, Reply
from atoll.federated.public import train_on_public

CARD = Card(
    name="fltrust",
    area="combiner",
    summary="updates weighted by their cosine with the server's own update, and scaled to its length",
    cites=(
        Cite(
            authors="Xiaoyu Cao, Minghong Fang, Jia Liu, Neil Zhenqiang Gong",
            year=2021,
            title="FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping",
            arxiv="2012.13995",
            venue="NDSS",
        ),
    ),
    server_sees="each site's update",
    additive=False,
    needs_public_data=True,
    threat_model="any number of sites is hostile and sends anything; the server's data is clean",
    suits=("hostile sites",),
)


def trust(rows: Rows, root_D: Tensor) -> tuple[Tensor, Tensor]:
    """max(0, cos(g_i, g_0)) and |g_0| / |g_i|: float64 ``[N]`` each, 0 where there is no direction."""
    norms, length = rows.norms(), torch.linalg.vector_norm(root_D, dtype=torch.float64)
    dots = torch.zeros(len(rows), dtype=torch.float64)
    for x, g in zip(rows.chunks(torch.float64), root_D.double().split(CHUNK), strict=True):
        dots += x @ g
    moved = (norms > 0) & (length > 0)
    score = torch.where(moved, dots / (norms * length), 0.0).clamp_(min=0)
    return score, torch.where(moved, length / norms, 0.0)


@dataclass(frozen=True)
class FLTrust(Combine):
    """sum_i t_i (|g_0| / |g_i|) g_i / sum_i t_i, t_i = max(0, cos(g_i, g_0)); zero when nobody is trusted.

    What the server's data lacks (a class, a kind of site) is distrusted: look at each site's accuracy. Keeps
    all replies of a merge in memory.

    Args:
        training: how the server trains on its public data from the common weights; use the sites' own values.
    """

    training: Training = Training()
    additive: ClassVar[bool] = False
    needs_public_data: ClassVar[bool] = True

    def combine(self, replies: Iterable[Reply], context: MergeContext) -> Message:
        rows = rows_of(replies, 1, "FLTrust", "Ask more sites.")
        root = root_update(self.training, context, rows.like)
        score, ratio = trust(rows, root)
        total = float(score.sum())
        return rows.message(rows.mean((score * ratio / total).tolist() if total else [0.0] * len(rows)))


def root_update(training: Training, context: MergeContext, like: Message) -> Tensor:
    """The server's own update from the current weights, in the order of ``like``: ``[D]``."""
    if context.public is None or len(context.public) == 0:
        raise AtollError("FLTrust trains at the server and needs public data; give the data a `public` fraction.")
    model = context.task.model(context.seed)
    tensors, start = named_tensors(model), context.replica.get("weights", {})
    if set(like.parts) != {"delta"} or not set(like.parts["delta"]) <= set(tensors) & set(start):
        raise AtollError("FLTrust compares plain weight updates (one part, `delta`, of the model's own tensors).")
    copy_(tensors, start)
    before: Tree = clone(pick(tensors, like.parts["delta"]))
    train_on_public(model, training, context, "fltrust")
    return vector_of(Message("delta", {"delta": sub(pick(tensors, before), before)}), like, site=-1)
