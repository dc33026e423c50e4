"""From per-seed values to an honest word."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

REPRODUCED, NOISE, NOT_REPRODUCED = "reproduced", "within noise", "not reproduced at this scale"
SO_IN_ONE, NOT_IN_ONE = "as expected in one run", "not as expected in one run"

T90 = {1: 6.314, 2: 2.920, 3: 2.354, 4: 2.132, 5: 2.016, 6: 1.944, 7: 1.895, 8: 1.860, 9: 1.834}
"""Two-sided 90 % quantiles of Student's t by degrees of freedom, rounded up."""
T90_BEYOND = 1.813
"""For more degrees of freedom: that of ten, which is the largest."""


def judge(left: Sequence[float], right: Sequence[float], relation: str, margin: float = 0.0) -> str:
    """Compare two arms seed by seed.

    The 90 % interval of the paired differences (less ``margin``) must lie beyond zero to be called reproduced; one
    that straddles zero is within noise. A single seed tells nothing of noise, and the words say so. Equality counts
    for ``>=`` and ``<=``. An arm that never reached its target has the value infinity.

    Args:
        left, right: one value per seed, same seeds in the same order.
        relation: one of ``>``, ``>=``, ``<``, ``<=``.
        margin: by how much ``left`` must win; negative: by how much it may lose.
    """
    sign = 1.0 if relation.startswith(">") else -1.0
    gaps = [sign * (a - b) - margin for a, b in zip(left, right, strict=True)]
    if len(gaps) == 1:
        return SO_IN_ONE if gaps[0] > 0 or (relation.endswith("=") and gaps[0] == 0) else NOT_IN_ONE
    if not all(math.isfinite(g) for g in gaps):
        return REPRODUCED if all(g == math.inf for g in gaps) else NOT_REPRODUCED
    mean = statistics.fmean(gaps)
    width = T90.get(len(gaps) - 1, T90_BEYOND) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    if mean - width > 0 or (relation.endswith("=") and mean - width == 0):
        return REPRODUCED
    return NOISE if mean + width > 0 else NOT_REPRODUCED
