"""Parts of a graph with few edges between them.

Recursive spectral bisection (Pothen, Simon, Liou, "Partitioning Sparse Matrices with Eigenvectors of Graphs", SIAM
J. Matrix Anal. Appl. 1990).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from atoll.core.errors import DataError
from atoll.data.dataset import Dataset
from atoll.data.graph import DENSE, edges_between, spectrum
from atoll.data.partition import Partitioner, Rows


@dataclass(frozen=True)
class Communities(Partitioner):
    """Each site has nodes that are linked with each other more than with others, as many as the other sites.

    The graph is cut in two along the eigenvector of its second smallest eigenvalue, and the halves again, until there
    is a part for each site. Other partitioners give sites subgraphs too; under ``iid`` most edges are lost.
    """

    def assign(self, data: Dataset, sites: int, seed: int) -> list[Rows]:
        if "neighbours" not in data.columns:
            raise DataError(
                f"Partitioner `communities` cuts a graph, and `{data.info.name}` has no edges; use `clusters`."
            )
        return [np.sort(rows) for rows in self._cut(data, np.arange(len(data)), sites)]

    def _cut(self, data: Dataset, rows: Rows, sites: int) -> list[Rows]:
        if sites == 1:
            return [rows]
        some = data.select(torch.from_numpy(rows))
        edges = edges_between(some.column("node"), some.column("neighbours"))
        _, vectors = spectrum(edges, len(rows), None if len(rows) <= DENSE else 6)
        degree = torch.bincount(edges[0], minlength=len(rows)).clamp(min=1)
        along = (vectors[:, min(1, vectors.shape[1] - 1)] / degree.sqrt()).numpy()
        order = rows[np.argsort(along, kind="stable")]
        first = sites // 2
        cut = round(len(rows) * first / sites)
        return [*self._cut(data, order[:cut], first), *self._cut(data, order[cut:], sites - first)]
