"""Classification of images, table rows or text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.core.errors import DataError, RecipeError
from atoll.data.dataset import Dataset, Info
from atoll.models.mlp import MLP
from atoll.models.model import ModelBuilder, build_model
from atoll.tasks.task import Batch, Task, evaluating, network_at, outputs_of, rows_at_once


@dataclass(frozen=True)
class Classification(Task):
    """Cross-entropy over the classes of column ``y`` (int64): ``info.num_classes``, for text
    ``info.class_names``.

    Args:
        info: of the data.
        network: the model of every site (and the server).
        site_networks: where sites have different hardware: site i gets ``site_networks[i % len]``.
    """

    info: Info
    network: ModelBuilder = MLP()
    site_networks: tuple[ModelBuilder, ...] = ()
    headline: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    @property
    def outputs(self) -> int:
        return num_classes(self.info)

    def model(self, seed: int, site: int | None = None) -> nn.Module:
        return build_model(self.model_key(site), self.info, self.outputs, seed)

    def model_key(self, site: int | None = None) -> ModelBuilder:
        return network_at(site, self.network, self.site_networks)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return outputs_of(model, batch["x"])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.predict(model, batch), batch["y"], reduction="none")

    def mean_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.predict(model, batch), batch["y"])

    def evaluate(self, model: nn.Module, data: Dataset) -> dict[str, float]:
        """``accuracy`` (share of rows, 0 to 1) and ``loss`` (nats per row)."""
        hits, loss = 0, 0.0
        with evaluating(model) as device:
            for batch in data.batches(rows_at_once(*data.info.shape), device):
                logits = self.predict(model, batch)
                hits += int((logits.argmax(1) == batch["y"]).sum())
                loss += float(F.cross_entropy(logits, batch["y"], reduction="sum"))
        return {"accuracy": hits / len(data), "loss": loss / len(data)}


def num_classes(info: Info) -> int:
    """How many classes ``y`` has. (The ``num_classes`` of text is its vocabulary, so there the names
    count.)
    """
    if info.kind == "graph":
        raise DataError(f"The rows of `{info.name}` are nodes of a graph; use `task: node_classification`.")
    count = len(info.class_names) if info.kind == "text" else info.num_classes
    if not count:
        what = "class_names" if info.kind == "text" else "num_classes"
        raise DataError(f"`{info.name}` has no classes (its `{what}` is not set). Use another task for it.")
    return count


def expect_classes(rows: Dataset, classes: int, who: str) -> None:
    """Raise :class:`RecipeError` unless ``y`` holds numbers of ``classes`` classes, which ``who`` needs."""
    y = rows.columns.get("y")
    if y is None or y.dtype != torch.int64 or y.dim() != 1 or (len(y) and int(y.max()) >= classes):
        raise RecipeError([f"{who} works with {classes} classes, and `y` of `{rows.info.name}` holds none such."])
