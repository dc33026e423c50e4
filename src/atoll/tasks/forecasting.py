"""The next values of a series from a window of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from atoll.core.errors import DataError
from atoll.data.dataset import Dataset
from atoll.models.model import ModelBuilder
from atoll.models.series_transformer import SeriesTransformer
from atoll.tasks.regression import Regression
from atoll.tasks.task import Batch, rows_at_once


@dataclass(frozen=True)
class Forecasting(Regression):
    """Regression of the next ``info.targets`` values of channel 0 on windows ``x`` ``[B, C, T]``.

    Args:
        info: of the data, of kind ``series``.
        network: the model of every site (and the server).
        site_networks: where sites have different hardware: site i gets ``site_networks[i % len]``.
        targets: values to predict; None: as many as the data has.
        error: ``"squared"`` or ``"huber"``, as in regression.
        delta: where Huber's error turns linear, in units of the loss.
        standardise: the model predicts in units of the target's deviation.
        base: what a model's output is added to: ``"mean"``, that of the target in the training rows, or ``"last"``, the
            last value of the window, so that a level which wanders or differs between sites is no error
            (NLinear, Zeng et al., 2022, arXiv 2205.13504).
    """

    network: ModelBuilder = SeriesTransformer()
    base: Literal["mean", "last"] = "mean"

    def model(self, seed: int, site: int | None = None) -> nn.Module:
        if self.info.kind != "series":
            raise DataError(f"forecasting needs windows of series, and `{self.info.name}` is none; use `data: series`.")
        return super().model(seed, site)

    def _output(self, model: nn.Module, batch: Batch) -> Tensor:
        out = super()._output(model, batch)
        if self.base == "mean":
            return out
        center, scale = self._units()
        return out + (self.last(batch) - center)[:, None] / scale

    def last(self, batch: Batch) -> Tensor:
        """The last value of the target in each window, in its own unit ``[B]``."""
        mean, scale = (torch.as_tensor(v).flatten()[0].item() for v in (self.info.mean, self.info.scale))
        return batch["x"][:, 0, -1] * scale + mean

    def evaluate(self, model: nn.Module, data: Dataset) -> dict[str, float]:
        """``mae``, ``rmse`` and ``r2`` as in regression, and ``skill``: 1 - mae over that of a forecast that repeats
        the last value; 0 is no better, 1 is perfect."""
        found, error, count = super().evaluate(model, data), 0.0, 0
        for batch in data.batches(rows_at_once(*data.info.shape)):
            y = batch["y"].reshape(len(batch["x"]), -1)
            error, count = error + float((y - self.last(batch)[:, None]).abs().double().sum()), count + y.numel()
        naive = error / count
        return {**found, "skill": 1 - found["mae"] / naive if naive else float(found["mae"] == 0)}
