"""Consistency distillation and consistency training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from atoll.core.card import Card, Cite
from atoll.diffusion.consistency import Gaps, apart, consistent_samples
from atoll.diffusion.denoiser import Denoiser, viewed
from atoll.diffusion.distiller import Distiller, Draw, Needs, Nets, Role, Update, Work, best
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.rows import Rows
from atoll.diffusion.schedules import LogNormal, TimeLaw, add_noise
from atoll.diffusion.solvers import ddim_step, heun_step

CARD = Card(
    name="cd_ct",
    area="few-step distillation",
    summary="neighbouring points of a trajectory are sent to the same clean sample",
    cites=(
        Cite(authors="Song, Dhariwal, Chen, Sutskever", year=2023, title="Consistency Models", arxiv="2303.01469"),
        Cite(
            authors="Song, Dhariwal", year=2023, title="Improved Techniques for Training Consistency Models",
            arxiv="2310.14189",
        ),
        Cite(
            authors="Geng, Pokle, Luo, Lin, Kolter", year=2024, title="Consistency Models Made Easy", arxiv="2406.14548"
        ),
    ),
    suits=("generative models", "few calls a sample"),
)  # fmt: skip


@dataclass(frozen=True)
class CdCt(Distiller):
    """Consistency models (Song et al., 2023, arXiv 2303.01469; Song and Dhariwal, 2023, 2310.14189; Geng et al., 2024,
    2406.14548).

    ``f(x_t, t)`` follows ``f(x_r, r)`` at a point one gap lower on the same trajectory. In distillation one step of the
    guided teacher leads there; in training the same noise does, at less of it. At the lowest time f is the identity,
    and from there the answer spreads upwards; so early in a run, and with a large step size, one-call samples may get
    worse before they get better. Gaps start wide and become finer: fine ones carry no signal while f is still bad.

    Args:
        mode: ``distil`` asks the teacher for the lower point, ``train`` takes the teacher's weights as a start only.
        target: the lower point is seen by the network ``itself``, without a graph, or by its running ``average`` (which
            does harm in training).
        solver: of the teacher's step: one call of ``ddim``, or two of ``heun``.
        guidance: of the teacher; the student is then sampled without any.
        gaps: between the points, and between which noise levels f is one.
        law: noise levels of the upper point.
        c: where the pseudo-Huber distance bends; None: 0.00054 sqrt(numbers in a sample).
        rows: what is noised: real images, or samples that the teacher has made.
        lr: of Adam.
        warmup: steps over which it rises.
        ema: decay of the average that is kept in the end.
    """

    mode: Literal["distil", "train"] = "distil"
    target: Literal["itself", "average"] = "itself"
    solver: Literal["ddim", "heun"] = "heun"
    guidance: Guidance = Guidance()
    gaps: Gaps = Gaps()
    law: TimeLaw = LogNormal(-1.1, 2.0)
    c: Annotated[float, Gt(0)] | None = None
    rows: Rows = Rows()
    lr: Annotated[float, Gt(0)] = 1e-4
    warmup: Annotated[int, Ge(0)] = 20
    ema: Annotated[float, Ge(0), Le(1)] = 0.97
    few: ClassVar[tuple[int, ...]] = (1, 2, 4)

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return self.rows.needs

    def material(self, teacher: Denoiser, work: Work) -> dict[str, Tensor]:
        return self.rows.material(teacher, work)

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        student = Role(work.copy_of(teacher), self.lr, warmup=self.warmup, betas=(0.9, 0.999), ema=self.ema)
        return {"teacher": Role(teacher, saved=False), "student": student}

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        student: Any = nets["student"].train()  # with its dropout, where it has some
        x, cond = self.rows.draw(draw)
        high, low = self.gaps.pair(draw.ratios(self.law, len(x)), self.gaps.widths(draw.progress))
        t, r = student.schedule.time(high), student.schedule.time(low)
        eps = draw.noise_like(x)
        x_t = add_noise(student.schedule, x, eps, t)
        with torch.no_grad():
            x_r = add_noise(student.schedule, x, eps, r)
            if self.mode == "distil":
                x_r = self.teacher_step(nets["teacher"], student, x_t, t, r, cond)  # type: ignore[arg-type]
        judge: Any = best(nets).train() if self.target == "average" else student
        distance = apart(student, judge, x_t, t, x_r, r, cond, self.gaps.low, self.c)
        yield "student", {"consistency": (distance / (high - low)).mean()}

    def teacher_step(
        self, teacher: Denoiser, student: Denoiser, x_t: Tensor, t: Tensor, r: Tensor, cond: Tensor
    ) -> Tensor:
        """The guided teacher's next point, in the student's schedule."""
        schedule, same = student.schedule, viewed(teacher, student.schedule)

        def guess(x: Tensor, t: Tensor) -> Tensor:
            return self.guidance(same, x, t, cond)

        if self.solver == "heun":
            return heun_step(schedule, guess, x_t, t, r)
        return ddim_step(schedule, x_t, guess(x_t, t), t, r)

    def generate(
        self, nets: Nets, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        return consistent_samples(best(nets).eval(), z, cond, calls, self.gaps, generator)
