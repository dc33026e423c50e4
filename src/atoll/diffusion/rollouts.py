"""How a student makes the sample that is judged in training, and how it makes samples afterwards.

Only the last call of a rollout keeps a graph, so memory is that of one call whatever the number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Protocol

import torch
from annotated_types import Gt
from torch import Tensor

from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Draw
from atoll.diffusion.schedules import as_times, flow_grid
from atoll.diffusion.solvers import renoising, start


@dataclass(frozen=True, slots=True)
class Sample:
    """What a student has made.

    Attributes:
        x: its guess of the clean sample ``[B, ...]``, with the graph of one call.
        anchor: where re-noising starts: ``x`` itself, or a point of a trajectory that is still noisy.
        s: time of ``anchor`` ``[B]`` in the student's schedule; 0 for a clean one.
        cond: its conditions.
        step: which of the student's steps made it ``[B]``, from 0.
        facts: what a method's own loss needs besides.
        told: further inputs of the fake score, such as ``numbers``.
        top: time up to which the anchor may be re-noised ``[B]``; None: any.
    """

    x: Tensor
    anchor: Tensor
    s: Tensor
    cond: Tensor
    step: Tensor
    facts: dict[str, Tensor] = field(default_factory=dict)
    told: dict[str, Tensor] = field(default_factory=dict)
    top: Tensor | None = None


def clean(x: Tensor, cond: Tensor, step: Tensor | None = None) -> Sample:
    """A sample without noise left."""
    zeros = torch.zeros(len(x), device=x.device)
    return Sample(x, x, zeros, cond, zeros.long() if step is None else step)


class Rollout(Protocol):
    package: ClassVar[str] = "atoll.diffusion.rollouts"
    few: ClassVar[tuple[int, ...]]
    """Numbers of calls that students trained with it are sampled with."""

    def __call__(self, student: Denoiser, draw: Draw) -> Sample:
        """Fresh noise and conditions, through the student."""
        ...

    def generate(
        self, student: Denoiser, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Samples of a finished student, ``calls`` calls each."""
        ...


@dataclass(frozen=True)
class OneStep(Rollout):
    """One call at one noise level: Diff-Instruct, DMD, SiD, SIM.

    Args:
        ratio: sigma / alpha of that level. A copy of the teacher starts best where it still sees some structure.
    """

    ratio: Annotated[float, Gt(0)] = 2.5
    few: ClassVar[tuple[int, ...]] = (1,)

    def __call__(self, student: Denoiser, draw: Draw) -> Sample:
        z, cond = draw.noise(), draw.cond()
        t = as_times(student.schedule, self.ratio, z)
        return clean(student(start(student.schedule, z, t), t, cond), cond)

    def generate(
        self, student: Denoiser, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        return few_steps(student, z, cond, few_step_ratios(calls, self.ratio), generator)


def few_step_ratios(calls: int, first: float) -> Tensor:
    """``calls`` falling ratios and 0, at equal rectified-flow times from ``first`` on."""
    return flow_grid(calls, high=first / (1 + first))


def few_steps(
    student: Denoiser, z: Tensor, cond: Tensor, ratios: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Guess, re-noise, guess: a few-step student's samples at falling ``ratios`` (the last is 0)."""
    times = as_times(student.schedule, ratios, z)
    with torch.no_grad():
        x = start(student.schedule, z, times[0])
        return renoising(student.schedule, lambda x, t: student(x, t, cond), x, times, generator)
