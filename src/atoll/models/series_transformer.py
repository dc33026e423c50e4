"""A small transformer encoder over the times of a window.

Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762. Shapes: B windows, C channels, T times, D = dim.
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


class SeriesTransformerNet(nn.Module):
    """Windows ``[B, C, T]`` -> ``[B, outputs]``: a token per time, and a linear head on the last one."""

    def __init__(
        self, channels: int, length: int, dim: int, layers: int, heads: int, dropout: float, outputs: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, dim)
        self.position = nn.Parameter(0.02 * torch.randn(length, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout, "layer", causal=False, bias=True) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, outputs)

    def features(self, x: Tensor) -> Tensor:
        """The token of the last time after the last norm, ``[B, D]``: what the head sees."""
        tokens = self.dropout(self.embed(x.transpose(1, 2)) + self.position)
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.norm(tokens[:, -1])
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


@dataclass(frozen=True)
class SeriesTransformer(ModelBuilder):
    """A transformer encoder for windows of series. The linear model to compare it with is ``logistic``.

    Args:
        dim: width of the residual stream; a multiple of ``heads``.
        layers: transformer blocks.
        heads: attention heads per block.
        dropout: probability of dropping an entry, in attention and in the residual stream.
    """

    dim: Annotated[int, Ge(1)] = 32
    layers: Annotated[int, Ge(1)] = 2
    heads: Annotated[int, Ge(1)] = 4
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0

    def build(self, info: Info, outputs: int) -> nn.Module:
        channels, length = expect_shape(info, 2, "series_transformer", "windows of a series (channels x times)")
        if self.dim % self.heads:
            raise DataError(
                f"series_transformer needs `dim` to be a multiple of `heads`; got {self.dim} and {self.heads}."
            )
        return SeriesTransformerNet(channels, length, self.dim, self.layers, self.heads, self.dropout, outputs)
