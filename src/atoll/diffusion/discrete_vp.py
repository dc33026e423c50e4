"""The variance-preserving schedule of a table of steps, as DDPM and most latent diffusion models have one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from atoll.core.errors import DataError
from atoll.diffusion.schedules import NoiseSchedule, TimeLaw


@dataclass(frozen=True)
class DiscreteVP(NoiseSchedule):
    """Times in (0, 1]: step k of n, counted from 0, is at (k + 1) / n, and between two steps ln ratio is linear. Below
    the first step the ratio falls in a straight line to 0 at time 0; above the last there is nothing, so ``time`` gives
    1 for any larger ratio.

    Args:
        ratios: sigma / alpha at each step, rising.
    """

    ratios: tuple[float, ...] = field(repr=False)

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.ratios, self.ratios[1:], strict=False))
        if len(self.ratios) < 2 or not rising or self.ratios[0] <= 0:
            raise DataError("A table of noise levels needs two or more, each larger than the one before and than 0.")

    @classmethod
    def of(cls, alphas_cumprod: Tensor | Sequence[float]) -> DiscreteVP:
        """From the share of the signal's variance at each step. (None at the last one, as in schedules of zero terminal
        SNR, is taken for 1e-10, as rectified flow stops short of its end.)"""
        left = torch.as_tensor(alphas_cumprod, dtype=torch.float64).clamp(min=1e-10)
        return cls(tuple(((1 - left) / left).sqrt().tolist()))

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The ratio, and its derivative in t."""
        logs, steps = _logs(self.ratios, t.device).to(t.dtype), len(self.ratios)
        u = t * steps - 1
        i = u.detach().floor().clamp(0, steps - 2).long()
        slope = logs[i + 1] - logs[i]
        ratio = (logs[i] + (u - i) * slope).exp()
        low, first = u < 0, self.ratios[0]
        return torch.where(low, (u + 1) * first, ratio), steps * torch.where(low, first, ratio * slope)

    def ratio(self, t: Tensor) -> Tensor:
        return self._at(t)[0]

    def alpha(self, t: Tensor) -> Tensor:
        return (1 + self.ratio(t) ** 2).rsqrt()

    def sigma(self, t: Tensor) -> Tensor:
        ratio = self.ratio(t)
        return ratio * (1 + ratio**2).rsqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        ratio, slope = self._at(t)
        return -ratio * slope * (1 + ratio**2) ** -1.5

    def d_sigma(self, t: Tensor) -> Tensor:
        ratio, slope = self._at(t)
        return slope * (1 + ratio**2) ** -1.5

    def time(self, ratio: Tensor) -> Tensor:
        logs, steps = _logs(self.ratios, ratio.device).to(ratio.dtype), len(self.ratios)
        x = ratio.clamp(min=1e-20).log()
        i = torch.searchsorted(logs, x.detach().contiguous()).clamp(1, steps - 1) - 1
        u = 1 + i + (x - logs[i]) / (logs[i + 1] - logs[i])
        return (torch.where(ratio < self.ratios[0], ratio / self.ratios[0], u) / steps).clamp(max=1)


@dataclass(frozen=True)
class UniformSteps(TimeLaw):
    """Every step of a table with equal chance: what DDPM trains with.

    Args:
        schedule: the table.
    """

    schedule: DiscreteVP

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        steps = len(self.schedule.ratios)
        k = torch.randint(steps, (n,), generator=generator, device=generator.device)
        return self.schedule.ratio((k + 1) / steps)


@lru_cache(maxsize=32)
def _logs(ratios: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(ratios, dtype=torch.float64, device=device).log()
