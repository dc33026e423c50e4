"""A network that makes the weights of others: one embedding per site in, one vector of weights per site out.

Shamsian, Navon, Fetaya, Chechik, "Personalized Federated Learning using Hypernetworks", ICML 2021, arXiv 2103.04628.

Shapes: N sites, E = 1 + N // 4 numbers in an embedding, H hidden units, R rank, T weights of a generated network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from atoll.core.tree import Tree


def start(sites: int, size: int, hidden: int, rank: int, generator: torch.Generator) -> Tree:
    """phi: all sites alike, and an output of zero, so that the first weights are those that the network was built with.

    A last layer from H units to T weights would have H x T numbers; its rank is R, which leaves (R + 1) T.
    """
    e = 1 + sites // 4

    def uniform(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns).uniform_(-1, 1, generator=generator) / math.sqrt(columns)

    return {
        "embedding": uniform(1, e).repeat(sites, 1),
        "hidden": uniform(hidden, e), "hidden_bias": torch.zeros(hidden),
        "mix": uniform(rank, hidden),
        "basis": torch.zeros(rank, size), "offset": torch.zeros(size),
    }  # fmt: skip


def generate(phi: Tree, sites: Sequence[int] | Tensor) -> Tensor:
    """What is added to the common weights for each of the k sites: ``[k, T]``."""
    units = (phi["embedding"][sites] @ phi["hidden"].T + phi["hidden_bias"]).relu()
    out: Tensor = phi["offset"] + units @ phi["mix"].T @ phi["basis"]
    return out


def pull(phi: Tree, sites: Sequence[int], error: Tensor) -> Tree:
    """(d theta / d phi)^T error: the gradient of sum_i <theta_i(phi), error_i>, ``error`` ``[k, T]`` being constant."""
    leaves = {n: t.detach().requires_grad_() for n, t in phi.items()}
    grads = torch.autograd.grad(generate(leaves, sites), list(leaves.values()), grad_outputs=error)
    return dict(zip(leaves, grads, strict=True))
