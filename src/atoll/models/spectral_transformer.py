"""A spectral graph transformer whose layers are steps of an ordinary differential equation.

Gurumurthy et al., "Federated Spectral Graph Transformers Meet Neural Ordinary Differential Equations for Non-IID
Graphs", TMLR 2025, arXiv 2504.11808; the transformer over eigenvalues is that of Bo, Shi, Wang, Liao, "Specformer",
ICLR 2023, arXiv 2303.01028. The history of layers is that of Wang et al., arXiv 1906.01787.

Shapes   N nodes, F features, K eigenvalues, C outputs, H new spectra, d width of the transformer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn

from atoll.core.errors import AtollError, DataError
from atoll.data.dataset import Info
from atoll.data.graph import spectrum
from atoll.models.mlp import MLP
from atoll.models.model import ModelBuilder
from atoll.models.on_graph import reads_edges


@dataclass(frozen=True, kw_only=True)
class Spectral:
    """The transformer over eigenvalues, and what is done with the spectra that it makes.

    Args:
        dim: width of the transformer; even, and a multiple of ``heads``.
        heads: of the attention, and new spectra that are made.
        layers: of the transformer.
        order: of the Runge-Kutta step that a layer is: 2 or 4; 1 is an ordinary transformer.
        mixing: spectral layers after the encoder of the nodes.
        dropout: of the transformer, in training.
        feature_dropout: before and after the encoder of the nodes.
        mixing_dropout: of a spectral layer.
        pairs: eigenpairs that a site keeps, half the smallest and half the largest; None: all, up to 2,000 nodes.
    """

    dim: Annotated[int, Ge(2)] = 32
    heads: Annotated[int, Ge(1)] = 2
    layers: Annotated[int, Ge(1)] = 6
    order: Literal[1, 2, 4] = 2
    mixing: Annotated[int, Ge(1)] = 2
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.2
    feature_dropout: Annotated[float, Ge(0), Lt(1)] = 0.6
    mixing_dropout: Annotated[float, Ge(0), Lt(1)] = 0.2
    pairs: Annotated[int, Ge(2)] | None = None

    def __post_init__(self) -> None:
        if self.dim % 2 or self.dim % self.heads:
            raise AtollError(f"`dim` is even and a multiple of `heads`; got dim {self.dim}, heads {self.heads}.")


def encode_eigenvalues(e_K: Tensor, dim: int) -> Tensor:
    """[e, sin(100 e w), cos(100 e w)] with w_i = 10000^(-2 i / dim): ``[K]`` -> ``[K, dim + 1]``."""
    w = torch.exp(torch.arange(0, dim, 2, device=e_K.device) * (-math.log(10_000.0) / dim))
    phase = 100.0 * e_K[:, None] * w
    return torch.cat([e_K[:, None], phase.sin(), phase.cos()], 1)


def runge_kutta(f: Callable[[Tensor], Tensor], x: Tensor, order: int) -> Tensor:
    """x after one step of length 1 along dx/dt = f(x), by the method of Euler (1), Heun (2) or Kutta (4).

    The published code steps along a layer that already adds its input, which counts x twice; ``f`` here is the change
    alone.
    """
    k1 = f(x)
    if order == 1:
        return x + k1
    if order == 2:
        return x + (k1 + f(x + k1)) / 2
    k2 = f(x + k1 / 2)
    k3 = f(x + k2 / 2)
    return x + (k1 + 2 * k2 + 2 * k3 + f(x + k3)) / 6


def filtered(vectors_NK: Tensor, spectra_KH: Tensor, h_NC: Tensor) -> list[Tensor]:
    """U diag(lam) U^T h for each column lam of ``spectra_KH``; with the Laplacian's own eigenvalues, L h."""
    inside = vectors_NK.T @ h_NC
    return [vectors_NK @ (lam[:, None] * inside) for lam in spectra_KH.unbind(1)]


class Change(nn.Module):
    """What attention and a feed-forward network add to the eigenvalues' codes ``[K, d]``."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(0, 1) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        a = F.dropout(self.out(mixed), self.dropout, self.training)
        b = self.down(F.gelu(self.up(self.norm2(x + a))))
        return a + F.dropout(b, self.dropout, self.training)


class NewSpectra(nn.Module):
    """H new eigenvalues for each old one: ``[K]`` -> ``[K, H]``. A layer starts from a learned mix of all before it."""

    def __init__(self, knobs: Spectral) -> None:
        super().__init__()
        self.dim, self.order = knobs.dim, knobs.order
        self.embed = nn.Linear(knobs.dim + 1, knobs.dim)
        self.layers = nn.ModuleList(Change(knobs.dim, knobs.heads, knobs.dropout) for _ in range(knobs.layers))
        self.history = nn.ParameterList(torch.full((n + 1,), 1 / (n + 1)) for n in range(knobs.layers))
        self.decode = nn.Linear(knobs.dim, knobs.heads)

    def forward(self, e_K: Tensor) -> Tensor:
        seen = [self.embed(encode_eigenvalues(e_K, self.dim))]
        for change, weights in zip(self.layers, self.history, strict=True):
            start = torch.tensordot(weights, torch.stack(seen), 1)
            seen.append(runge_kutta(change, start, self.order))
        out: Tensor = self.decode(seen[-1])
        return out


class SpectralNet(nn.Module):
    """Nodes are encoded one by one, then mixed along the eigenvectors of their graph, with learned spectra.

    Args:
        encoder: takes a node's features to ``outputs`` numbers; one that reads edges may look at neighbours too.
    """

    def __init__(self, encoder: nn.Module, outputs: int, knobs: Spectral) -> None:
        super().__init__()
        self.encoder, self.knobs = encoder, knobs
        self.spectra = NewSpectra(knobs)
        self.weights = nn.ParameterList(torch.ones(knobs.heads + 1, outputs) for _ in range(knobs.mixing))

    def forward(self, x: Tensor, edges: Tensor | None = None) -> Tensor:
        if edges is None:
            raise DataError(
                "A spectral transformer needs the edges of a graph, and these rows have none. Use data that is a graph "
                "(`stochastic_blocks`, `graph_files`) with `task: node_classification`, or another method."
            )
        k = self.knobs
        values, vectors = spectrum(edges, len(x), k.pairs)
        spectra = self.spectra(values)
        x = F.dropout(x, k.feature_dropout, self.training)
        h: Any = self.encoder(x, edges) if reads_edges(self.encoder) else self.encoder(x)
        h = F.dropout(getattr(h, "logits", h), k.feature_dropout, self.training)
        for w in self.weights:
            basis = torch.stack([h, *filtered(vectors, spectra, h)], 1)
            h = (F.dropout(basis, k.mixing_dropout, self.training) * w).sum(1)
        out: Tensor = h
        return out


@dataclass(frozen=True)
class SpectralTransformer(ModelBuilder):
    """Another network as the encoder of nodes, and spectral layers after it.

    Args:
        network: from a node's features to the outputs.
        spectral: the transformer over eigenvalues.
    """

    network: ModelBuilder = field(default_factory=lambda: MLP(hidden=(32,)))
    spectral: Spectral = Spectral()

    def build(self, info: Info, outputs: int) -> nn.Module:
        return SpectralNet(self.network.build(info, outputs), outputs, self.spectral)
