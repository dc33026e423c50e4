"""The randomised quantisation mechanism's distribution and what it costs, against enumeration in plain Python."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.privacy.rqm import draw, grid, probabilities, worst_divergence

ORDERS = (1.05, 1.5, 2.0, 8.0, 64.0, 512.0)
mechanisms = st.tuples(st.integers(2, 8), st.floats(0.05, 0.95), st.floats(0.05, 4.0))


def enumerated(x: float, m: int, keep: float, margin: float) -> list[float]:
    """By the paper's own words: every set of kept levels, the two that enclose x, a random rounding between them."""
    x, keep, big = Fraction(x), Fraction(keep), 1 + Fraction(margin)
    level = [-big + 2 * i * big / (m - 1) for i in range(m)]
    out = [Fraction(0)] * m
    for inner in itertools.product((False, True), repeat=m - 2):
        kept = [0, *(i + 1 for i, k in enumerate(inner) if k), m - 1]
        chance = math.prod((keep if k else 1 - keep for k in inner), start=Fraction(1))
        a = max(i for i in kept[:-1] if level[i] <= x)
        b = min(i for i in kept if i > a)
        up = (x - level[a]) / (level[b] - level[a])
        out[a] += chance * (1 - up)
        out[b] += chance * up
    return [float(p) for p in out]


def sums(inputs: list[float], mechanism) -> np.ndarray:  # type: ignore[no-untyped-def,type-arg]
    """The distribution of the sum of levels of several sites."""
    out = np.array([1.0])
    for x in inputs:
        out = np.convolve(out, enumerated(x, *mechanism))
    return out


def renyi(p: np.ndarray, q: np.ndarray, order: float) -> float:  # type: ignore[type-arg]
    return float(np.log(np.sum(p**order * q ** (1 - order))) / (order - 1))


def inputs(mechanism) -> list[float]:  # type: ignore[no-untyped-def]
    inside = [float(b) for b in grid(mechanism[0], mechanism[2]) if abs(b) < 1]
    return [-1.0, *inside, 1.0]


@given(mechanism=mechanisms, x=st.floats(-1, 1))
@settings(max_examples=40, deadline=None)
def test_the_distribution_is_the_enumerated_one(mechanism, x) -> None:
    (p,) = probabilities(np.array([x]), *mechanism)
    assert p == pytest.approx(enumerated(x, *mechanism), abs=1e-12)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert (p > 0).all()
    assert p @ grid(mechanism[0], mechanism[2]) == pytest.approx(x, abs=1e-12)


@pytest.mark.parametrize(("keep", "margin"), [(0.42, 1.0), (0.99, 0.01), (0.01, 100.0)])
@pytest.mark.parametrize("levels", [2, 3, 16, 64])
def test_every_level_is_always_possible(levels, keep, margin) -> None:
    p = probabilities(np.linspace(-1, 1, 41), levels, keep, margin)
    assert (p > 0).all()
    assert p @ grid(levels, margin) == pytest.approx(np.linspace(-1, 1, 41), abs=1e-12 * (1 + margin))


def test_draws_follow_the_distribution() -> None:
    n, random = 200_000, np.random.Generator(np.random.Philox(key=1))
    for x in (-1.0, -0.6, 0.05, 1.0):
        codes = draw(np.full(n, x), 8, 0.42, 0.5, random)
        expected = n * probabilities(np.array([x]), 8, 0.42, 0.5)[0]
        chi = ((np.bincount(codes, minlength=8) - expected) ** 2 / expected).sum()
        assert chi < 30  # 7 degrees of freedom: 1 in 10,000


@given(mechanism=mechanisms, x=st.floats(-1, 1), y=st.floats(-1, 1))
@settings(max_examples=60, deadline=None)
def test_no_pair_of_inputs_is_worse_than_the_claim(mechanism, x, y) -> None:
    p, q = (np.array(enumerated(v, *mechanism)) for v in (x, y))
    claim = worst_divergence(*mechanism, 1, ORDERS)
    for order, most in zip(ORDERS[:4], claim, strict=False):
        assert renyi(p, q, order) <= most + 1e-9
    # The likelihood ratio: pure epsilon is the limit of high orders, to log(1 / least probability) / order.
    ratio = np.abs(np.log(p / q)).max()
    assert ratio <= claim[-1] * 511 / 512 + math.log(1 / min(p.min(), q.min())) / 512 + 1e-9


def test_the_claim_is_reached() -> None:
    """Not merely an upper bound, for one message."""
    for mechanism in ((5, 0.42, 1.0), (8, 0.9, 0.3)):
        claim = worst_divergence(*mechanism, 1, ORDERS)
        pairs = itertools.product([np.array(enumerated(x, *mechanism)) for x in inputs(mechanism)], repeat=2)
        reached = np.max([[renyi(p, q, order) for order in ORDERS[:4]] for p, q in pairs], axis=0)
        assert claim[:4] == pytest.approx(reached, rel=1e-9)


@given(mechanism=st.tuples(st.integers(2, 5), st.floats(0.1, 0.9), st.floats(0.1, 3.0)), n=st.integers(2, 4))
@settings(max_examples=15, deadline=None)
def test_no_sum_is_worse_than_the_claim_whatever_the_others_hold(mechanism, n) -> None:
    claim = worst_divergence(*mechanism, n, ORDERS)
    one, at = worst_divergence(*mechanism, 1, ORDERS), inputs(mechanism)
    assert all(c <= o + 1e-9 for c, o in zip(claim, one, strict=True))
    for others in itertools.combinations_with_replacement(at, n - 1):
        a, b = (sums([x, *others], mechanism) for x in (-1.0, 1.0))
        for order, most in zip(ORDERS[:4], claim, strict=False):
            assert max(renyi(a, b, order), renyi(b, a, order)) <= most + 1e-9


def test_the_papers_worst_case_is_not_always_the_worst() -> None:
    """Why sums are not accounted for with all other sites at one end, as the paper has it."""
    mechanism, order = (4, 0.864, 1.55), 2.0
    paper = max(renyi(sums([x, 1], mechanism), sums([-x, 1], mechanism), order) for x in (-1, 1))
    inner = inputs(mechanism)[-2]
    assert renyi(sums([1, inner], mechanism), sums([-1, inner], mechanism), order) > 1.05 * paper
    assert worst_divergence(*mechanism, 2, (order,))[0] > 1.05 * paper


def test_the_values_of_the_pilot() -> None:
    for margin, keep, pure, eighth, std in ((1, 0.42, 5.47, 5.3, 0.49), (2, 0.42, 3.98, 3.9, 0.74), (2, 0.57, 5.64, 5.6, 0.50)):  # fmt: skip
        low, high, middle = probabilities(np.array([-1.0, 1.0, 0.0]), 16, keep, margin)
        assert np.log(low / high).max() == pytest.approx(pure, abs=0.005)
        assert worst_divergence(16, keep, margin, 1, (8.0,))[0] == pytest.approx(eighth, abs=0.06)
        assert math.sqrt(middle @ grid(16, margin) ** 2) == pytest.approx(std, abs=0.006)


def test_more_margin_fewer_kept_levels_and_more_sites_are_more_private() -> None:
    def cost(levels=16, keep=0.42, margin=1.0, replies=1):  # type: ignore[no-untyped-def]
        return worst_divergence(levels, keep, margin, replies, (2.0, 8.0))

    for knob, values in (("margin", (0.1, 0.5, 1.0, 2.0, 8.0)), ("keep", (0.8, 0.6, 0.4, 0.2)), ("replies", (1, 2, 5, 20, 300))):  # fmt: skip
        costs = [cost(**{knob: v}) for v in values]
        for more, less in itertools.pairwise(costs):
            assert all(m > v for m, v in zip(more, less, strict=True)), knob
