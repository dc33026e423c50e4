"""Classification of the nodes of a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from atoll.core.errors import DataError
from atoll.data.dataset import Dataset, Info
from atoll.data.graph import edges_between
from atoll.models.mlp import MLP
from atoll.models.model import ModelBuilder, build_model
from atoll.models.on_graph import reads_edges
from atoll.tasks.task import Batch, Task, evaluating, network_at, outputs_of


@dataclass(frozen=True)
class NodeClassification(Task):
    """Cross-entropy over the classes of the nodes that have a label; the others are there for their neighbours.

    A module whose ``forward`` takes ``(x, edges)``, or ``(x, edge_index)`` as in PyTorch Geometric, sees the graph;
    any other one sees each node alone.

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
        if self.info.kind != "graph" or not self.info.num_classes:
            raise DataError(
                f"`{self.info.name}` is not a graph of nodes with classes. Use data such as `stochastic_blocks` or "
                "`graph_files`, or another task."
            )
        return self.info.num_classes

    def model(self, seed: int, site: int | None = None) -> nn.Module:
        return build_model(self.model_key(site), self.info, self.outputs, seed)

    def model_key(self, site: int | None = None) -> ModelBuilder:
        return network_at(site, self.network, self.site_networks)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits ``[B, classes]``; the graph is that of the rows of the batch."""
        if not reads_edges(model):
            return outputs_of(model, batch["x"])
        return outputs_of(model, batch["x"], edges_between(batch["node"], batch["neighbours"]))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """0 for a node without label; the others are scaled so that the mean over all is the mean over labelled
        ones."""
        losses = F.cross_entropy(self.predict(model, batch), batch["y"], reduction="none", ignore_index=-1)
        return losses * (len(losses) / (batch["y"] >= 0).sum().clamp(min=1))

    def evaluate(self, model: nn.Module, data: Dataset) -> dict[str, float]:
        """``accuracy`` (share of the labelled nodes, 0 to 1) and ``loss`` (nats per labelled node)."""
        with evaluating(model) as device:
            batch = data.ready(device=device)
            y, labelled = batch["y"], int((batch["y"] >= 0).sum())
            if not labelled:
                return {}
            logits = self.predict(model, batch)
            loss = float(F.cross_entropy(logits, y, reduction="sum", ignore_index=-1))
            return {"accuracy": int((logits.argmax(1) == y).sum()) / labelled, "loss": loss / labelled}
