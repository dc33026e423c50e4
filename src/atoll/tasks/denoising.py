"""Denoising: learning to generate rows such as those of the data, class by class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from atoll.core.errors import DataError
from atoll.core.streams import stream
from atoll.data.dataset import Dataset, Info
from atoll.diffusion.as_denoiser import AsDenoiser, Kind, usual_law
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.losses import hidden, training_loss
from atoll.diffusion.schedules import add_noise
from atoll.diffusion.solvers import Sampler
from atoll.diffusion.teacher import Base, make_denoiser
from atoll.models.model import ModelBuilder, seeded
from atoll.models.unet import UNet
from atoll.tasks.task import Batch, Task, evaluating, network_at, rows_at_once


@dataclass(frozen=True)
class Denoising(Task):
    """A :class:`Denoiser` of the data's rows, told their class, or what a column ``cond`` holds, such as embeddings of
    a text. Data without classes are all of one; a row whose class nobody knows is told none.

    The loss of a row is random in noise level and noise, drawn anew at every call. Draws are made on the CPU, so that
    sites with and without a GPU see the same. No moving average of the weights is kept, though single trainings need
    one: the mean over sites evens out the same jitter in every round, and an average of its own at a site would have
    to travel beside the weights and be as large.

    Args:
        info: of the data.
        network: the model of every site (and the server): ``unet``, ``dit``, or a module of your own that takes
            ``(x, time, class)``; or ``diffusers_folder``, a checkpoint.
        site_networks: where sites have different hardware: site i gets ``site_networks[i % len]``.
        kind: ``edm`` (preconditioned, variance exploding) or ``flow`` (rectified flow). A network that comes with a
            schedule keeps its own.
        sigma_data: standard deviation that rows are scaled to (they are normalised to 1 before).
        drop: share of training rows whose condition is hidden, so that guidance has a model without; not where the
            model knows no null condition.
        base: public rows that the common model is trained on first; None starts from nothing.
        levels: noise levels of an evaluation, equally likely ones in training; row i is seen at level i % levels.
    """

    info: Info
    network: ModelBuilder = UNet()
    site_networks: tuple[ModelBuilder, ...] = ()
    kind: Kind = "edm"
    sigma_data: Annotated[float, Gt(0)] = 0.5
    drop: Annotated[float, Ge(0), Lt(1)] = 0.1
    base: Base | None = None
    levels: Annotated[int, Ge(1)] = 8
    headline: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    denoises: ClassVar[bool] = True

    @property
    def wrapper(self) -> AsDenoiser:
        return AsDenoiser(self.kind, self.sigma_data)

    @property
    def outputs(self) -> int:
        """How many classes the network is told."""
        return self.info.num_classes or 1

    def model(self, seed: int, site: int | None = None) -> nn.Module:
        if self.info.kind in ("text", "graph"):
            what = "tokens" if self.info.kind == "text" else "nodes of a graph"
            raise DataError(
                f"The rows of `{self.info.name}` are {what}, to which no noise can be added; use images, tables or "
                "series for denoising."
            )
        if self.base is not None:
            return self.base.denoiser(self.model_key(site), self.kind, self.sigma_data, self.info)
        return make_denoiser(self.model_key(site), self.info, seed, self.kind, self.sigma_data)

    def model_key(self, site: int | None = None) -> ModelBuilder:
        return network_at(site, self.network, self.site_networks)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """The rows as the model sees them through noise as large as they are, in their own units."""
        denoiser, x, cond = self._given(model, batch)
        t = denoiser.schedule.time(torch.full((len(x),), self.sigma_data, device=x.device))
        guess: Tensor = denoiser(add_noise(denoiser.schedule, x, _noise(x), t), t, cond)
        return guess / self.sigma_data

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """What a denoiser of its kind is trained with; see :func:`training_loss`."""
        denoiser, x, cond = self._given(model, batch)
        ratio = usual_law(denoiser).draw(len(x), torch.default_generator).to(x.device)
        eps, u = _noise(x), torch.rand(len(x)).to(x.device)
        if model.training and self.drop and denoiser.has_null:
            cond = hidden(denoiser, cond, u < self.drop)
        return training_loss(denoiser, x, cond, ratio, eps)

    def evaluate(self, model: nn.Module, data: Dataset) -> dict[str, float]:
        """``loss``: the mean over rows, at fixed noise levels and on fixed noise."""
        total, at = 0.0, 0
        with seeded(0, "evaluate"), evaluating(model) as device:
            denoiser: Denoiser = model  # type: ignore[assignment]
            drawn = usual_law(denoiser).draw(1 << 12, torch.default_generator)
            levels = drawn.quantile((torch.arange(self.levels) + 0.5) / self.levels)
            for batch in data.batches(rows_at_once(*data.info.shape), device):
                _, x, cond = self._given(model, batch)
                ratio = levels[torch.arange(at, at + len(x)) % self.levels].to(device)
                total += float(training_loss(denoiser, x, cond, ratio, _noise(x)).sum())
                at += len(x)
        return {"loss": total / len(data)}

    def draw(self, model: nn.Module, per_class: int = 2, seed: int = 0) -> Tensor:
        """Samples to look at, ``[per_class * classes, ...]``, classes in turn; the same noise whatever the model."""
        device = next(model.parameters()).device
        cond = torch.arange(self.outputs).repeat(per_class)
        z = torch.randn(len(cond), *self.info.shape, generator=stream(seed, "draw"))
        with evaluating(model):
            return Sampler(steps=10, high=20.0)(model, z.to(device), cond.to(device)).cpu()  # type: ignore[arg-type]

    def _given(self, model: nn.Module, batch: Batch) -> tuple[Denoiser, Tensor, Tensor]:
        """The denoiser, rows of its ``sigma_data``, and their conditions."""
        denoiser: Denoiser = model  # type: ignore[assignment]  # that of `model`, or one with adapters in it
        x = batch["x"] * self.sigma_data
        if "cond" in batch:
            return denoiser, x, batch["cond"]
        if getattr(denoiser.net, "wants", "class") == "text":
            raise DataError(
                f"This model is told embeddings of a text, and `{self.info.name}` has no column `cond` with them."
            )
        if self.info.num_classes and "y" in batch:
            return denoiser, x, batch["y"]
        one = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return denoiser, x, denoiser.null(one) if self.info.num_classes else one


def _noise(x: Tensor) -> Tensor:
    return torch.randn(x.shape).to(x.device)
