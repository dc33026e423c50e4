"""A graph convolutional network (Kipf and Welling, ICLR 2017, arXiv 1609.02907)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn

from atoll.core.errors import DataError
from atoll.data.dataset import Info
from atoll.models.model import ModelBuilder, expect_shape


def mean_over_neighbours(h: Tensor, edges: Tensor) -> Tensor:
    """D^-1/2 (A + I) D^-1/2 h, where D counts a node's neighbours and itself.

    Args:
        h: ``[N, F]``.
        edges: ``[2, E]``, each edge in both directions.
    """
    degree = torch.bincount(edges[0], minlength=len(h)) + 1
    root = degree.to(h.dtype).rsqrt()[:, None]
    scaled = root * h
    return root * scaled.index_add(0, edges[0], scaled[edges[1]])


class GCNNet(nn.Module):
    """Linear layers, each followed by the mean over neighbours, with ReLU and dropout between."""

    def __init__(self, sizes: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.dropout = dropout

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = mean_over_neighbours(layer(x), edges).relu()
            x = F.dropout(x, self.dropout, self.training)
        return mean_over_neighbours(self.layers[-1](x), edges)


@dataclass(frozen=True)
class GCN(ModelBuilder):
    """Each layer mixes a node with its neighbours: strong where neighbours are alike.

    Args:
        hidden: widths of the hidden layers; one of them is the paper's network.
        dropout: of hidden units, in training.
    """

    hidden: tuple[Annotated[int, Ge(1)], ...] = (32,)
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.5

    def build(self, info: Info, outputs: int) -> nn.Module:
        if info.kind != "graph":
            raise DataError(f"gcn reads the edges of a graph, and `{info.name}` has none. Choose another model.")
        (features,) = expect_shape(info, 1, "gcn", "a list of features for each node")
        return GCNNet((features, *self.hidden, outputs), self.dropout)
