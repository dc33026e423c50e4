"""The output distribution of the randomised quantisation mechanism, and its Renyi divergence (Youn et al., 2023,
arXiv 2306.11913).

One number x in [-1, 1] (in units of the clip) becomes one of m levels, evenly spaced on [-1 - margin, 1 + margin]. Both
end levels are kept, each other one with probability ``keep``, and x is rounded to one of the two nearest kept levels at
random, so that its mean is x. Who sees the result does not know which levels were kept: that is the noise.

The probabilities are linear in x between two levels, and the Renyi divergence is jointly quasi-convex (van Erven &
Harremoes, 2014, arXiv 1206.2459, theorem 13). So the worst pair of inputs is found among the levels inside [-1, 1] and
the two ends, and a search over them is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

MOST_HIDING = 64
"""Sites that hide one number in a sum, as far as they are counted; the others can only hide it better."""


def grid(levels: int, margin: float) -> Array:
    """float64 ``[m]``: the values that the levels stand for."""
    return np.linspace(-1 - margin, 1 + margin, levels)


def probabilities(x_V: Array, levels: int, keep: float, margin: float) -> Array:
    """float64 ``[V, m]``: the exact probability of each level, for each input in [-1, 1].

    The kept neighbours of x are independent: below, level a is the nearest kept one with probability
    keep (1 - keep)^(gaps), and the rest falls on the end level; above likewise.
    """
    m = levels
    t_V = (np.asarray(x_V) + 1 + margin) / (2 + 2 * margin) * (m - 1)
    out = np.zeros((len(t_V), m))
    for row, t in zip(out, t_V, strict=True):
        j = min(int(t), m - 2)
        a, b = np.arange(j + 1), np.arange(j + 1, m)
        below, above = keep * (1 - keep) ** (j - a), keep * (1 - keep) ** (b - j - 1)
        below[0], above[-1] = (1 - keep) ** j, (1 - keep) ** (m - 2 - j)
        both = below[:, None] * above[None, :]
        up = (t - a[:, None]) / (b[None, :] - a[:, None])
        row[: j + 1] = (both * (1 - up)).sum(1)
        row[j + 1 :] = (both * up).sum(0)
    return out


def draw(x_D: Array, levels: int, keep: float, margin: float, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """uint8 ``[D]``: a level for each input in [-1, 1]. Kept neighbours are drawn by the gaps to them."""
    t = (x_D + 1 + margin) / (2 + 2 * margin) * (levels - 1)
    j = np.minimum(t.astype(np.int64), levels - 2)
    a = np.maximum(j - (random.geometric(keep, len(t)) - 1), 0)
    b = np.minimum(j + random.geometric(keep, len(t)), levels - 1)
    return np.where(random.random(len(t)) * (b - a) < t - a, b, a).astype(np.uint8)


def divergence(log_p: Array, log_q: Array, orders: Sequence[float]) -> Array:
    """D_alpha(P || Q) at each order, over the last axis: ``[..., outcomes]`` -> ``[orders, ...]``."""
    out = []
    for order in orders:
        terms = order * log_p + (1 - order) * log_q
        top = terms.max(-1)
        out.append((top + np.log(np.exp(terms - top[..., None]).sum(-1))) / (order - 1))
    return np.stack(out)


@lru_cache(maxsize=256)
def worst_divergence(
    levels: int, keep: float, margin: float, replies: int, orders: tuple[float, ...]
) -> tuple[float, ...]:
    """The largest Renyi divergence, at each order > 1, that one number of one site makes in a sum of ``replies``.

    For one reply it is exact, by the argument at the top. For sums it is an upper bound, whatever the other sites hold:
    every other site's distribution is at least the pointwise minimum over inputs, so with the mass of that minimum it
    hides the sum by a distribution that does not depend on its data (the privacy blanket; Balle et al., 2019, arXiv
    1903.02837), and what else it sends is taken to be known. exp((alpha - 1) D) is jointly convex, so it is averaged
    over the number of sites that hide. The paper puts all other sites at one end of the range instead; that is not
    always the worst case, since an input that is a level is often kept as it is.
    """
    inside = grid(levels, margin)
    inputs = np.array([-1.0, *inside[np.abs(inside) < 1], 1.0])
    p = probabilities(inputs, levels, keep, margin)
    mass, log_p = float(p.min(0).sum()), np.log(p)
    blanket = np.log(p.min(0) / mass)
    powers = np.asarray(orders)[:, None] - 1
    most = min(replies - 1, MOST_HIDING, 8192 // (levels - 1) ** 2)  # more would cost much and gain little
    hidden = []
    for _ in range(most + 1):
        pairs = [divergence(row, log_p, orders).max(1) for row in log_p]
        hidden.append(np.max(pairs, axis=0))
        log_p = np.stack([convolved(row, blanket) for row in log_p])
    chances = np.array([binomial(replies - 1, k, mass) for k in range(most)])
    chances = np.append(chances, max(0.0, 1 - chances.sum()))  # at least ``most`` hide
    terms = powers * np.stack(hidden, 1)
    top = terms.max(1, keepdims=True)
    return tuple(
        float(d) for d in (top + np.log((chances * np.exp(terms - top)).sum(1, keepdims=True)))[:, 0] / powers[:, 0]
    )


def binomial(n: int, k: int, p: float) -> float:
    """The probability of k successes among n."""
    log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(log + k * math.log(p) + (n - k) * math.log1p(-p))


def convolved(log_p: Array, log_q: Array) -> Array:
    """Log-probabilities of the sum of two independent numbers of levels: far tails underflow outside of logarithms."""
    out = np.full(len(log_p) + len(log_q) - 1, -np.inf)
    for i, shift in enumerate(log_q):
        part = out[i : i + len(log_p)]
        np.logaddexp(part, log_p + shift, out=part)
    return out
