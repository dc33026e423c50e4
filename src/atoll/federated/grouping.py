"""From signatures to groups of sites that are alike.

Shapes: N sites, F shares. Groups are named by their least site, so the order of sites changes nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from atoll.federated.signatures.signature import Shares

Ground = Literal["zero_one", "index"]


def earth_movers(p: Shares, ground: Ground) -> Shares:
    """Distances ``[N, N]`` between rows of ``[N, F]`` that sum to one.

    Args:
        ground: how far apart two features are: ``"zero_one"``, 1 for any two, or ``"index"``, by their places.
    """
    gap = p[:, None] - p[None]
    if ground == "index":
        gap = np.cumsum(gap, axis=2)
    far: Shares = np.abs(gap).sum(2)
    return far if ground == "index" else far / 2


def group(signatures: Mapping[int, Shares], ground: Ground = "zero_one", most: int | None = None) -> dict[int, int]:
    """The group of each site.

    Average linkage on earth mover's distances gives a tree of merges, which is cut into the number of groups with the
    lowest Davies-Bouldin index (1979) of the signatures, from 2 on, the fewer of equal ones. Sites with equal
    signatures are never parted, and fewer than three sites, or sites that are all alike, are one group.

    Args:
        signatures: by site, shares of equal length.
        most: groups, at most, and never more than N - 1; None: N / 2. With N - 1 allowed, the index nearly always
            chooses them, since a group of one has no scatter.
    """
    sites = sorted(signatures, key=lambda s: (signatures[s].tolist(), s))  # ties do not depend on who came first
    p = np.stack([signatures[s] for s in sites])
    different = len(np.unique(p, axis=0))
    best = np.zeros(len(sites), dtype=np.int64)
    lowest = np.inf
    most = min(different, len(sites) - 1, most or max(2, len(sites) // 2))
    if most >= 2:
        from sklearn.cluster import AgglomerativeClustering
        from sklearn.metrics import davies_bouldin_score

        far = earth_movers(p, ground)
        for k in range(2, most + 1):
            cut = AgglomerativeClustering(k, metric="precomputed", linkage="average").fit_predict(far)
            index = davies_bouldin_score(p, cut)
            if index < lowest - 1e-12:
                best, lowest = cut, index
    return {
        s: min(o for o, b in zip(sites, best, strict=True) if b == mine) for s, mine in zip(sites, best, strict=True)
    }
