"""The many-step model that every distiller starts from: EDM or rectified-flow training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from atoll.core.card import Card, Cite
from atoll.diffusion.as_denoiser import usual_law
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Distiller, Draw, Needs, Nets, Role, Update, Work, best
from atoll.diffusion.losses import hidden, training_loss
from atoll.diffusion.schedules import TimeLaw
from atoll.diffusion.solvers import Sampler

CARD = Card(
    name="edm_fm_teacher",
    area="generative training",
    summary="a conditional denoiser from real images: EDM's preconditioned loss, or rectified flow",
    cites=(
        Cite(
            authors="Karras, Aittala, Aila, Laine", year=2022, arxiv="2206.00364",
            title="Elucidating the Design Space of Diffusion-Based Generative Models",
        ),
        Cite(authors="Lipman, Chen, Ben-Hamu, Nickel, Le", year=2022, title="Flow Matching", arxiv="2210.02747"),
        Cite(authors="Liu, Gong, Liu", year=2022, title="Flow Straight and Fast", arxiv="2209.03003"),
    ),
    suits=("generative models",),
)  # fmt: skip


@dataclass(frozen=True)
class EdmFmTeacher(Distiller):
    """Denoising score matching (Karras et al., 2022, arXiv 2206.00364) or rectified flow (Liu et al., 2022,
    2209.03003): which one, the network that is trained says (``predicts``). Conditions are hidden now and then, so that
    the model can be guided.

    Args:
        lr: of Adam; it falls along a half cosine.
        law: noise levels; None takes the usual ones: log-normal for EDM, logit-normal for flows, all steps alike for a
            table of them.
        drop: fraction of the conditions that are hidden.
        ema: decay of the average that becomes the model.
        sampler: how it is sampled; its number of steps follows from the calls that are asked for.
    """

    lr: Annotated[float, Gt(0)] = 2e-3
    law: TimeLaw | None = None
    drop: Annotated[float, Ge(0), Le(1)] = 0.1
    ema: Annotated[float, Ge(0), Le(1)] = 0.999
    sampler: Sampler = Sampler()
    needs: ClassVar[Needs] = "images"
    few: ClassVar[tuple[int, ...]] = (1, 2, 4, 9, 19, 35)

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        student = work.copy_of(teacher)
        return {"student": Role(student, self.lr, decay="cosine", betas=(0.9, 0.99), ema=self.ema)}

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        student: Denoiser = nets["student"]  # type: ignore[assignment]
        x, cond = draw.real()
        cond = hidden(student, cond, draw.uniform() < self.drop)
        law = self.law or usual_law(student)
        loss = training_loss(student, x, cond, draw.ratios(law), draw.noise())
        yield "student", {"denoising": loss.mean()}

    def generate(
        self, nets: Nets, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.sampler.within(calls)(best(nets), z, cond)
