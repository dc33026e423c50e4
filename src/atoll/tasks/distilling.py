"""Distilling: sites turn a many-step generator into a fast one on rows that stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from atoll.core.errors import DataError
from atoll.core.streams import stream
from atoll.data.dataset import Dataset, Info
from atoll.diffusion.diffusers_model import adapted, load_denoiser
from atoll.diffusion.distillation import Distillation
from atoll.diffusion.distiller import Conditions, Distiller, Images, Work, usual
from atoll.diffusion.student import facts_of, save_student
from atoll.diffusion.teacher import expect_fits
from atoll.diffusion.trainer import Trainer
from atoll.models.model import ModelBuilder, seeded
from atoll.models.unet import UNet
from atoll.tasks.task import Batch, Task, evaluating, rows_at_once

COUNTED = 16
"""Rows of the step whose operations are counted."""


@dataclass(frozen=True)
class Distilling(Task):
    """A student of a generator that is there already, class by class.

    Its networks take turns, each with a loss of its own, so the local work has to be that of ``distil_at_sites``.
    Methods that need no images can do without any site: ``stage: distil``.

    Args:
        info: of the data.
        network, site_networks: not used: the student is built like its teacher.
        start: folder of the teacher, which every site has: of a run, or a checkpoint of diffusers; in a recipe of
            stages, the name of an earlier one.
        method: how the student is made.
        lora: rank of the adapters that alone are trained, on the teacher, and alone travel; None trains all weights.
        samples: that an evaluation makes.
    """

    info: Info
    network: ModelBuilder = UNet()
    site_networks: tuple[ModelBuilder, ...] = ()
    start: str = ""
    method: Distiller = usual("cd_ct")
    lora: Annotated[int, Ge(1)] | None = None
    samples: Annotated[int, Ge(20)] = 500
    headline: ClassVar[str] = "energy_distance"
    higher_is_better: ClassVar[bool] = False
    denoises: ClassVar[bool] = True
    alternates: ClassVar[bool] = True

    @property
    def outputs(self) -> int:
        """How many classes the student is told."""
        return self.info.num_classes or 1

    @property
    def sigma_data(self) -> float:
        return float(self._teacher().sigma_data)

    def model(self, seed: int, site: int | None = None) -> Distillation:
        teacher = self._teacher()
        expect_fits(teacher, self.info)
        rank = self.lora
        build = None if rank is None else lambda: adapted(teacher, rank, seed=seed)
        return Distillation(
            self.method, teacher, Work(self.info.shape, Conditions.classes(self.outputs), seed=seed, build=build)
        )

    def model_key(self, site: int | None = None) -> object:
        return self.start

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """A sample of each row's class, in the rows' own units."""
        made: Distillation = model  # type: ignore[assignment]
        z = torch.randn(batch["x"].shape).to(batch["x"].device)
        out: Tensor = made(z, self._classes(batch)) / made.teacher.sigma_data
        return out

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        raise DataError("The networks of a distillation have a loss each; use `method: distil_at_sites`.")

    def flops(self, model: nn.Module, data: Dataset, device: str) -> float:
        """Operations of a step for each of its rows: counted on one that is then taken back."""
        made: Distillation = model  # type: ignore[assignment]
        images = Images(data, made.teacher.sigma_data)
        work = Work(self.info.shape, Conditions.classes(self.outputs), images, batch=COUNTED, device=device)
        return Trainer(self.method, made.teacher, work, 2, roles=made.roles).flops_per_step() / COUNTED

    def evaluate(self, model: nn.Module, data: Dataset) -> dict[str, float]:
        """``energy_distance``: between rows and as many samples of their classes, on fixed noise, per number; 0 for
        equal distributions (Szekely and Rizzo, 2013). Nothing of fewer than two rows."""
        made: Distillation = model  # type: ignore[assignment]
        if len(data) < 2:
            return {}
        rows = torch.linspace(0, len(data) - 1, min(len(data), self.samples)).long()
        drawn, real = [], []
        with seeded(0, "evaluate"), evaluating(model) as device:
            for some in rows.split(rows_at_once(*self.info.shape)):
                batch = data.ready(some, device)
                drawn.append(self.predict(made, batch).flatten(1))
                real.append(batch["x"].flatten(1))
        return {"energy_distance": energy_distance(torch.cat(drawn), torch.cat(real))}

    def draw(self, model: nn.Module, per_class: int = 2, seed: int = 0) -> Tensor:
        """Samples to look at, ``[per_class * classes, ...]``, classes in turn; the same noise whatever the model."""
        device = next(model.parameters()).device
        cond = torch.arange(self.outputs).repeat(per_class)
        z = torch.randn(len(cond), *self.info.shape, generator=stream(seed, "draw"))
        with seeded(0, "draw"), evaluating(model):
            out: Tensor = model(z.to(device), cond.to(device))
        return out.cpu()

    def save(self, model: nn.Module, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write the student alone, so that it draws again."""
        made: Distillation = model  # type: ignore[assignment]
        sigma, built = made.teacher.sigma_data, facts_of(self.start)
        save_student(folder, self.method, made.nets, made.teacher, self.info, sigma, built, facts)

    def _teacher(self) -> Any:
        if not self.start:
            raise DataError("A distillation needs its teacher; name the folder of a denoiser in the task's `start`.")
        if not Path(self.start).is_dir():
            raise DataError(
                f"There is no folder `{self.start}`, which `start` names; give the `model` folder of a run that made a "
                "generator, or a checkpoint of diffusers."
            )
        return load_denoiser(self.start)

    def _classes(self, batch: Batch) -> Tensor:
        if self.info.num_classes and "y" in batch:
            return batch["y"]
        return torch.zeros(len(batch["x"]), dtype=torch.int64, device=batch["x"].device)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """``2 E|a - b| - E|a - a'| - E|b - b'|`` of two rows ``[n, d]`` or more, over sqrt(d)."""
    a, b = a.double(), b.double()
    n, m = len(a), len(b)
    within = torch.cdist(a, a).sum() / (n * (n - 1)) + torch.cdist(b, b).sum() / (m * (m - 1))
    return float((2 * torch.cdist(a, b).mean() - within) / a.shape[1] ** 0.5)
