"""Functions that map every point of a trajectory to its end: their form, their loss's two points, their samples.

Times are compared as ratios sigma / alpha, EDM's own time, so that a method is the same under every schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.losses import pseudo_huber
from atoll.diffusion.rollouts import few_step_ratios
from atoll.diffusion.schedules import as_times
from atoll.diffusion.solvers import ddim_step, renoising, start


def to_the_end(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Tensor, low: float) -> Tensor:
    """``f(x_t, t)``: one DDIM step to the time whose ratio is ``low``. There f is the identity whatever the network
    says, so any denoiser is a consistency function. Of the preconditioned form this is Song et al.'s own: the same
    c_out = (s - low) sd / sqrt(s^2 + sd^2), and a c_skip that falls from 1 alike."""
    schedule, t = denoiser.schedule, t.expand(len(x_t))
    return ddim_step(schedule, x_t, denoiser(x_t, t, cond), t, as_times(schedule, low, t).expand_as(t))


@dataclass(frozen=True)
class Gaps:
    """How far apart the two points of a consistency loss lie: one width of a Karras grid, which becomes finer.

    Args:
        first, last: widths that the grid has in the beginning and in the end; it doubles at equal intervals between.
        low, high: ratios at its ends; ``high`` is where sampling starts.
        rho: how strongly it is bent towards low noise.
    """

    first: Annotated[int, Ge(1)] = 10
    last: Annotated[int, Ge(1)] = 160
    low: Annotated[float, Gt(0)] = 0.002
    high: Annotated[float, Gt(0)] = 40.0
    rho: Annotated[float, Gt(0)] = 7.0

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise AtollError(f"The grid becomes finer: `first` is at most `last`; got {self.first} and {self.last}.")
        if self.low >= self.high:
            raise AtollError(f"The grid needs `low` below `high`; got {self.low} and {self.high}.")

    def widths(self, progress: float) -> int:
        """How many there are at a time of the run, from 0 to 1."""
        stages = math.ceil(math.log2(self.last / self.first)) + 1
        return min(self.last, self.first << min(stages - 1, int(progress * stages)))

    def pair(self, ratio: Tensor, widths: int) -> tuple[Tensor, Tensor]:
        """A ratio within the grid and the one a width below it. Those of the lowest width become its upper end."""
        a, b = self.low ** (1 / self.rho), self.high ** (1 / self.rho)
        gap = (b - a) / widths
        root = (ratio ** (1 / self.rho)).clamp(a + gap, b)
        return root**self.rho, (root - gap).clamp(min=a) ** self.rho


@contextmanager
def rewound(device: torch.device) -> Iterator[None]:
    """What is drawn inside from the global generator (dropout masks) is drawn again after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def apart(
    student: Denoiser, judge: Denoiser, x_t: Tensor, t: Tensor, x_r: Tensor, r: Tensor, cond: Tensor, low: float,
    c: float | None = None,
) -> Tensor:  # fmt: skip
    """Pseudo-Huber distance ``[B]`` between the ends that ``student`` sees from ``x_t`` and ``judge``, without a graph,
    from the lower point ``x_r`` of the same trajectory. Both draw the same dropout masks: what differs is the time."""
    with torch.no_grad(), rewound(x_t.device):
        goal = to_the_end(judge, x_r, r, cond, low)
    return pseudo_huber(to_the_end(student, x_t, t, cond, low), goal, c)


def consistent_samples(
    denoiser: Denoiser, z: Tensor, cond: Tensor, calls: int, gaps: Gaps, generator: torch.Generator | None = None
) -> Tensor:
    """Go to the end, re-noise, go to the end: ``calls`` calls, from ``gaps.high`` on."""
    times = as_times(denoiser.schedule, few_step_ratios(calls, gaps.high), z)
    with torch.no_grad():
        x = start(denoiser.schedule, z, times[0])
        return renoising(
            denoiser.schedule, lambda x, t: to_the_end(denoiser, x, t, cond, gaps.low), x, times, generator
        )  # fmt: skip
