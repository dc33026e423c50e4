"""f-divergences as weights on scores.

With p the data's law, q the student's and rho = p / q, the divergence D_f(p || q) = E_q f(rho) changes along the noise
levels as -E_q[H(rho) |s_q - s_p|^2] (half the squared noise rate aside) with H(rho) = rho^2 f''(rho). So an integral of
weighted score differences is any f-divergence, and ``H`` is all that has to be known of f.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

Weight = Callable[[Tensor], Tensor]
"""``H``: rho ``[B]`` -> ``[B]``, twice differentiable, number by number."""
Divergence = Literal["reverse_kl", "forward_kl", "jeffreys", "pearson", "js"]

WEIGHTS: Mapping[str, Weight] = MappingProxyType(
    {
        "reverse_kl": torch.ones_like,  # KL(q || p), f = -ln rho
        "forward_kl": lambda rho: rho,  # KL(p || q), f = rho ln rho
        "jeffreys": lambda rho: 1 + rho,  # their sum
        "pearson": lambda rho: 2 * rho**2,  # f = (rho - 1)^2
        "js": lambda rho: rho / (2 * (1 + rho)),  # KL of both to their mean, averaged
    }
)


def slope(h: Weight) -> Weight:
    """The derivative of a function that works number by number."""

    def derivative(rho: Tensor) -> Tensor:
        with torch.enable_grad():
            rho = rho if rho.requires_grad else rho.detach().requires_grad_(True)
            value = h(rho)
            if not value.requires_grad:
                return torch.zeros_like(rho)
            return torch.autograd.grad(value.sum(), rho, create_graph=True)[0]

    return derivative


def weight_of(f: Weight) -> Weight:
    """H of a generator f that is not in the list: ``rho^2 f''(rho)``."""
    second = slope(slope(f))
    return lambda rho: rho**2 * second(rho)


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the two gradients, ``[B]`` each.

    Attributes:
        h: H(rho).
        c: C(rho) = H - rho H'.
        dh, dc: rho H' and rho C'.
    """

    h: Tensor
    c: Tensor
    dh: Tensor
    dc: Tensor


def weights(h: Weight, rho: Tensor) -> Weights:
    rho = rho.detach()
    value, first = h(rho), (rho * slope(h)(rho)).detach()
    second = (rho**2 * slope(slope(h))(rho)).detach()
    return Weights(value, value - first, first, -second)


@dataclass(frozen=True)
class FDivergence:
    """What losses of f-divergences have in common. For one that is not in the list, override ``h`` in a subclass
    (:func:`weight_of` makes one from f itself).

    Args:
        f: the divergence D_f(data || student): the reverse KL seeks modes, the forward KL covers them.
        clip: bounds of the density ratio, 1 / clip and clip.
    """

    f: Divergence = "forward_kl"
    clip: Annotated[float, Ge(1)] = 10.0

    @property
    def needs_ratio(self) -> bool:
        return self.f != "reverse_kl"

    def h(self, rho: Tensor) -> Tensor:
        return WEIGHTS[self.f](rho)

    def weight(self, rho: Tensor) -> Tensor:
        """H of the clipped ratio, which is finite."""
        return self.h(self.clipped(rho))

    def clipped(self, rho: Tensor) -> Tensor:
        return rho.clamp(1 / self.clip, self.clip)


class LevelMean(nn.Module):
    """The running mean of positive weights at every noise level. It lives in buffers, so it is saved with a run.

    Args:
        bins: intervals of equal width in the logarithm of sigma / alpha.
        low, high: where the first ends and the last begins.
        decay: of the mean, per look at an interval.
    """

    mean: Tensor
    looks: Tensor

    def __init__(self, bins: int = 20, low: float = 0.02, high: float = 40.0, decay: float = 0.95) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("edges", torch.logspace(0, 1, bins - 1, base=high / low) * low, persistent=False)
        self.register_buffer("mean", torch.ones(bins))
        self.register_buffer("looks", torch.zeros(bins))

    def forward(self, ratio: Tensor, weight: Tensor) -> Tensor:
        """Look at weights ``[B]`` at ratios ``[B]``; returns the mean of each one's level ``[B]``."""
        with torch.no_grad():
            which = torch.bucketize(ratio, self.edges)  # type: ignore[arg-type]
            count = torch.zeros_like(self.mean).index_add_(0, which, torch.ones_like(weight))
            new = torch.zeros_like(self.mean).index_add_(0, which, weight) / count.clamp(min=1)
            self.looks += count > 0
            share = torch.where(count > 0, (1 / self.looks.clamp(min=1)).clamp(min=1 - self.decay), 0.0)
            self.mean.lerp_(new, share)
            return self.mean[which].clamp(min=1e-6)
