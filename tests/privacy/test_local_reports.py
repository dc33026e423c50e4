"""One report a person: the bound on likelihood ratios, and what sums of reports mean."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from atoll.privacy import local_reports
from atoll.privacy.local_reports import Oracle


class Scripted:
    """Hands out given numbers in the place of random ones."""

    def __init__(self, numbers):  # type: ignore[no-untyped-def]
        self.numbers = np.array(numbers)

    def integers(self, low, high, shape):  # type: ignore[no-untyped-def]
        assert low == 0
        assert self.numbers.max() < high
        return self.numbers.reshape(shape)


def law(oracle: Oracle, value: int) -> dict[tuple[int, ...], Fraction]:
    """The exact chances of every report of a person with ``value``, by going through all random numbers."""
    whole, draws = oracle.odds()[2], oracle.size if oracle.unary else 1
    found: Counter[tuple[int, ...]] = Counter()
    for numbers in itertools.product(range(whole), repeat=draws):
        found[tuple(oracle.support(np.array([value]), Scripted(numbers)).tolist())] += 1
    return {report: Fraction(n, whole**draws) for report, n in found.items()}


@pytest.mark.parametrize(("size", "epsilon"), [(3, 0.5), (4, 1.0), (6, 2.0), (2, 3.0), (6, 0.2), (7, 0.3)])
def test_no_report_is_more_than_e_to_the_epsilon_times_as_likely(monkeypatch, size, epsilon):
    monkeypatch.setattr(local_reports, "UNIT", 4 if size > 4 else 64)  # few random numbers, so that all can be tried
    oracle = Oracle(size, epsilon)
    laws = [law(oracle, value) for value in ((0, 1, size - 1) if oracle.unary else range(size))]
    for one, other in itertools.permutations(laws, 2):
        assert sum(one.values()) == 1
        assert one.keys() == other.keys()
        for report, chance in one.items():
            assert float(chance / other[report]) <= math.exp(epsilon) * (1 + 1e-12)


@pytest.mark.parametrize("epsilon", [1e-6, 0.1, 1.0, 2.0, 4.0, 8.0, 16.0])
@pytest.mark.parametrize("size", [2, 3, 50, 5000])
def test_the_bound_at_full_resolution_is_kept_and_nearly_used(size, epsilon):
    oracle = Oracle(size, epsilon)
    true, false, whole = oracle.odds()
    if oracle.unary:  # two values differ in two bits
        worst = Fraction(true, false) * Fraction(whole - false, whole - true)
    else:
        assert true + (size - 1) * false == whole
        worst = Fraction(true, false)
    assert worst <= Fraction(math.exp(epsilon))
    assert math.log(worst) >= epsilon * 0.999 - 1e-8


@pytest.mark.parametrize(("size", "unary"), [(5, False), (40, True)])
def test_estimates_are_unbiased_with_the_textbook_variance(size, unary):
    oracle, people, runs = Oracle(size, 1.0), 400, 400
    assert oracle.unary == unary
    values = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 3] * (people // 10))
    truth = np.bincount(values, minlength=size)
    g = np.random.Generator(np.random.Philox(key=5))
    found = np.stack([oracle.estimate(oracle.support(values, g), people) for _ in range(runs)])
    e = math.exp(1.0)
    rare = people * (4 * e / (e - 1) ** 2 if unary else (size - 2 + e) / (e - 1) ** 2)
    assert oracle.variance(people) == pytest.approx(rare, rel=1e-6)
    p = 0.5 if unary else e / (e + size - 1)
    q = 1 / (e + 1) if unary else 1 / (e + size - 1)
    exact = (truth * p * (1 - p) + (people - truth) * q * (1 - q)) / (p - q) ** 2
    z = (found.mean(0) - truth) / np.sqrt(exact / runs)
    assert np.abs(z).max() < 4
    assert found.var(0) == pytest.approx(exact, rel=0.35)
    assert found.var(0).mean() == pytest.approx(exact.mean(), rel=0.1)


def test_many_people_are_counted_in_pieces(monkeypatch):
    oracle, values = Oracle(30, 1.0), np.arange(100) % 30
    whole = oracle.support(values, np.random.Generator(np.random.Philox(key=1)))
    monkeypatch.setattr(local_reports, "CHUNK", 70)
    assert np.array_equal(whole, oracle.support(values, np.random.Generator(np.random.Philox(key=1))))


def test_the_oracle_with_less_noise_is_taken():
    for size, epsilon in itertools.product([3, 6, 9, 12, 30, 100], [0.5, 1.0, 2.0, 3.0]):
        e = math.exp(epsilon)
        assert Oracle(size, epsilon).variance(1) == pytest.approx(
            min((size - 2 + e) / (e - 1) ** 2, 4 * e / (e - 1) ** 2), rel=1e-6
        )
