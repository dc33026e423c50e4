"""Progressive distillation: halve the number of steps, again and again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from atoll.core.card import Card, Cite
from atoll.core.errors import AtollError
from atoll.core.tree import copy_, named_tensors
from atoll.diffusion.denoiser import Denoiser, viewed
from atoll.diffusion.distiller import Distiller, Draw, Needs, Nets, Role, Update, Work, best
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.rows import Rows
from atoll.diffusion.schedules import NoiseSchedule, add_noise, as_times, flow_grid, shaped
from atoll.diffusion.solvers import ddim, ddim_step, start

CARD = Card(
    name="pd",
    area="few-step distillation",
    summary="a student makes two steps of its teacher in one, becomes the teacher, and so on down to one step",
    cites=(
        Cite(
            authors="Salimans, Ho", year=2022, title="Progressive Distillation for Fast Sampling of Diffusion Models",
            arxiv="2202.00512",
        ),
    ),
    suits=("generative models", "few calls a sample"),
)  # fmt: skip


def aim(schedule: NoiseSchedule, x: Tensor, there: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """The clean sample with which one DDIM step from ``x`` at t lands on ``there`` at ``to``."""
    keep = schedule.sigma(to) / schedule.sigma(t)
    return (there - shaped(keep, x) * x) / shaped(schedule.alpha(to) - keep * schedule.alpha(t), x)


@dataclass(frozen=True)
class PD(Distiller):
    """Progressive distillation (Salimans and Ho, 2022, arXiv 2202.00512).

    In every round the student's one DDIM step has to land where two of its teacher's do; then it is the teacher of the
    next round, which needs half as many steps. All grids are nested, at equal rectified-flow times. Errors add up, most
    in the last two rounds.

    Args:
        first: steps that the teacher takes in the first round.
        last: steps of the student in the last one, and of its sampling.
        weight: of the squared error of the clean sample: ``snr`` is max(SNR, 1), ``v`` is SNR + 1, which makes it the
            squared error of v in variance-preserving coordinates.
        guidance: of the teacher, in the first round; students have it in them.
        shift: above 1 spends more steps at high noise.
        high: ratio sigma / alpha where sampling starts.
        rows: what is noised: real images, or samples that the teacher has made.
        lr: of Adam, whose moments start afresh in every round.
        ema: decay of the average, which is what the next round is taught by.
    """

    first: Annotated[int, Ge(2)] = 32
    last: Annotated[int, Ge(1)] = 1
    weight: Literal["snr", "v"] = "snr"
    guidance: Guidance = Guidance()
    shift: Annotated[float, Gt(0)] = 1.0
    high: Annotated[float, Gt(0)] = 40.0
    rows: Rows = Rows()
    lr: Annotated[float, Gt(0)] = 1e-4
    ema: Annotated[float, Ge(0), Le(1)] = 0.97

    def __post_init__(self) -> None:
        if self.first < 2 * self.last or self.last << self.rounds != self.first:
            raise AtollError(
                f"Steps are halved from `first` to `last`, so that is `last` times a power of 2; got {self.first} and "
                f"{self.last}."
            )

    @property
    def rounds(self) -> int:
        return (self.first // self.last).bit_length() - 1

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return self.rows.needs

    @property
    def few(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.last,)

    def round_of(self, step: int, steps: int) -> int:
        """Rounds are equally long."""
        return min(self.rounds - 1, step * self.rounds // steps)

    def material(self, teacher: Denoiser, work: Work) -> dict[str, Tensor]:
        return self.rows.material(teacher, work)

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        return {
            "teacher": Role(teacher, saved=False),
            "before": Role(work.copy_of(teacher)),  # the last round's student, from the second round on
            "student": Role(work.copy_of(teacher), self.lr, ema=self.ema),
        }

    def begin(self, nets: Nets, step: int, steps: int) -> Iterable[str]:
        if steps < self.rounds:
            raise AtollError(
                f"From {self.first} to {self.last} steps it takes {self.rounds} rounds; got {steps} steps."
            )
        if step == 0 or self.round_of(step, steps) == self.round_of(step - 1, steps):
            return ()
        done = named_tensors(best(nets))
        copy_(named_tensors(nets["before"]), done)
        copy_(named_tensors(nets["student"]), done)
        return ("student",)

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        student: Any = nets["student"]
        schedule, turn = student.schedule, self.round_of(draw.step, draw.steps)
        count = self.first >> turn  # the teacher's steps
        x, cond = self.rows.draw(draw)
        times = self.times(schedule, count, x)
        i = 2 * draw.integers(0, count // 2, len(x))
        t, middle, to = times[i], times[i + 1], times[i + 2]
        x_t = add_noise(schedule, x, draw.noise_like(x), t)
        with torch.no_grad():
            teacher = viewed(nets["teacher"] if turn == 0 else nets["before"], schedule)  # type: ignore[arg-type]
            guidance = self.guidance if turn == 0 else Guidance()
            z = ddim_step(schedule, x_t, guidance(teacher, x_t, t, cond), t, middle)
            z = ddim_step(schedule, z, guidance(teacher, z, middle, cond), middle, to)
            goal = aim(schedule, x_t, z, t, to)
        error = (student(x_t, t, cond) - goal).square().flatten(1).mean(1)
        snr = schedule.ratio(t) ** -2
        yield "student", {"two steps": (error * (snr.clamp(min=1) if self.weight == "snr" else snr + 1)).mean()}

    def times(self, schedule: NoiseSchedule, steps: int, like: Tensor) -> Tensor:
        return as_times(schedule, flow_grid(steps, self.shift, self.high / (1 + self.high)), like)

    def generate(
        self, nets: Nets, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        student = best(nets)
        times = self.times(student.schedule, calls, z)
        with torch.no_grad():
            x = start(student.schedule, z, times[0])
            return ddim(student.schedule, lambda x, t: student(x, t, cond), x, times)
