"""A small diffusion transformer.

Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, arXiv 2212.09748: patches become tokens, and
time and class modulate every block through its norms' scale, shift and gate, which start at zero.
Shapes: B images, T patches, D = dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from atoll.core.errors import DataError
from atoll.data.dataset import Info
from atoll.models.model import ModelBuilder, expect_shape
from atoll.models.unet import TimeAndClass


class Attention(nn.Module):
    """Every token looks at every token."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D))
        return mixed


class DiTBlock(nn.Module):
    """Attention and a two-layer network, each behind a modulated norm and a gate."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.modulate = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        s1, b1, g1, s2, b2, g2 = self.modulate(e)[:, None].chunk(6, -1)
        x = x + g1 * self.attention(self.norm1(x) * (1 + s1) + b1)
        out: Tensor = x + g2 * self.down(F.gelu(self.up(self.norm2(x) * (1 + s2) + b2), approximate="tanh"))
        return out


class DiTNet(nn.Module):
    """``(x [B, C, H, W], time [B], class [B]) -> [B, C, H, W]``."""

    def __init__(
        self, shape: tuple[int, ...], patch: int, dim: int, layers: int, heads: int, classes: int, numbers: int
    ) -> None:
        super().__init__()
        self.patch, self.shape = patch, shape
        self.taps = (f"blocks.{layers // 2}",)
        tokens, pixels = (shape[1] // patch) * (shape[2] // patch), shape[0] * patch**2
        self.embed = TimeAndClass(dim, classes, numbers)
        self.inward = nn.Linear(pixels, dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.blocks = nn.ModuleList(DiTBlock(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulate = nn.Linear(dim, 2 * dim)
        self.outward = nn.Linear(dim, pixels)
        for layer in (self.modulate, self.outward):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, numbers: Tensor | None = None) -> Tensor:
        e = self.embed(t, label, numbers)
        h = self.inward(F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)) + self.position
        for block in self.blocks:
            h = block(h, e)
        scale, shift = self.modulate(e)[:, None].chunk(2, -1)
        out = self.outward(self.norm(h) * (1 + scale) + shift).transpose(1, 2)
        side = (self.shape[1] // self.patch, self.shape[2] // self.patch)
        return F.pixel_shuffle(out.unflatten(2, side), self.patch)


@dataclass(frozen=True)
class DiT(ModelBuilder):
    """A diffusion transformer of any size.

    Args:
        patch: side of a patch in pixels; divides height and width.
        dim: width of the residual stream; a multiple of ``heads``.
        layers: transformer blocks.
        heads: attention heads per block.
        numbers: further numbers that the network is told, such as a second time.
    """

    patch: Annotated[int, Ge(1)] = 4
    dim: Annotated[int, Ge(8)] = 96
    layers: Annotated[int, Ge(1)] = 4
    heads: Annotated[int, Ge(1)] = 4
    numbers: Annotated[int, Ge(0)] = 0
    denoises: ClassVar[bool] = True

    def build(self, info: Info, outputs: int) -> nn.Module:
        shape = expect_shape(info, 3, "dit", "images (channels x height x width)")
        if shape[1] % self.patch or shape[2] % self.patch:
            raise DataError(
                f"dit cuts images into patches of {self.patch} x {self.patch}, which `{info.name}` with "
                f"{shape[1]} x {shape[2]} pixels cannot be; choose a `patch` that divides both."
            )
        if self.dim % self.heads:
            raise DataError(f"dit needs `dim` to be a multiple of `heads`; got {self.dim} and {self.heads}.")
        return DiTNet(shape, self.patch, self.dim, self.layers, self.heads, outputs, self.numbers)
