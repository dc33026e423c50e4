"""Which rows are unlike the rows that a model was trained on?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from atoll.core.errors import DataError
from atoll.data.dataset import Dataset, Info
from atoll.models.model import ModelBuilder, build_model, refuse_tokens
from atoll.models.subspace import Subspace
from atoll.tasks.task import Batch, Task, evaluating, network_at, outputs_of, rows_at_once


@dataclass(frozen=True)
class AnomalyDetection(Task):
    """A model gives rows back, ``[B, *shape] -> [B, numbers in a row]``, and what it cannot give back is an anomaly.

    The score of a row is ``||x - model(x)||^2``, and the loss is the score over the numbers in a row. Training needs no
    label; it should see normal rows (the sources ``anomalies`` and ``series`` hold the others out). Rows of tables,
    images and windows of series alike; any network that maps a row to as many numbers: ``subspace``, or ``mlp`` with a
    narrow hidden layer, which is an autoencoder.

    Args:
        info: of the data.
        network: the model of every site (and the server).
        site_networks: where sites have different hardware: site i gets ``site_networks[i % len]``.
        normal: the class in column ``y`` that is normal; every other one is anomalous.
        quantile: of the scores of normal rows, at which the alarm is raised; 1 minus it is the share of false alarms.
    """

    info: Info
    network: ModelBuilder = Subspace()
    site_networks: tuple[ModelBuilder, ...] = ()
    normal: Annotated[int, Ge(0)] = 0
    quantile: Annotated[float, Gt(0), Lt(1)] = 0.95
    headline: ClassVar[str] = "auc"
    higher_is_better: ClassVar[bool] = True

    @property
    def outputs(self) -> int:
        return math.prod(self.info.shape)

    def model(self, seed: int, site: int | None = None) -> nn.Module:
        refuse_tokens(self.info, "anomaly_detection")
        return build_model(self.model_key(site), self.info, self.outputs, seed)

    def model_key(self, site: int | None = None) -> ModelBuilder:
        return network_at(site, self.network, self.site_networks)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scores ``[B]``."""
        x, back = batch["x"].flatten(1), outputs_of(model, batch["x"]).flatten(1)
        if back.shape != x.shape:
            raise DataError(
                f"The model returns {back.shape[1]} numbers for a row of `{self.info.name}`, which has {x.shape[1]}; "
                "anomaly_detection needs a model that gives rows back."
            )
        return (x - back).square().sum(1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.predict(model, batch) / self.outputs

    def scores(self, model: nn.Module, data: Dataset) -> Tensor:
        """Of all rows ``[N]``; higher is more anomalous."""
        with evaluating(model) as device:
            found = [self.predict(model, b).cpu() for b in data.batches(rows_at_once(*data.info.shape), device)]
        return torch.cat(found) if found else torch.empty(0)

    def threshold(self, model: nn.Module, normal: Dataset) -> float:
        """The score above which a row raises the alarm, from rows that are normal."""
        return float(torch.quantile(self.scores(model, normal).double(), self.quantile))

    def evaluate(self, model: nn.Module, data: Dataset) -> dict[str, float]:
        """``residual``, the mean score of normal rows; ``auc``, the chance that an anomalous row has a higher score
        than a normal one; and of the alarm ``f1`` and ``false_alarms``, the share of normal rows that raise it.

        The threshold comes from every second normal row, and the others are judged by it. Without a label all rows
        count as normal. Where there are no normal rows or no anomalous ones, auc is 0.5 and f1 is 0.
        """
        scores = self.scores(model, data).double()
        odd = data.column("y") != self.normal if "y" in data.columns else torch.zeros(len(scores), dtype=torch.bool)
        if odd.dim() != 1 or ("y" in data.columns and data.columns["y"].is_floating_point()):
            raise DataError(f"Column `y` of `{self.info.name}` holds no classes, so it cannot say what is anomalous.")
        normal, anomalous = scores[~odd], scores[odd]
        ours, judged = normal[::2], normal[1::2]
        limit = float(torch.quantile(ours, self.quantile)) if len(ours) else math.inf
        hits, false = int((anomalous > limit).sum()), int((judged > limit).sum())
        return {
            "residual": float(normal.mean()) if len(normal) else 0.0,
            "auc": auc(normal, anomalous),
            "f1": 2 * hits / max(1, hits + false + len(anomalous)),
            "false_alarms": false / max(1, len(judged)),
        }


def auc(normal: Tensor, anomalous: Tensor) -> float:
    """The chance that a score of ``anomalous`` is above one of ``normal``, ties counting half."""
    if not len(normal) or not len(anomalous):
        return 0.5
    ranked = normal.sort().values
    below, upto = torch.searchsorted(ranked, anomalous), torch.searchsorted(ranked, anomalous, right=True)
    return float((below + upto).double().mean()) / (2 * len(normal))
