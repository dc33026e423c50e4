"""A small decoder-only transformer.

Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762, with normalisation before each block and
the initialisation of Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019.
Root mean square normalisation: Zhang, Sennrich, 2019, arXiv 1910.07467. Tied embeddings: Press, Wolf, 2016,
arXiv 1608.05859.

Shapes: B rows, T tokens, D = dim, H heads, V vocabulary.
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
from atoll.models.transformer import NORMS, Block, Norm


class LMNet(nn.Module):
    """Token ids ``[B, T]`` -> logits ``[B, T, V]``; ``T`` is at most ``length``."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        dim: int,
        layers: int,
        heads: int,
        dropout: float,
        norm: Norm,
        tied: bool,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(length, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout, norm, causal=True) for _ in range(layers))
        self.norm = NORMS[norm](dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # what adds to the residual stream starts smaller, by the number of additions
                into = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if into else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        where = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        x = self.dropout(self.embed(ids_BT) + self.position(where))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


@dataclass(frozen=True)
class LM(ModelBuilder):
    """A language model over ``info.num_classes`` tokens and rows of ``info.shape[0]`` of them.

    Args:
        dim: width of the residual stream; a multiple of ``heads``.
        layers: transformer blocks.
        heads: attention heads per block.
        dropout: probability of dropping an entry, in attention and in the residual stream.
        norm: ``"rms"`` or ``"layer"``.
        tied: the output layer uses the token embedding's weights.
    """

    dim: Annotated[int, Ge(1)] = 128
    layers: Annotated[int, Ge(1)] = 4
    heads: Annotated[int, Ge(1)] = 4
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    norm: Norm = "rms"
    tied: bool = True

    def build(self, info: Info, outputs: int) -> nn.Module:
        (length,) = expect_shape(info, 1, "lm", "rows of token ids")
        if info.kind != "text":
            raise DataError(f"lm reads token ids; `{info.name}` is of kind `{info.kind}`. Choose another model.")
        if self.dim % self.heads:
            raise DataError(f"lm needs `dim` to be a multiple of `heads`; got {self.dim} and {self.heads}.")
        return LMNet(outputs, length, self.dim, self.layers, self.heads, self.dropout, self.norm, self.tied)
