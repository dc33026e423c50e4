"""One report a person: frequencies of a few values under local differential privacy.

k-ary randomised response (Kairouz, Bonawitz, Ramage, 2016, arXiv 1602.07387) for few values, and optimised unary
encoding (Wang, Blocki, Li, Jha, USENIX Security 2017, arXiv 1705.04421) for many. Probabilities are fractions of whole
numbers, and draws are of whole numbers, so that no report is more than e^epsilon times as likely under one value as
under another: the bound holds for what is drawn, not for a rounded picture of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray

Counts = NDArray[np.int64]
UNIT = 1 << 32
"""Probabilities are counted in 1 / UNIT; the bound gives away at most a few of these."""
CHUNK = 1 << 22
"""Random numbers that unary encoding holds at a time."""


@dataclass(frozen=True)
class Oracle:
    """How a person with one of ``size`` values reports, and what the sum of reports means.

    Args:
        size: number of values, 0 to size - 1.
        epsilon: no report is more than e^epsilon times as likely under one value as under another.
    """

    size: Annotated[int, Ge(2)]
    epsilon: Annotated[float, Gt(0), Le(16)]

    @property
    def unary(self) -> bool:
        """A bit for each value instead of one value: less noise from ``size - 2 >= 3 e^epsilon`` on."""
        return self.size - 2 >= 3 * math.exp(self.epsilon)

    def odds(self) -> tuple[int, int, int]:
        """Chances (true, false, whole): a report supports one's own value with true / whole, any other with
        false / whole."""
        grow = math.exp(self.epsilon) * (1 - 2.0**-50)  # exp may have been rounded up
        if self.unary:
            return UNIT // 2, min(UNIT // 2, math.ceil(UNIT / (1 + grow)) + 1), UNIT
        true = max(UNIT, math.floor(UNIT * grow))
        return true, UNIT, true + (self.size - 1) * UNIT

    def support(self, values: Counts, generator: np.random.Generator) -> Counts:
        """How many of the people's reports support each value, ``[size]``. ``values``: one a person, ``[n]``."""
        true, false, whole = self.odds()
        if self.unary:
            total, step = np.zeros(self.size, dtype=np.int64), max(1, CHUNK // self.size)
            for at in range(0, len(values), step):
                some = values[at : at + step]
                limit = np.full((len(some), self.size), false)
                limit[np.arange(len(some)), some] = true
                total += (generator.integers(0, whole, limit.shape) < limit).sum(0)
            return total
        drawn = generator.integers(0, whole, len(values))
        other = (drawn - true) // false  # which of the size - 1 others, where it is not below 0
        report = np.where(drawn < true, values, other + (other >= values))
        return np.bincount(report, minlength=self.size).astype(np.int64)

    def estimate(self, support: Counts, reports: int) -> NDArray[np.float64]:
        """Unbiased: how many of ``reports`` people have each value, ``[size]``; may be negative."""
        p, q = self.chances()
        return (support.astype(np.float64) - reports * q) / (p - q)

    def variance(self, reports: int) -> float:
        """Of an estimate for a value that few have."""
        p, q = self.chances()
        return reports * q * (1 - q) / (p - q) ** 2

    def chances(self) -> tuple[float, float]:
        """p and q: that a report supports one's own value, and any other."""
        true, false, whole = self.odds()
        return true / whole, false / whole
