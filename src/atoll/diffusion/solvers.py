"""From noise to samples: deterministic solvers of the probability-flow ODE, and few-step samplers.

All are functions of a *guess* ``(x_t, t) -> x0`` and a falling grid of times, so that guidance, routers, adapters and
reflections are wrappers of the guess. ``diffusers`` schedulers give the same points
(``tests/diffusion/test_solvers.py``); they keep state between calls, which a rollout inside training cannot have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from atoll.core.card import Card, Cite
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.schedules import NoiseSchedule, as_times, convert, flow_grid, karras_grid, shaped

CARD = Card(
    name="solvers",
    area="sampler",
    summary="DDIM/Euler, Heun and DPM-Solver++ along the probability flow, and re-noising for few-step students",
    cites=(
        Cite(authors="Song, Meng, Ermon", year=2021, title="Denoising Diffusion Implicit Models", arxiv="2010.02502"),
        Cite(
            authors="Karras, Aittala, Aila, Laine", year=2022, arxiv="2206.00364",
            title="Elucidating the Design Space of Diffusion-Based Generative Models",
        ),
        Cite(
            authors="Lu, Zhou, Bao, Chen, Li, Zhu", year=2022, arxiv="2211.01095",
            title="DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
        ),
        Cite(authors="Song, Dhariwal, Chen, Sutskever", year=2023, title="Consistency Models", arxiv="2303.01469"),
    ),
    suits=("generative models",),
)  # fmt: skip

Guess = Callable[[Tensor, Tensor], Tensor]
"""``(x_t [B, ...], t []) -> x0 [B, ...]``."""
Move = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x_t, t, to) -> x_t``: what is done to a point before the step from t to ``to``, such as a reflection."""


def stay(x: Tensor, *_: Tensor) -> Tensor:
    """The move that changes nothing."""
    return x


def ddim_step(schedule: NoiseSchedule, x: Tensor, x0: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """``alpha' x0 + sigma' eps`` with the eps that ``x0`` implies: the exact solution where x0 does not change. In
    EDM's and rectified flow's coordinates it is Euler's step; with ``to`` above ``t`` it inverts."""
    a, s = schedule.alpha(t), schedule.sigma(t)
    keep = schedule.sigma(to) / s
    return shaped(keep, x) * x + shaped(schedule.alpha(to) - keep * a, x) * x0


def ddim(schedule: NoiseSchedule, guess: Guess, x: Tensor, times: Tensor, before: Move = stay) -> Tensor:
    """One call a step; first order. ``times``: ``[N + 1]``, falling (rising: inversion)."""
    for t, to in pairwise(times):
        x = before(x, t, to)
        x = ddim_step(schedule, x, guess(x, t), t, to)
    return x


def heun(schedule: NoiseSchedule, guess: Guess, x: Tensor, times: Tensor, before: Move = stay) -> Tensor:
    """The mean of the slopes at both ends of each step; second order, 2 N - 1 calls (the last step is Euler's)."""
    for i, (t, to) in enumerate(pairwise(times)):
        x = before(x, t, to)
        if i == len(times) - 2:
            return ddim_step(schedule, x, guess(x, t), t, to)
        x = heun_step(schedule, guess, x, t, to)
    return x


def heun_step(schedule: NoiseSchedule, guess: Guess, x: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """One step by the mean of the slopes at both ends; times ``[]`` or ``[B]``, of which ``to`` still has noise."""
    slope, step = convert(schedule, guess(x, t), "x0", "flow", x, t), shaped(to - t, x)
    there = x + step * slope
    return x + step / 2 * (slope + convert(schedule, guess(there, to), "x0", "flow", there, to))


def dpmpp(schedule: NoiseSchedule, guess: Guess, x: Tensor, times: Tensor, before: Move = stay) -> Tensor:
    """DPM-Solver++(2M): the last two guesses, extrapolated in ``ln(alpha / sigma)``; second order, N calls. First and
    last step are first order."""
    last: tuple[Tensor, Tensor] | None = None  # the last guess and its step
    for i, (t, to) in enumerate(pairwise(times)):
        x = before(x, t, to)
        x0 = guess(x, t)
        h = schedule.ratio(t).log() - schedule.ratio(to).log()
        mixed = x0
        if last is not None and i < len(times) - 2:
            r = last[1] / h
            mixed = x0 + (x0 - last[0]) / (2 * r)
        x, last = ddim_step(schedule, x, mixed, t, to), (x0, h)
    return x


def renoising(
    schedule: NoiseSchedule, guess: Guess, x: Tensor, times: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """The sampler of consistency models: guess, noise the guess again to the next time, guess. ``times``: ``[N + 1]``
    of which the last, 0, is only where it ends."""
    x0 = x
    for i, t in enumerate(times[:-1]):
        if i:
            eps = torch.randn(x.shape, generator=generator, device=x.device)
            x = shaped(schedule.alpha(t), x0) * x0 + shaped(schedule.sigma(t), x0) * eps
        x0 = guess(x, t)
    return x0


SOLVERS = {"ddim": ddim, "heun": heun, "dpmpp": dpmpp}


@dataclass(frozen=True)
class Sampler:
    """How many-step models are sampled.

    Args:
        solver: ``ddim`` (Euler), ``heun`` or ``dpmpp``.
        steps: of the grid; ``heun`` calls the network twice a step.
        guidance: of the condition.
        grid: ``karras``, or ``flow``: equal rectified-flow times, moved by ``shift``.
        low, high: ratios sigma / alpha between which the Karras grid runs.
        shift: above 1 spends more steps at high noise.
    """

    solver: Literal["ddim", "heun", "dpmpp"] = "heun"
    steps: Annotated[int, Ge(1)] = 18
    guidance: Guidance = Guidance()
    grid: Literal["karras", "flow"] = "karras"
    low: Annotated[float, Gt(0)] = 0.02
    high: Annotated[float, Gt(0)] = 40.0
    shift: Annotated[float, Gt(0)] = 1.0

    @property
    def calls(self) -> int:
        """Rows that go through the network per sample."""
        return (2 * self.steps - 1 if self.solver == "heun" else self.steps) * self.guidance.calls

    def within(self, calls: int) -> Sampler:
        """The same with as many steps as ``calls`` allow (at least one; Heun's with too few steps is DDIM)."""
        each = max(1, calls // self.guidance.calls)
        if self.solver == "heun" and each < 5:
            return replace(self, solver="ddim", steps=each)
        return replace(self, steps=(each + 1) // 2 if self.solver == "heun" else each)

    def ratios(self) -> Tensor:
        """``steps + 1`` falling ratios; the last is 0."""
        if self.grid == "karras":
            return karras_grid(self.steps, self.low, self.high)
        return flow_grid(self.steps, self.shift, self.high / (1 + self.high))

    def __call__(self, denoiser: Denoiser, z: Tensor, cond: Tensor) -> Tensor:
        """Samples from unit noise ``z`` ``[B, ...]``, without gradients."""
        schedule = denoiser.schedule
        times = as_times(schedule, self.ratios(), z)
        with torch.no_grad():
            x = start(schedule, z, times[0])
            return SOLVERS[self.solver](schedule, lambda x, t: self.guidance(denoiser, x, t, cond), x, times)


def start(schedule: NoiseSchedule, z: Tensor, t: Tensor) -> Tensor:
    """Where sampling begins: noise of the marginal's scale at t, taking the data's mean as 0. Exact where no signal is
    left; elsewhere the data's own spread is too small to matter."""
    return shaped(schedule.sigma(t), z) * z
