"""How a student makes the sample that is judged in training, and how it makes samples afterwards.

Only the last call of a rollout keeps a graph, so memory is that of one call whatever the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ClassVar, Literal, Protocol

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Draw
from atoll.diffusion.schedules import add_noise, as_times, flow_grid
from atoll.diffusion.solvers import ddim, ddim_step, renoising, start


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


@dataclass(frozen=True)
class RandomExit(Rollout):
    """Guess, re-noise with fresh noise, guess, and stop at a step drawn for each sample, so that training sees what
    sampling does: DMD2's backward simulation. In SiD's words, the uniform mixture of all steps' outputs is matched to
    the data. With one step it is :class:`OneStep`.

    Args:
        steps: of the student; it may be sampled with fewer, which ends after the first ones.
        ratio: sigma / alpha of the first; the others are at equal rectified-flow times below.
        exits: at which step a sample may stop: ``any``, or only at the ``last`` one.
    """

    steps: Annotated[int, Ge(1)] = 4
    ratio: Annotated[float, Gt(0)] = 2.5
    exits: Literal["any", "last"] = "any"

    @property
    def few(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.steps,)

    def __call__(self, student: Denoiser, draw: Draw) -> Sample:
        z, cond = draw.noise(), draw.cond()
        step = torch.full((len(z),), self.steps - 1, device=z.device)
        if self.exits == "any" and self.steps > 1:
            step = draw.integers(0, self.steps, len(z))
        schedule = student.schedule
        times = as_times(schedule, few_step_ratios(self.steps, self.ratio), z).expand(len(z), -1)
        x = prefix(
            student, start(schedule, z, times[0, 0]), times, step, cond,
            lambda _, x0, __, to: add_noise(schedule, x0, draw.noise_like(x0), to),
        )  # fmt: skip
        return clean(student(x, at(times, step), cond), cond, step)

    def generate(
        self, student: Denoiser, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        if calls > self.steps:
            raise AtollError(f"A student of {self.steps} steps takes at most {self.steps} calls a sample, not {calls}.")
        ratios = few_step_ratios(self.steps, self.ratio)
        return few_steps(student, z, cond, torch.cat([ratios[:calls], ratios[-1:]]), generator)


@dataclass(frozen=True)
class OdePrefix(Rollout):
    """Steps along the student's own probability flow (DDIM), the one that is judged drawn for each sample: trajectory
    distribution matching. What is judged is where that step ends, a point that is still noisy.

    Args:
        counts: numbers of steps; with more than one, each sample draws its own, and the student is told it.
        ratio: sigma / alpha at the start, T; the others are at equal rectified-flow times below.
        interval: where the judged point, at time s, is noised to: ``separate``, no further than where its step began,
            so that time alone tells which step a noisy sample is from; or ``nested``, anywhere up to T.
        inside: judge a random point of the step instead of its end, as a regulariser.
    """

    counts: tuple[Annotated[int, Ge(1)], ...] = (4,)
    ratio: Annotated[float, Gt(0)] = 10.0
    interval: Literal["separate", "nested"] = "separate"
    inside: bool = False

    def __post_init__(self) -> None:
        if not self.counts:
            raise AtollError("`counts` needs at least one number of steps.")

    @property
    def few(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.counts

    @property
    def numbers(self) -> int:
        """How many numbers the networks are told: none, or two: of how many steps, and which one."""
        return 2 if len(self.counts) > 1 or (self.interval == "nested" and self.counts != (1,)) else 0

    def told(self, count: Tensor, step: Tensor | None = None) -> dict[str, Tensor]:
        """The fake score is told both; the student, which sees the time, that the step is 0."""
        if not self.numbers:
            return {}
        return {"numbers": torch.stack([count, torch.zeros_like(count) if step is None else step], 1).float()}

    def __call__(self, student: Denoiser, draw: Draw) -> Sample:
        z, cond = draw.noise(), draw.cond()
        schedule, n, most = student.schedule, len(z), max(self.counts)
        grids = torch.stack([few_step_ratios(c, self.ratio, pad=most - c) for c in self.counts])
        row = draw.integers(0, len(self.counts), n)
        count = torch.tensor(self.counts, device=z.device)[row]
        step = (draw.uniform(n) * count).long().clamp(max=count - 1)
        times, told = as_times(schedule, grids, z)[row], self.told(count)
        x_t = prefix(student, start(schedule, z, times[0, 0]), times, step, cond, partial(ddim_step, schedule), **told)
        t, s = at(times, step), at(times, step + 1)
        if self.inside:
            s = s + 0.9 * draw.uniform(n) * (t - s)
        x0 = student(x_t, t, cond, **told)
        top = t if self.interval == "separate" else times[:, 0]
        return Sample(x0, ddim_step(schedule, x_t, x0, t, s), s, cond, step, told=self.told(count, step), top=top)

    def generate(
        self, student: Denoiser, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        told = self.told(torch.full((len(z),), calls, device=z.device))
        return few_ode_steps(student, z, cond, few_step_ratios(calls, self.ratio), **told)


@dataclass(frozen=True)
class PhasePrefix(Rollout):
    """Steps along the probability flow in phases, which are learned one after the other; the sample of a phase stays
    noisy: it ends where the phase does (Phased DMD).

    Earlier phases bring the noise to where the phase begins, then a step of it is drawn for each sample, and from there
    one call leads to the phase's end. There it is noised again, anywhere between that level and T.

    Args:
        steps: of the student, a multiple of ``phases``.
        phases: each takes an equal part of the training.
        ratio: sigma / alpha at the start, T.
        shift: above 1 spends more steps at high noise.
    """

    steps: Annotated[int, Ge(1)] = 4
    phases: Annotated[int, Ge(1)] = 2
    ratio: Annotated[float, Gt(0)] = 40.0
    shift: Annotated[float, Gt(0)] = 5.0

    def __post_init__(self) -> None:
        if self.steps % self.phases:
            raise AtollError(f"`steps` is a multiple of `phases`; got {self.steps} steps and {self.phases} phases.")

    @property
    def few(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.steps,)

    @property
    def ratios(self) -> Tensor:
        """``steps + 1`` falling ratios; the last is 0."""
        return few_step_ratios(self.steps, self.ratio, self.shift)

    @property
    def ends(self) -> Tensor:
        """Where each phase ends: ``phases`` falling ratios; the last is 0."""
        return self.ratios[self.steps // self.phases :: self.steps // self.phases]

    def phase(self, step: int, steps: int) -> int:
        """Which phase a step of the training belongs to."""
        return min(step * self.phases // max(1, steps), self.phases - 1)

    def __call__(self, student: Denoiser, draw: Draw) -> Sample:
        z, cond = draw.noise(), draw.cond()
        schedule, each = student.schedule, self.steps // self.phases
        first = self.phase(draw.step, draw.steps) * each
        step = draw.integers(first, first + each, len(z))
        times = as_times(schedule, self.ratios, z).expand(len(z), -1)
        x_t = prefix(student, start(schedule, z, times[0, 0]), times, step, cond, partial(ddim_step, schedule))
        t, s = at(times, step), times[:, first + each]
        x0 = student(x_t, t, cond)
        return Sample(x0, ddim_step(schedule, x_t, x0, t, s), s, cond, step, top=times[:, 0])

    def generate(
        self, student: Denoiser, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        if calls != self.steps:
            raise AtollError(f"A student of {self.steps} steps takes {self.steps} calls a sample, not {calls}.")
        return few_ode_steps(student, z, cond, self.ratios)


# ------------------------------------------------------------------------------------------- what they share

Move = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(x_t, x0, t, to) -> x at to``: one step of a sampler, given the guess."""


def prefix(
    student: Denoiser, x: Tensor, times: Tensor, step: Tensor, cond: Tensor, move: Move, **told: Tensor
) -> Tensor:
    """Every row after ``step`` ``[B]`` steps of its own along ``times`` ``[B, N + 1]``, without graph. Rows that have
    arrived cost nothing."""
    x = x.clone()
    with torch.no_grad():
        for j in range(times.shape[1] - 2):
            rows = (step > j).nonzero().flatten()
            if len(rows):
                t, to = times[rows, j], times[rows, j + 1]
                guess = student(x[rows], t, cond[rows], **{k: v[rows] for k, v in told.items()})
                x[rows] = move(x[rows], guess, t, to)
    return x


def at(times: Tensor, step: Tensor) -> Tensor:
    """Each row's time ``[B]`` at its own step."""
    return times.gather(1, step[:, None])[:, 0]


def few_step_ratios(calls: int, first: float, shift: float = 1.0, pad: int = 0) -> Tensor:
    """``calls`` falling ratios and 0, at equal rectified-flow times from ``first`` on, with more of them at high noise
    for a ``shift`` above 1; and ``pad`` zeros more."""
    ratios = flow_grid(calls, shift, first / (shift + first))  # shifting multiplies ratios
    return torch.cat([ratios, ratios.new_zeros(pad)])


def few_steps(
    student: Denoiser, z: Tensor, cond: Tensor, ratios: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Guess, re-noise, guess: a few-step student's samples at falling ``ratios`` (the last is 0)."""
    times = as_times(student.schedule, ratios, z)
    with torch.no_grad():
        x = start(student.schedule, z, times[0])
        return renoising(student.schedule, lambda x, t: student(x, t, cond), x, times, generator)


def few_ode_steps(student: Denoiser, z: Tensor, cond: Tensor, ratios: Tensor, **told: Tensor) -> Tensor:
    """A student's deterministic samples: DDIM at falling ``ratios`` (the last is 0)."""
    schedule = student.schedule
    times = as_times(schedule, ratios, z)
    with torch.no_grad():
        x = start(schedule, z, times[0])
        return ddim(schedule, lambda x, t: student(x, t, cond, **told), x, times)
