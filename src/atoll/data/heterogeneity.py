"""How different the sites of a federation are, in a few numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atoll.data.dataset import Dataset, Info
from atoll.data.tokenizers import Tokenizer

Counts = NDArray[np.int64]
QUANTILES = 10
TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Histogram:
    """Rows (or tokens) of each site by class, quantile of the target, or token.

    Attributes:
        of: ``"classes"``, ``"target quantiles"`` or ``"tokens"``.
        names: of the C columns.
        counts: ``[S, C]``.
        rows: ``[S]`` rows of each site.
    """

    of: str
    names: tuple[str, ...]
    counts: Counts
    rows: Counts


@dataclass(frozen=True, slots=True)
class Heterogeneity:
    """Attributes:

    js_distance: mean over sites of the Jensen-Shannon distance (square root of the divergence in bits, 0 to
        1) between a site's histogram and that of all rows. 0: all sites are alike; 1: nothing in common.
    effective_classes: mean over sites of exp(entropy): as many equally frequent classes would be as mixed.
    size_min, size_median, size_max: training rows of a site.
    """

    of: str
    js_distance: float
    effective_classes: float
    size_min: int
    size_median: float
    size_max: int


def histogram(sites: Sequence[Dataset], info: Info, tokenizer: Tokenizer | None = None) -> Histogram:
    """What there is at each site: classes if labelled, else deciles of a target, else tokens."""
    rows = np.array([len(s) for s in sites])
    first = sites[0].columns
    if "y" in first and not first["y"].is_floating_point():
        values = [y[y >= 0] for y in (s.column("y").numpy().reshape(-1) for s in sites)]  # -1: no label
        size = max(len(info.class_names), 1 + max((int(v.max(initial=0)) for v in values), default=0))
        if info.kind != "text":
            size = max(size, info.num_classes or 0)
        names = info.class_names or tuple(map(str, range(size)))
        return Histogram("classes", names, _count(values, size), rows)
    if "y" in first:
        values = [s.column("y").numpy().reshape(-1) for s in sites]
        edges = np.unique(np.quantile(np.concatenate(values), np.linspace(0, 1, QUANTILES + 1)))
        inner = edges[1:-1]
        names = tuple(f"{a:.3g} to {b:.3g}" for a, b in itertools.pairwise(edges)) or (f"{edges[0]:.3g}",)
        binned = [np.searchsorted(inner, v, side="right") for v in values]
        return Histogram("target quantiles", names, _count(binned, len(names)), rows)
    if info.kind == "text":
        size = min(info.num_classes or 256, TOKENS)  # later (rarer) tokens share the last column
        words = tokenizer.names() if tokenizer is not None else tuple(map(str, range(size)))
        values = [np.minimum(s.column("x").numpy().reshape(-1), size - 1) for s in sites]
        return Histogram("tokens", words[:size], _count(values, size), rows)
    return Histogram("rows", ("rows",), rows[:, None], rows)


def js_distance(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Jensen-Shannon distance along the last axis, with logarithms to base 2: 0 (equal) to 1 (disjoint)."""
    m = (p + q) / 2
    divergence = _entropy(m) - (_entropy(p) + _entropy(q)) / 2
    return np.sqrt(np.clip(divergence, 0.0, 1.0))


def heterogeneity(found: Histogram) -> Heterogeneity:
    """The numbers for the report, from training rows. Sites without rows do not count."""
    counts = found.counts[found.counts.sum(1) > 0].astype(np.float64)
    p = counts / counts.sum(1, keepdims=True)
    whole = counts.sum(0) / counts.sum()
    return Heterogeneity(
        of=found.of,
        js_distance=float(js_distance(p, whole[None]).mean()),
        effective_classes=float(np.exp2(_entropy(p)).mean()),
        size_min=int(found.rows.min()),
        size_median=float(np.median(found.rows)),
        size_max=int(found.rows.max()),
    )


def _entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """In bits, along the last axis."""
    out: NDArray[np.float64] = -(p * np.log2(np.where(p > 0, p, 1.0))).sum(-1)
    return out


def _count(values: Sequence[NDArray[np.int64]], size: int) -> Counts:
    return np.stack([np.bincount(v, minlength=size) for v in values])
