"""The block that our transformers are made of.

Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762, with normalisation before each half.
Shapes: B rows, T tokens, D = dim.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["rms", "layer"]
NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


class Attention(nn.Module):
    """Self-attention, causal or of all to all. Four separate projections, so that adapters can target them by name.

    There may be more keys and values than queries: what lengthens the outputs of ``k_proj`` and ``v_proj`` is a prefix.
    """

    def __init__(self, dim: int, heads: int, dropout: float, causal: bool, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        split = (self.heads, -1)
        q, k, v = (f(x_BTD).unflatten(-1, split).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, dim: int, heads: int, dropout: float, norm: Norm, causal: bool, bias: bool = False, widen: int = 4
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = NORMS[norm](dim), NORMS[norm](dim)
        self.attention = Attention(dim, heads, dropout, causal, bias)
        self.up_proj = nn.Linear(dim, widen * dim)
        self.down_proj = nn.Linear(widen * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        out: Tensor = x + self.dropout(self.down_proj(F.gelu(self.up_proj(self.norm2(x)))))
        return out
