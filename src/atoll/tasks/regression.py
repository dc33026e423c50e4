"""Prediction of one or more numbers per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor, nn

from atoll.core.errors import DataError
from atoll.data.dataset import Dataset, Info
from atoll.models.mlp import MLP
from atoll.models.model import ModelBuilder, build_model
from atoll.tasks.task import Batch, Task, evaluating, network_at, outputs_of, rows_at_once


@dataclass(frozen=True)
class Regression(Task):
    """Squared or Huber error, averaged over targets, on column ``y``: float32 ``[N]`` or ``[N, targets]``.

    Args:
        info: of the data.
        network: the model of every site (and the server).
        site_networks: where sites have different hardware: site i gets ``site_networks[i % len]``.
        targets: numbers to predict per row; None: as many as the data says.
        error: ``"squared"``: e^2; ``"huber"``: e^2 / 2 up to ``delta``, then delta (|e| - delta / 2), so that
            outliers pull with bounded force (Huber, 1964).
        delta: where Huber's error turns linear, in units of the loss.
        standardise: the model predicts (y - info.target_mean) / info.target_scale and the loss is in these
            units, so that one step size suits targets of any size. Predictions and metrics are in those of y.
    """

    info: Info
    network: ModelBuilder = MLP()
    site_networks: tuple[ModelBuilder, ...] = ()
    targets: Annotated[int, Ge(1)] | None = None
    error: Literal["squared", "huber"] = "squared"
    delta: Annotated[float, Gt(0)] = 1.0
    standardise: bool = True
    headline: ClassVar[str] = "rmse"
    higher_is_better: ClassVar[bool] = False

    @property
    def outputs(self) -> int:
        return self.targets or self.info.targets

    def model(self, seed: int, site: int | None = None) -> nn.Module:
        return build_model(self.model_key(site), self.info, self.outputs, seed)

    def model_key(self, site: int | None = None) -> ModelBuilder:
        return network_at(site, self.network, self.site_networks)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Values in the units of ``y``, ``[B, targets]``."""
        out, (center, scale) = self._output(model, batch), self._units()
        return out if (center, scale) == (0.0, 1.0) else out * scale + center

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._error(model, batch, "none").mean(1)

    def mean_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._error(model, batch, "mean")

    def _error(self, model: nn.Module, batch: Batch, reduction: str) -> Tensor:
        out, y = self._output(model, batch), _columns(batch["y"])
        if out.shape != y.shape:
            raise DataError(
                f"The model predicts {out.shape[-1]} numbers per row and `{self.info.name}` has "
                f"{y.shape[-1]} targets. Set the task's `targets` to {y.shape[-1]}."
            )
        center, scale = self._units()
        if (center, scale) != (0.0, 1.0):
            y = (y - center) / scale
        if self.error == "huber":
            return F.huber_loss(out, y, reduction=reduction, delta=self.delta)
        return F.mse_loss(out, y, reduction=reduction)

    def _output(self, model: nn.Module, batch: Batch) -> Tensor:
        """Predictions in units of the loss, ``[B, targets]``."""
        return outputs_of(model, batch["x"])

    def _units(self) -> tuple[float, float]:
        """What the model's outputs are shifted and scaled by."""
        i = self.info
        return (i.target_mean, i.target_scale or 1.0) if self.standardise else (0.0, 1.0)

    def evaluate(self, model: nn.Module, data: Dataset) -> dict[str, float]:
        """``mae`` and ``rmse`` over rows and targets, in the units of ``y``, and ``r2``, the mean over
        targets.

        r2 = 1 - sum (y - prediction)^2 / sum (y - mean y)^2. A target that does not vary counts as 1 when it
        is predicted exactly and as 0 otherwise.
        """
        y_NT = _columns(data.column("y")).double()
        absolute, squared_T, at = 0.0, torch.zeros(y_NT.shape[1], dtype=torch.float64), 0
        with evaluating(model) as device:
            for batch in data.batches(rows_at_once(*data.info.shape), device):
                prediction = self.predict(model, batch).cpu().double()
                error = prediction - y_NT[at : at + len(prediction)]
                at += len(prediction)
                absolute += float(error.abs().sum())
                squared_T += error.square().sum(0)
        spread_T = (y_NT - y_NT.mean(0)).square().sum(0)
        exact = torch.where(squared_T == 0, 1.0, 0.0).double()
        r2_T = torch.where(spread_T > 0, 1 - squared_T / spread_T, exact)
        rmse = float(squared_T.sum() / y_NT.numel()) ** 0.5
        return {"mae": absolute / y_NT.numel(), "rmse": rmse, "r2": float(r2_T.mean())}


def _columns(y: Tensor) -> Tensor:
    """Targets as ``[N, T]`` floats."""
    y = y if y.is_floating_point() else y.float()
    return y[:, None] if y.dim() == 1 else y
