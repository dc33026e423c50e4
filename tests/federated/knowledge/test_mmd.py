"""The kernel distance against its definition, pair by pair."""

from __future__ import annotations

import itertools
import math

import torch

from atoll.federated.knowledge.mmd import mmd


def by_pairs(x: torch.Tensor, y: torch.Tensor) -> float:
    points = [*x.tolist(), *y.tolist()]
    apart = {(i, j): math.dist(points[i], points[j]) ** 2 for i, j in itertools.product(range(len(points)), repeat=2)}
    width = sum(apart.values()) / len(apart)

    def mean(a: range, b: range) -> float:
        pairs = list(itertools.product(a, b))
        kernel = [sum(math.exp(-apart[p] / (w * width)) for w in (0.25, 0.5, 1, 2, 4)) / 5 for p in pairs]
        return sum(kernel) / len(pairs)

    first, second = range(len(x)), range(len(x), len(points))
    return mean(first, first) - 2 * mean(first, second) + mean(second, second)


def test_it_is_the_mean_over_pairs():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 3, generator=g), torch.randn(7, 3, generator=g) + 1
    assert math.isclose(float(mmd(x, y)), by_pairs(x, y), rel_tol=1e-4)


def test_it_is_zero_for_the_same_points_and_grows_with_distance_to_a_bound():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    assert abs(float(mmd(x, x))) < 1e-6
    near, far, very = (float(mmd(x, x + d)) for d in (0.5, 2.0, 1e4))
    assert 0 < near < far < very <= 2
    assert float(mmd(torch.zeros(3, 2), torch.zeros(4, 2))) == 0.0
