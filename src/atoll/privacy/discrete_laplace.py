"""Laplace noise on whole numbers, drawn exactly.

Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020, arXiv 2004.00010, algorithms 1
and 2. All arithmetic is on whole numbers, so that no gap between floating-point numbers tells anything (Mironov, 2012).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

Below = Callable[[int], int]
"""``below(n)`` is a uniform random number 0 to n - 1; ``secrets.randbelow`` for privacy."""


def discrete_laplace(scale: Fraction, below: Below) -> int:
    """A whole number x with probability proportional to exp(-|x| / scale), scale > 0.

    Added to each coordinate of a vector of whole numbers, it is epsilon-differentially private for epsilon = (L1
    distance between neighbours) / scale.
    """
    t, s = scale.numerator, scale.denominator
    while True:
        u = below(t)
        if not _exp(Fraction(u, t), below):
            continue
        v = 0
        while _exp(Fraction(1), below):
            v += 1
        y, negative = (u + t * v) // s, below(2)
        if not (negative and y == 0):  # zero once, not twice
            return -y if negative else y


def _exp(gamma: Fraction, below: Below) -> bool:
    """True with probability exp(-gamma), 0 <= gamma <= 1."""
    k = 1
    while below(gamma.denominator * k) < gamma.numerator:
        k += 1
    return k % 2 == 1
