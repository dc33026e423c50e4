"""A small U-Net that sees noisy images, a time and a class.

Images are folded (pixel unshuffle) so that most work happens at half the side; there are two widths, and time and class
modulate every block's normalisation (Karras et al., 2022, arXiv 2206.00364; Perez et al., 2018, arXiv 1709.07871).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from atoll.core.errors import DataError
from atoll.data.dataset import Info
from atoll.models.model import ModelBuilder, expect_shape


class TimeAndClass(nn.Module):
    """One vector ``[B, D]`` from a time ``[B]``, a class ``[B]`` (``classes`` itself is the null class) and, where
    asked for, further numbers ``[B, n]``, whose part starts at zero."""

    def __init__(self, dim: int, classes: int, numbers: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2.0 ** torch.linspace(-2, 4, dim // 2), persistent=False)
        self.time = nn.Linear(dim, dim)
        self.label = nn.Embedding(classes + 1, dim)
        self.mix = nn.Linear(dim, dim)
        self.numbers = nn.Sequential(nn.Linear(dim * numbers, dim), nn.SiLU(), nn.Linear(dim, dim)) if numbers else None
        if self.numbers is not None:
            for p in self.numbers[-1].parameters():
                nn.init.zeros_(p)

    def waves(self, t: Tensor) -> Tensor:
        angles = t.float()[..., None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)

    def forward(self, t: Tensor, label: Tensor, numbers: Tensor | None = None) -> Tensor:
        h = self.time(self.waves(t).to(self.time.weight.dtype)) + self.label(label)
        if numbers is not None and self.numbers is not None:
            h = h + self.numbers(self.waves(numbers).flatten(1).to(h.dtype))
        out: Tensor = F.silu(self.mix(F.silu(h)))
        return out


class ResBlock(nn.Module):
    """norm, SiLU, conv, modulated norm, SiLU, conv (which starts at zero), beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(math.gcd(inputs, 8), inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(math.gcd(outputs, 8), outputs)
        self.film = nn.Linear(dim, 2 * outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.short = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(e)[:, :, None, None].chunk(2, 1)
        out: Tensor = self.short(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return out


class UNetNet(nn.Module):
    """``(x [B, C, H, W], time [B], class [B]) -> [B, C, H, W]``. ``middle`` is the bottleneck."""

    taps = ("middle",)

    def __init__(
        self, shape: tuple[int, ...], width: int, fold: int, blocks: int, classes: int, numbers: int
    ) -> None:  # fmt: skip
        super().__init__()
        channels, wide, dim = shape[0] * fold**2, 2 * width, 4 * width
        self.fold = fold
        self.embed = TimeAndClass(dim, classes, numbers)
        self.inward = nn.Conv2d(channels, width, 3, padding=1)
        self.down1 = nn.ModuleList(ResBlock(width, width, dim) for _ in range(blocks))
        self.shrink = nn.Conv2d(width, wide, 3, stride=2, padding=1)
        self.down2 = nn.ModuleList(ResBlock(wide, wide, dim) for _ in range(blocks))
        self.middle = ResBlock(wide, wide, dim)
        self.up2 = nn.ModuleList(ResBlock(2 * wide if i == 0 else wide, wide, dim) for i in range(blocks))
        self.enlarge = nn.Conv2d(wide, width, 3, padding=1)
        self.up1 = nn.ModuleList(ResBlock(2 * width if i == 0 else width, width, dim) for i in range(blocks))
        self.norm = nn.GroupNorm(math.gcd(width, 8), width)
        self.outward = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, label: Tensor, numbers: Tensor | None = None) -> Tensor:
        e = self.embed(t, label, numbers)
        h = self.inward(F.pixel_unshuffle(x, self.fold) if self.fold > 1 else x)
        for block in self.down1:
            h = block(h, e)
        high = h
        h = self.shrink(h)
        for block in self.down2:
            h = block(h, e)
        h = torch.cat([self.middle(h, e), h], 1)
        for block in self.up2:
            h = block(h, e)
        h = torch.cat([self.enlarge(F.interpolate(h, size=high.shape[-2:])), high], 1)
        for block in self.up1:
            h = block(h, e)
        out = self.outward(F.silu(self.norm(h)))
        return F.pixel_shuffle(out, self.fold) if self.fold > 1 else out


@dataclass(frozen=True)
class UNet(ModelBuilder):
    """A small U-Net for denoising images.

    Args:
        width: channels at the finer of its two resolutions; the coarser one has twice as many.
        fold: side of the pixel blocks that become channels; divides height and width.
        blocks: residual blocks at each resolution, on the way down and on the way up.
        numbers: further numbers that the network is told, such as a second time.
    """

    width: Annotated[int, Ge(4)] = 32
    fold: Annotated[int, Ge(1)] = 2
    blocks: Annotated[int, Ge(1)] = 1
    numbers: Annotated[int, Ge(0)] = 0
    denoises: ClassVar[bool] = True

    def build(self, info: Info, outputs: int) -> nn.Module:
        shape = expect_shape(info, 3, "unet", "images (channels x height x width)")
        if shape[1] % self.fold or shape[2] % self.fold or min(shape[1:]) < 2 * self.fold:
            raise DataError(
                f"unet folds blocks of {self.fold} x {self.fold} pixels and halves what is left; `{info.name}` has "
                f"{shape[1]} x {shape[2]} pixels. Choose another `fold`."
            )
        return UNetNet(shape, self.width, self.fold, self.blocks, outputs, self.numbers)
