"""A vision transformer of any size.

Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", ICLR 2021,
arXiv 2010.11929. Shapes: B images, T = 1 + number of patches, D = dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from atoll.core.errors import DataError
from atoll.data.dataset import Info
from atoll.models.model import ModelBuilder, expect_shape
from atoll.models.transformer import Block


class Embedding(nn.Module):
    """Images ``[B, C, H, W]`` -> tokens ``[B, T, D]``: the class token, then a token per patch, each with its place."""

    def __init__(self, shape: tuple[int, ...], patch: int, dim: int) -> None:
        super().__init__()
        depth, height, width = shape
        self.patch = nn.Conv2d(depth, dim, patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, 1 + (height // patch) * (width // patch), dim))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(len(x), -1, -1), patches], 1) + self.position


class ViTNet(nn.Module):
    """Images ``[B, C, H, W]`` -> logits ``[B, outputs]``: a linear head on the class token's feature."""

    def __init__(
        self, shape: tuple[int, ...], patch: int, dim: int, layers: int, heads: int, dropout: float, outputs: int
    ) -> None:
        super().__init__()
        self.embedding = Embedding(shape, patch, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout, "layer", causal=False, bias=True) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, outputs)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def features(self, x: Tensor) -> Tensor:
        """The class token after the last norm, ``[B, D]``: what the head sees."""
        tokens = self.embedding(x)
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.norm(tokens[:, 0])
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


@dataclass(frozen=True)
class ViT(ModelBuilder):
    """A vision transformer: patches become tokens, blocks mix them, the class token is classified.

    Trained from nothing it needs many images; ``pretrained`` trains one on data that the server has.

    Args:
        patch: side of a patch in pixels; divides height and width.
        dim: width of the residual stream; a multiple of ``heads``.
        layers: transformer blocks.
        heads: attention heads per block.
        dropout: probability of dropping an entry, in attention and in the residual stream.
    """

    patch: Annotated[int, Ge(1)] = 4
    dim: Annotated[int, Ge(1)] = 64
    layers: Annotated[int, Ge(1)] = 4
    heads: Annotated[int, Ge(1)] = 4
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0

    def build(self, info: Info, outputs: int) -> nn.Module:
        shape = expect_shape(info, 3, "vit", "images (channels x height x width)")
        if shape[1] % self.patch or shape[2] % self.patch:
            raise DataError(
                f"vit cuts images into patches of {self.patch} x {self.patch}, which `{info.name}` with "
                f"{shape[1]} x {shape[2]} pixels cannot be; choose a `patch` that divides both."
            )
        if self.dim % self.heads:
            raise DataError(f"vit needs `dim` to be a multiple of `heads`; got {self.dim} and {self.heads}.")
        return ViTNet(shape, self.patch, self.dim, self.layers, self.heads, self.dropout, outputs)
