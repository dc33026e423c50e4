"""Noise schedules: how much signal and how much noise there is at a time.

Everywhere ``x_t = alpha(t) x0 + sigma(t) eps`` with ``eps`` of unit variance. Two schedules differ only in how they
name the same points: the *ratio* ``sigma / alpha`` is what they have in common (EDM's sigma), so a time of one is
turned into a time of another by ``b.time(a.ratio(t))``. Times are float32 tensors ``[B]`` or ``[]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import torch
from annotated_types import Gt, Le
from torch import Tensor


class NoiseSchedule(Protocol):
    """Signal and noise over time.

    Must   monotone   the ratio grows with t
           inverse    ``time(ratio(t)) == t``
           slopes     ``d_alpha`` and ``d_sigma`` are the derivatives
    """

    package: ClassVar[str] = "atoll.diffusion.schedules"

    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def d_alpha(self, t: Tensor) -> Tensor: ...
    def d_sigma(self, t: Tensor) -> Tensor: ...

    def time(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha is ``ratio``."""
        ...

    def ratio(self, t: Tensor) -> Tensor:
        return self.sigma(t) / self.alpha(t)


@dataclass(frozen=True)
class EDM(NoiseSchedule):
    """Variance exploding: ``x_t = x0 + t eps`` (Karras et al., 2022, arXiv 2206.00364)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time(self, ratio: Tensor) -> Tensor:
        return ratio


@dataclass(frozen=True)
class RF(NoiseSchedule):
    """Rectified flow: ``x_t = (1 - t) x0 + t eps`` (Liu et al., 2022, arXiv 2209.03003). Its ratio is infinite at 1, so
    times stop at ``1 - 1e-5``."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time(self, ratio: Tensor) -> Tensor:
        return (ratio / (1 + ratio)).clamp(max=1 - 1e-5)


@dataclass(frozen=True)
class Trig(NoiseSchedule):
    """TrigFlow: ``x_t = cos(t) x0 + sin(t) sigma_data eps`` (Lu and Song, 2024, arXiv 2410.11081).

    Args:
        sigma_data: standard deviation of the data.
    """

    sigma_data: Annotated[float, Gt(0)] = 0.5

    def alpha(self, t: Tensor) -> Tensor:
        return t.cos()

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * t.sin()

    def d_alpha(self, t: Tensor) -> Tensor:
        return -t.sin()

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * t.cos()

    def time(self, ratio: Tensor) -> Tensor:
        return (ratio / self.sigma_data).atan()


@dataclass(frozen=True)
class VP(NoiseSchedule):
    """Variance preserving with a linear rate, t in (0, 1] (Song et al., 2021, arXiv 2011.13456).

    Args:
        beta_min, beta_max: rates at 0 and 1.
    """

    beta_min: Annotated[float, Gt(0)] = 0.1
    beta_max: Annotated[float, Gt(0)] = 20.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * self._beta(t) * self.alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return 0.5 * self._beta(t) * self.alpha(t) ** 2 / self.sigma(t)

    def time(self, ratio: Tensor) -> Tensor:
        grown = 2 * torch.log1p(ratio**2)  # rise t^2 + 2 beta_min t, solved without a difference of near equals
        return grown / ((self.beta_min**2 + (self.beta_max - self.beta_min) * grown).sqrt() + self.beta_min)


def shaped(t: Tensor, like: Tensor) -> Tensor:
    """``t`` with trailing dimensions of size 1, so that it multiplies a batch."""
    return t.reshape(t.shape + (1,) * (like.dim() - t.dim())) if t.dim() else t


def add_noise(schedule: NoiseSchedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """``alpha(t) x0 + sigma(t) eps``."""
    return shaped(schedule.alpha(t), x0) * x0 + shaped(schedule.sigma(t), x0) * eps


def step_between(schedule: NoiseSchedule, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """``(a, b)`` of the Markov kernel ``x_t = a x_s + b eps`` for s <= t: a alpha_s = alpha_t and
    a^2 sigma_s^2 + b^2 = sigma_t^2."""
    a = schedule.alpha(t) / schedule.alpha(s)
    return a, (schedule.sigma(t) ** 2 - (a * schedule.sigma(s)) ** 2).clamp(min=0).sqrt()


def renoise(schedule: NoiseSchedule, x_s: Tensor, s: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """A sample at the noisier time t, from one at s: its law is that of :func:`add_noise` at t."""
    a, b = step_between(schedule, s, t)
    return shaped(a, x_s) * x_s + shaped(b, x_s) * eps


# ------------------------------------------------------------------------------------------- predictions

KINDS = ("x0", "eps", "v", "flow")
"""What a network may predict: the clean sample, the noise, ``v = alpha eps - sigma x0``, or the velocity
``dx_t/dt``."""


def _parts(schedule: NoiseSchedule, kind: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """``(p, q)`` with prediction = p x0 + q eps."""
    if kind == "x0":
        return torch.ones_like(t), torch.zeros_like(t)
    if kind == "eps":
        return torch.zeros_like(t), torch.ones_like(t)
    if kind == "v":
        return -schedule.sigma(t), schedule.alpha(t)
    if kind == "flow":
        return schedule.d_alpha(t), schedule.d_sigma(t)
    raise ValueError(f"a prediction is one of {', '.join(KINDS)}, not {kind!r}")


def convert(schedule: NoiseSchedule, value: Tensor, frm: str, to: str, x_t: Tensor, t: Tensor) -> Tensor:
    """A prediction at ``x_t`` in other words, e.g. from ``"flow"`` to ``"x0"``. Where the two say different things (an
    ``x0`` at t = 0 does not tell ``eps``), the result is not finite."""
    if frm == to:
        return value
    a, s = schedule.alpha(t), schedule.sigma(t)
    (p, q), (u, w) = _parts(schedule, frm, t), _parts(schedule, to, t)
    # value = p x0 + q eps and x_t = a x0 + s eps, so u x0 + w eps = m value + n x_t with the following m and n.
    det = p * s - q * a
    m, n = (u * s - w * a) / det, (w * p - u * q) / det
    return shaped(m, x_t) * value + shaped(n, x_t) * x_t


# ------------------------------------------------------------------------------------------- where training looks


class TimeLaw(Protocol):
    """Which noise levels a loss sees, as *ratios* sigma / alpha, so that a law suits every schedule."""

    package: ClassVar[str] = "atoll.diffusion.schedules"

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` ratios on the generator's device."""
        ...


@dataclass(frozen=True)
class LogNormal(TimeLaw):
    """``ln ratio ~ N(mean, std^2)``: what EDM trains with.

    Args:
        mean, std: of the ratio's logarithm.
    """

    mean: float = -1.2
    std: Annotated[float, Gt(0)] = 1.2

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return (_normal(n, generator) * self.std + self.mean).exp()


@dataclass(frozen=True)
class LogitNormal(TimeLaw):
    """Rectified-flow time ``t = logistic(N(mean, std^2))`` (Esser et al., 2024, arXiv 2403.03206).

    Args:
        mean, std: of the time's logit.
    """

    mean: float = 0.0
    std: Annotated[float, Gt(0)] = 1.0

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return (_normal(n, generator) * self.std + self.mean).exp()  # logit(t) = ln(t / (1 - t)) = ln ratio


@dataclass(frozen=True)
class UniformTime(TimeLaw):
    """Rectified-flow time uniform in ``(low, high)``.

    Args:
        low, high: bounds, within 0 and 1.
    """

    low: float = 0.0
    high: float = 1 - 1e-5

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        t = self.low + (self.high - self.low) * _uniform(n, generator)
        return t / (1 - t)


@dataclass(frozen=True)
class UShaped(TimeLaw):
    """Rectified-flow time with density proportional to ``e^(a t) + e^(a (1 - t))``: both ends more often than the
    middle (Lee et al., 2024, arXiv 2405.20320). With ``e^(-a t)`` for the second term it would only rise.

    Args:
        a: how deep the U is.
        edge: times keep this far from 0 and 1, where a velocity or a ratio is not finite.
    """

    a: Annotated[float, Gt(0)] = 4.0
    edge: Annotated[float, Gt(0)] = 1e-5

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        rising = torch.log1p(_uniform(n, generator) * math.expm1(self.a)) / self.a
        t = torch.where(_uniform(n, generator) < 0.5, rising, 1 - rising).clamp(self.edge, 1 - self.edge)
        return t / (1 - t)


@dataclass(frozen=True)
class KarrasIndex(TimeLaw):
    """Uniform in the index of Karras's grid, up to its noisiest part: what SiD draws.

    SiD leaves out the noisiest fifth (its t_max of 800 in 1000), where nothing of a sample can be seen; at the clean
    end the details are decided.

    Args:
        low, high: ratios at the ends of the grid.
        rho: how strongly the grid is bent towards low noise.
        most: fraction of the grid, from its clean end, that is drawn.
    """

    low: Annotated[float, Gt(0)] = 0.02
    high: Annotated[float, Gt(0)] = 40.0
    rho: Annotated[float, Gt(0)] = 7.0
    most: Annotated[float, Gt(0), Le(1)] = 0.8

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        u = self.most * _uniform(n, generator)
        a, b = self.low ** (1 / self.rho), self.high ** (1 / self.rho)
        out: Tensor = (a + u * (b - a)) ** self.rho
        return out


def _normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator, device=generator.device)


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device)


# ------------------------------------------------------------------------------------------- where sampling stops


def karras_grid(steps: int, low: float = 0.02, high: float = 40.0, rho: float = 7.0) -> Tensor:
    """``steps + 1`` falling ratios, from ``high`` to 0, float64.

    Karras's grid ends at ``low`` and then at 0. With three steps or fewer that spends most calls at almost no noise, so
    there the grid divides the way down to 0 itself.
    """
    a, b = high ** (1 / rho), low ** (1 / rho)
    if steps <= 3:
        i = torch.arange(steps + 1, dtype=torch.float64) / steps
    else:
        i = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    grid: Tensor = (a + i * (b - a)) ** rho
    if steps <= 3:
        grid[-1] = 0.0
        return grid
    return torch.cat([grid, grid.new_zeros(1)])


def flow_grid(steps: int, shift: float = 1.0, high: float = 1 - 1e-5) -> Tensor:
    """``steps + 1`` falling ratios at equal rectified-flow times, moved towards noise by ``shift`` (t -> shift t /
    (1 + (shift - 1) t)), float64."""
    t = high * (1 - torch.arange(steps + 1, dtype=torch.float64) / steps)
    t = shift * t / (1 + (shift - 1) * t)
    return t / (1 - t.clamp(max=1 - 1e-5))


def as_times(schedule: NoiseSchedule, ratios: Any, like: Tensor) -> Tensor:
    """Ratios as float32 times of a schedule, on a tensor's device."""
    times: Tensor = schedule.time(torch.as_tensor(ratios, dtype=torch.float64))
    return times.to(like.device, torch.float32)
