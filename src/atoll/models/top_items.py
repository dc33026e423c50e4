"""A list of frequent items as a model: nothing in it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from atoll.data.dataset import Info
from atoll.models.model import ModelBuilder


class ItemList(nn.Module):
    """``items`` ``[k]``, most frequent first, -1 where there is none; ``counts`` ``[k]``, estimated."""

    items: Tensor
    counts: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self.register_buffer("items", torch.full((k,), -1, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(k, dtype=torch.float64))

    def forward(self, items: Tensor) -> Tensor:
        """The estimated count of each item ``[B]``; 0 for one that is not on the list."""
        out: Tensor = ((items[:, None] == self.items) * self.counts).sum(1)
        return out


@dataclass(frozen=True)
class TopItems(ModelBuilder):
    """The list that a search for heavy hitters fills.

    Args:
        k: its length.
    """

    k: Annotated[int, Ge(1)] = 10

    def build(self, info: Info, outputs: int) -> nn.Module:
        return ItemList(self.k)
