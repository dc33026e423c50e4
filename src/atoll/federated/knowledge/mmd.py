"""How far apart two clouds of points are (Gretton et al., "A Kernel Two-Sample Test", JMLR 2012)."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the Gaussian kernels, relative to the mean squared distance of all pairs."""


def mmd(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """Squared maximum mean discrepancy, from 0 to 2: mean k(x, x') - 2 mean k(x, y) + mean k(y, y').

    The kernel is the mean of Gaussians of several widths, which follow the points and are constants. Pairs of a point
    with itself count (the biased estimate), so it is never negative.
    """
    points = torch.cat([x_ND, y_MD])
    squared = (points[:, None] - points[None]).square().sum(2)
    width = squared.detach().mean().clamp(min=1e-12)
    kernel = torch.stack([(-squared / (w * width)).exp() for w in WIDTHS]).mean(0)
    n = len(x_ND)
    return kernel[:n, :n].mean() - 2 * kernel[:n, n:].mean() + kernel[n:, n:].mean()
