"""The fine structure of images: what is left without low frequencies, and edges."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def high_pass(x: Tensor, cut: float = 0.25) -> Tensor:
    """``x`` ``[..., H, W]`` without the frequencies below ``cut`` of Nyquist's (their radius, so a disc is removed)."""
    high, wide = x.shape[-2:]
    rows = torch.fft.fftfreq(high, device=x.device)[:, None]
    columns = torch.fft.rfftfreq(wide, device=x.device)[None]
    keep = (rows.square() + columns.square()).sqrt() >= 0.5 * cut
    out: Tensor = torch.fft.irfft2(torch.fft.rfft2(x.float()) * keep, s=(high, wide))
    return out


def sobel(x: Tensor) -> Tensor:
    """Size of the gradient at every pixel of ``[B, C, H, W]``; images continue at the opposite edge, as they do for a
    Fourier transform."""
    smooth, slope = x.new_tensor([1.0, 2.0, 1.0]), x.new_tensor([-1.0, 0.0, 1.0])
    kernels = torch.stack([torch.outer(smooth, slope), torch.outer(slope, smooth)])[:, None] / 8
    flat = F.pad(x.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="circular")
    g = F.conv2d(flat, kernels)
    return (g.square().sum(1) + 1e-12).sqrt().view(x.shape)


def high_frequency_loss(x: Tensor, y: Tensor, cut: float = 0.25) -> Tensor:
    """L1 distance of the high-pass parts and of their edges, per sample ``[B]`` and averaged over numbers. Whatever low
    frequencies are added to either image, it stays: edges are taken of what the filter leaves."""
    x, y = high_pass(x, cut), high_pass(y, cut)
    fine, edges = (x - y).abs(), (sobel(x) - sobel(y)).abs()
    return (fine + edges).flatten(1).mean(1)


def energy_ratio(x: Tensor, y: Tensor, cut: float = 0.25) -> float:
    """Energy above ``cut`` in images ``x``, as a multiple of that in images ``y``; 1 when ``x`` is as sharp."""
    return float(high_pass(x, cut).square().mean() / high_pass(y, cut).square().mean())
