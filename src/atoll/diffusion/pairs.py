"""What a teacher makes before training: noise with the sample that its ODE leads to, and guided trajectories.

Both are material of a method (``Distiller.material``), so they are made once and kept on disk; no data is needed. Noise
and conditions of a row depend on the seed and the row alone, not on the batch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from atoll.core.errors import AtollError
from atoll.core.progress import progress
from atoll.core.streams import stream
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Work
from atoll.diffusion.guidance import both
from atoll.diffusion.schedules import as_times, convert, shaped
from atoll.diffusion.solvers import SOLVERS, Sampler, start


@dataclass(frozen=True)
class TeacherPairStore:
    """Pairs (z, x) of unit noise and the teacher's sample from it.

    Args:
        count: how many pairs; conditions take turns.
        sampler: of the teacher. It is deterministic, so a pair belongs together; its guidance becomes part of x.
        batch: rows at a time.
    """

    count: Annotated[int, Ge(1)] = 20_000
    sampler: Sampler = Sampler()
    batch: Annotated[int, Ge(1)] = 500

    def make(self, teacher: Denoiser, work: Work) -> dict[str, Tensor]:
        """``z`` and ``x`` ``[count, ...]`` and their ``cond`` ``[count, ...]``."""
        parts = []
        for z, cond in _asked(work, self.count, self.batch, "pairs"):
            x = self.sampler(teacher, z, cond)
            parts.append({"z": z, "x": x, "cond": cond})
        return _joined(parts)


@dataclass(frozen=True)
class TrajectoryStore:
    """Points of guided trajectories, with what guidance says there; every trajectory has a scale of its own.

    Args:
        count: how many trajectories; conditions take turns.
        sampler: whose solver and grid are followed; every call of the network leaves one row. Its guidance is left
            aside: here the scale is drawn.
        low, high: scales are uniform in between.
        batch: trajectories at a time.
    """

    count: Annotated[int, Ge(1)] = 500
    sampler: Sampler = field(default_factory=lambda: Sampler(solver="ddim", steps=20))
    low: Annotated[float, Ge(0)] = 1.0
    high: Annotated[float, Gt(0)] = 6.0
    batch: Annotated[int, Ge(1)] = 250

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise AtollError(f"Scales are drawn between `low` and `high`; got {self.low} and {self.high}.")

    def make(self, teacher: Denoiser, work: Work) -> dict[str, Tensor]:
        """``x_t``, the guided ``eps`` there, the time ``t``, ``cond`` and the scale ``w``: one row a point."""
        schedule, parts = teacher.schedule, []
        scales = stream(work.seed, "trajectories", "scales")
        for z, cond in _asked(work, self.count, self.batch, "trajectories"):
            w = (self.low + (self.high - self.low) * torch.rand(len(z), generator=scales)).to(z.device)

            def guess(x: Tensor, t: Tensor, cond: Tensor = cond, w: Tensor = w) -> Tensor:
                t = t.expand(len(x))
                given, null = both(teacher, x, t, cond)
                x0 = null + shaped(w, x) * (given - null)
                eps = convert(schedule, x0, "x0", "eps", x, t)
                parts.append({"x_t": x, "eps": eps, "t": t, "cond": cond, "w": w})
                return x0

            times = as_times(schedule, self.sampler.ratios(), z)
            with torch.no_grad():
                SOLVERS[self.sampler.solver](schedule, guess, start(schedule, z, times[0]), times)
        return _joined(parts)


def _asked(work: Work, rows: int, batch: int, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Unit noise and conditions in turn, a batch at a time."""
    noise, conditions = stream(work.seed, name, "noise"), work.conditions.rows
    with progress(rows, f"the teacher's {name}") as bar:
        for first in range(0, rows, batch):
            n = min(batch, rows - first)
            z = torch.stack([torch.randn(work.shape, generator=noise) for _ in range(n)])
            cond = conditions[torch.arange(first, first + n) % len(conditions)]
            yield z.to(work.device), cond.to(work.device)
            bar.update(first + n)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name].cpu() for part in parts]).contiguous() for name in parts[0]}
