"""Graphs as rows: a row is a node and names its neighbours, so that any selection of rows is an induced subgraph.

Columns of a data set of kind ``"graph"``, besides ``x`` (features ``[N, F]``) and ``y`` (classes, -1 where there is no
label or it is not to be seen): ``node``, a number that names the row, and ``neighbours`` ``[N, D]``, the numbers of the
nodes that it has an edge with, in ascending order, -1 after the last. Edges have no direction, and no node has one with
itself. An edge to a node that is not among the rows is not there: a site sees its own subgraph.

The three parts of a site's data hold all of its nodes and different labels, as a site that wants to know about some
of its nodes can look at all of them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.core.errors import DataError
from atoll.data.dataset import Dataset

Ints = NDArray[np.int64]
DENSE = 2000
"""Nodes up to which all eigenpairs are computed: 32 MB, and about a second."""
MOST_NEIGHBOURS = 1 << 27
"""Entries of the column ``neighbours``: 1 GB."""


def neighbour_columns(ends: Ints, nodes: int, name: str, first: int = 0) -> dict[str, Tensor]:
    """Columns ``node`` and ``neighbours`` from a list of edges.

    Args:
        ends: ``[E, 2]`` positions of the two nodes of each edge, 0 to nodes - 1, in any direction and order; loops and
            repetitions are left out.
        name: of the data, for errors.
        first: number of the first node.
    """
    a, b = ends.min(1, initial=nodes), ends.max(1, initial=-1)
    once = np.unique((a * nodes + b)[a != b])
    a, b = once // nodes, once % nodes
    source, target = np.concatenate([a, b]), np.concatenate([b, a])
    order = np.lexsort((target, source))
    source, target = source[order], target[order]
    degree = np.bincount(source, minlength=nodes)
    widest = int(degree.max(initial=0))
    if nodes * widest > MOST_NEIGHBOURS:
        raise DataError(
            f"A node of `{name}` has {widest:,} neighbours, too many for a graph of {nodes:,} nodes: rows are as wide "
            "as the widest. Drop some edges of such nodes."
        )
    neighbours = np.full((nodes, widest), -1, dtype=np.int64)
    starts = np.cumsum(degree) - degree
    neighbours[source, np.arange(len(source)) - starts[source]] = target + first
    return {"node": torch.arange(first, first + nodes), "neighbours": torch.from_numpy(neighbours)}


def edges_between(node_N: Tensor, neighbours_ND: Tensor) -> Tensor:
    """The edges among some rows, each in both directions, as positions within them: int64 ``[2, E]``.

    This is what PyTorch Geometric calls ``edge_index``.
    """
    if not neighbours_ND.numel():
        return torch.zeros(2, 0, dtype=torch.int64, device=node_N.device)
    known, order = node_N.sort()
    at = torch.searchsorted(known, neighbours_ND).clamp(max=len(known) - 1)
    row, place = torch.nonzero(known[at] == neighbours_ND, as_tuple=True)
    return torch.stack([row, order[at[row, place]]])


def with_labels_of(data: Dataset, rows: Ints, seen: Ints) -> Dataset:
    """The given rows of a graph, with labels for those in ``seen`` alone; no row at all when that is empty."""
    some = data.select(torch.from_numpy(rows if len(seen) else seen))
    if "y" not in data.columns:
        return some
    y = torch.full_like(data.columns["y"], -1)
    where = data.select(torch.from_numpy(seen)).rows
    y[where] = data.columns["y"][where]
    return Dataset({**some.columns, "y": y}, some.info, some.rows)


def laplacian(edges: Tensor, nodes: int) -> Tensor:
    """I - D^-1/2 A D^-1/2, float64 ``[N, N]``; the row of a node without neighbours is that of I."""
    adjacency = torch.zeros(nodes, nodes, dtype=torch.float64)
    adjacency[edges[0], edges[1]] = 1.0
    root = adjacency.sum(1).clamp(min=1.0).rsqrt()
    return torch.eye(nodes, dtype=torch.float64) - root[:, None] * adjacency * root


def spectrum(edges: Tensor, nodes: int, pairs: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[K]``, 0 to 2 in ascending order, and eigenvectors ``[N, K]`` of the Laplacian; float32, read only.

    The last 64 graphs that were asked for are remembered, so a site works its own out once.

    Args:
        edges: as :func:`edges_between` gives them.
        pairs: keep so many, half of them the smallest and half the largest; None: all.

    Raises:
        DataError: all pairs of more than :data:`DENSE` nodes.
    """
    if pairs is None and nodes > DENSE:
        raise DataError(
            f"All eigenpairs of a graph of {nodes:,} nodes take too long; give `pairs` (e.g. 256), the number to keep, "
            f"or let sites have at most {DENSE:,} nodes."
        )
    values, vectors = _spectrum(edges.cpu().numpy().tobytes(), nodes, None if pairs is None else min(pairs, nodes))
    return values.to(edges.device), vectors.to(edges.device)


@lru_cache(maxsize=64)
def _spectrum(edges: bytes, nodes: int, pairs: int | None) -> tuple[Tensor, Tensor]:
    ends = np.frombuffer(edges, dtype=np.int64).reshape(2, -1)
    if pairs is None or pairs >= nodes - 1 or nodes <= DENSE:
        values, vectors = torch.linalg.eigh(laplacian(torch.from_numpy(ends.copy()), nodes))
        if pairs is not None and pairs < nodes:
            low = pairs - pairs // 2
            kept = torch.cat([torch.arange(low), torch.arange(nodes - pairs // 2, nodes)])
            values, vectors = values[kept], vectors[:, kept]
        return values.float(), vectors.float().contiguous()
    return _extremes(ends, nodes, pairs)


def _extremes(ends: Ints, nodes: int, pairs: int) -> tuple[Tensor, Tensor]:
    """The outermost eigenpairs, without the dense matrix."""
    from scipy.sparse import coo_matrix, eye  # type: ignore[import-untyped]
    from scipy.sparse.linalg import eigsh  # type: ignore[import-untyped]
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    degree = np.bincount(ends[0], minlength=nodes).clip(1)
    weight = 1.0 / np.sqrt(degree[ends[0]] * degree[ends[1]])
    matrix = eye(nodes) - coo_matrix((weight, (ends[0], ends[1])), shape=(nodes, nodes))
    with threadpool_limits(1):  # the same bits whatever the machine is doing
        values, vectors = eigsh(matrix.tocsr(), k=pairs, which="BE", v0=np.cos(np.arange(nodes)))
    order = np.argsort(values)
    return torch.from_numpy(values[order]).float(), torch.from_numpy(vectors[:, order]).float().contiguous()
