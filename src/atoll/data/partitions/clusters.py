"""Skew without labels: clusters of embeddings take the place of classes (Borazjani et al., 2025, arXiv
2503.14553).

Assumes  all rows in one place: a device for simulations, not something that sites could do.
Departs  the authors embed by the layers of a centrally trained task model, and draw sites of prescribed
         cluster ratios with rejection; here the embedding is a PCA of the inputs unless a column or a
         subclass gives another, and each cluster is shared out in Dirichlet proportions, as `dirichlet` does
         with classes.
Shapes   N rows, D numbers each, k clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt
from numpy.typing import NDArray

from atoll.core.card import Card, Cite
from atoll.core.errors import DataError
from atoll.core.streams import key
from atoll.data.dataset import Dataset
from atoll.data.partition import Partitioner, Rows, dirichlet_split

CARD = Card(
    name="emb_het",
    area="partitioner",
    summary="skew for any task: clusters of embeddings shared out in Dirichlet proportions",
    cites=(
        Cite(
            authors="Kasra Borazjani, Payam Abdisarabshali, Naji Khosravan, Seyyedali Hosseinalipour",
            year=2025,
            title="Redefining non-IID Data in Federated Learning for Computer Vision Tasks: Migrating from "
            "Labels to Embeddings for Task-Specific Data Distributions",
            arxiv="2503.14553",
            venue="IEEE Transactions on Artificial Intelligence",
        ),
    ),
    suits=("sites differ in features", "no labels"),
)


@dataclass(frozen=True)
class Clusters(Partitioner):
    """k-means++ clusters of an embedding, each shared out in Dirichlet(alpha) proportions.

    Inputs are embedded by PCA; text by the square roots of its token frequencies, then PCA. For another
    embedding add it as a column (``data.with_column("embedding", values)``) or override :meth:`embed`.

    Args:
        k: clusters; ten in the paper.
        alpha: small is skewed, as in ``dirichlet``.
        column: a column of embeddings ``[N, D]`` to use instead.
        components: of the PCA.
        min_samples: rows that every site must have.
    """

    k: Annotated[int, Ge(2)] = 10
    alpha: Annotated[float, Gt(0)] = 0.5
    column: str | None = None
    components: Annotated[int, Ge(1)] = 32
    min_samples: Annotated[int, Ge(1)] = 10

    def embed(self, data: Dataset) -> NDArray[np.float32]:
        """``[N, D]`` numbers; rows with similar numbers belong together."""
        if self.column is not None:
            given = data.column(self.column)
            if given.ndim != 2:
                raise DataError(f"Column `{self.column}` has shape {tuple(given.shape)}; embeddings are [N, D].")
            return given.float().numpy()
        x = token_frequencies(data) if data.info.kind == "text" else data.ready()["x"].flatten(1).numpy()
        if min(x.shape) <= self.components:
            return np.asarray(x, dtype=np.float32)
        from sklearn.decomposition import PCA

        solver = "covariance_eigh" if x.shape[1] <= 1000 else "randomized"
        fitted = PCA(self.components, svd_solver=solver, random_state=0).fit_transform(x)
        return np.asarray(fitted, dtype=np.float32)

    def clusters(self, data: Dataset, seed: int) -> NDArray[np.int64]:
        """The cluster of each row, ``[N]``."""
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        if len(data) < self.k:
            raise DataError(f"{len(data):,} rows cannot form {self.k} clusters; lower `k`.")
        with threadpool_limits(1):  # sums in another order could move a row to another site
            means = KMeans(self.k, n_init=3, random_state=key(seed, "k-means") % 2**32)
            found: NDArray[Any] = means.fit_predict(self.embed(data))
        return found.astype(np.int64)

    def assign(self, data: Dataset, sites: int, seed: int) -> list[Rows]:
        groups = self.clusters(data, seed)
        return dirichlet_split(groups, sites, seed, alpha=self.alpha, min_samples=self.min_samples, who="clusters")


def token_frequencies(data: Dataset, buckets: int = 1024) -> NDArray[np.float32]:
    """Square roots of token frequencies ``[N, buckets]``: Euclidean distance is Hellinger's. Ids wrap."""
    size = min(buckets, data.info.num_classes or buckets)
    x = data.column("x").numpy().astype(np.int64) % size
    flat = x + size * np.arange(len(x))[:, None]
    counts = np.bincount(flat.ravel(), minlength=size * len(x)).reshape(len(x), size)
    return np.asarray(np.sqrt(counts / x.shape[1]), dtype=np.float32)
