"""The search over coefficients, with measures whose minimum is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.diffusion.search import Evolution, FewStepFrechet, Ranking, ema_weights, scored, search, summing_to_one
from atoll.diffusion.trail import CheckpointTrail, vector


def trail(count: int, size: int = 12, seed: int = 0) -> CheckpointTrail:
    return CheckpointTrail(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)))


def model() -> nn.Module:
    return nn.Linear(3, 3)  # 12 numbers


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(2, 30), st.floats(0.01, 3), st.floats(0, 1), st.integers(0, 99))
def test_coefficients_sum_to_one(count: int, size: int, mutation: float, progress: float, seed: int) -> None:
    how, generator = Evolution(size, mutation), torch.Generator().manual_seed(seed)
    seeds = how.seeds(count)
    child = how.child(seeds[:size], progress, generator)
    ones = torch.ones(len(seeds) + 1, dtype=torch.float64)
    torch.testing.assert_close(torch.cat([seeds, child[None]]).sum(1), ones)
    assert child.shape == (count,)


def test_the_nearest_coefficients_that_sum_to_one() -> None:
    a = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    assert summing_to_one(a).tolist() == pytest.approx([1 / 3, -7 / 6, 11 / 6])
    assert torch.equal(summing_to_one(ema_weights(4, 1.0)), ema_weights(4, 1.0))


@settings(deadline=None)
@given(st.integers(1, 12), st.floats(0.0, 0.99), st.integers(0, 99))
def test_an_exponential_average_is_one_of_the_combinations(count: int, rate: float, seed: int) -> None:
    """The textbook recursion from nothing, divided by the weight that it has given out."""
    rows = trail(count, seed=seed).rows
    average, weight = torch.zeros(12, dtype=torch.float64), 0.0
    for row in rows:
        average, weight = rate * average + (1 - rate) * row.double(), rate * weight + 1 - rate
    mixed = CheckpointTrail(rows).mix(ema_weights(count, rate))
    torch.testing.assert_close(mixed.double(), average / weight, rtol=1e-5, atol=1e-5)


def test_it_starts_from_averages_each_checkpoint_and_the_mean() -> None:
    seeds = Evolution(rates=(0.5, 0.9)).seeds(4)
    assert seeds.shape == (7, 4)
    assert torch.equal(seeds[-4:], torch.eye(4, dtype=torch.float64))
    assert torch.equal(seeds[2], torch.full((4,), 0.25, dtype=torch.float64))
    assert torch.equal(seeds[0], ema_weights(4, 0.5))
    assert seeds[0].tolist() == pytest.approx([1 / 15, 2 / 15, 4 / 15, 8 / 15])


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 8), st.integers(0, 60), st.integers(0, 999))
def test_it_is_never_worse_than_its_best_start(count: int, evaluations: int, seed: int) -> None:
    """Even on a measure that nothing can be learned from."""
    checkpoints, said = trail(count, seed=seed), []

    def rugged(net: nn.Module) -> float:
        value = float((1e4 * vector(net)).sin().sum())
        said.append(value)
        return value

    how, net = Evolution(population=6), model()
    found = search(checkpoints, rugged, net, evaluations=evaluations, how=how, seed=seed)
    starts = len(how.seeds(count))
    assert len(said) == max(starts, evaluations)
    assert float(found.floor) == min(said[:starts])
    assert float(found.scores[0]) == min(said), "the best that was ever seen is kept"
    assert found.scores.tolist() == sorted(said)[: len(found.scores)]
    assert torch.equal(vector(net), checkpoints.mix(found.coefficients[0]))
    assert rugged(net) == float(found.scores[0])
    final = found.finalists(3)
    assert 1 <= len(final) <= 3
    for a in final:
        assert float(found.scores[(found.coefficients == a).all(1)][0]) <= float(found.floor)


def test_it_leaves_the_convex_hull() -> None:
    """Where the optimum extrapolates, no average and no checkpoint comes near it."""
    checkpoints = trail(5)
    want = torch.tensor([-0.8, 0.3, 0.0, -0.5, 2.0], dtype=torch.float64)
    aim = checkpoints.mix(want)

    def metric(net: nn.Module) -> float:
        return float((vector(net) - aim).square().mean())

    net = model()
    found = search(checkpoints, metric, net, evaluations=400, seed=1)
    assert float(found.scores[0]) < 0.02 * float(found.floor)
    assert float((found.coefficients[0] - want).abs().max()) < 0.3
    again = search(checkpoints, metric, model(), evaluations=400, seed=1)
    assert torch.equal(found.coefficients, again.coefficients)
    other = search(checkpoints, metric, model(), evaluations=400, seed=2)
    assert not torch.equal(found.coefficients, other.coefficients)


def test_equal_checkpoints_give_that_model_whatever_is_found() -> None:
    row, net = torch.randn(12, generator=torch.Generator().manual_seed(3)), model()
    search(CheckpointTrail(row.repeat(6, 1)), lambda net: 0.0, net, evaluations=30)
    assert torch.equal(vector(net), row)


def test_a_model_that_cannot_be_measured_is_the_worst() -> None:
    assert scored(lambda net: math.nan, model()) == math.inf
    ranking = Ranking.of(torch.eye(2, dtype=torch.float64), torch.tensor([math.inf, 3.0], dtype=torch.float64), 2)
    assert ranking.scores.tolist() == [3.0, math.inf]
    assert ranking.after(torch.tensor([0.5, 0.5], dtype=torch.float64), 3.0).coefficients[0].tolist() == [0, 1]


def frechet(**changes: object) -> FewStepFrechet:
    def generate(net: nn.Module, z: Tensor, cond: Tensor, generator: torch.Generator) -> Tensor:
        x: Tensor = net(z) + 0.1 * torch.randn(z.shape, generator=generator) + cond[:, None]
        return x

    arguments: dict[str, object] = {
        "generate": generate, "features": lambda x: x[:, :2], "mean": torch.zeros(2, dtype=torch.float64),
        "cov": torch.eye(2, dtype=torch.float64), "shape": (3,), "conditions": torch.tensor([-1.0, 1.0]),
        "samples": 600, "batch": 250,
    }  # fmt: skip
    return FewStepFrechet(**{**arguments, **changes})  # type: ignore[arg-type]


def test_samples_are_measured_on_fixed_noise() -> None:
    net = model()
    with torch.no_grad():
        net.weight.copy_(torch.eye(3))  # type: ignore[operator]
        net.bias.zero_()  # type: ignore[operator]
    metric = frechet()
    torch.manual_seed(1)
    first = metric(net)
    torch.randn(7)
    assert metric(net) == first
    assert frechet(seed=1)(net) != first
    # Conditions shift half of the samples by 1 and half by -1: their variance is 1 + 0.1^2 + 1.
    cov = 2.01 * torch.eye(2, dtype=torch.float64) + torch.ones(2, 2, dtype=torch.float64)
    cov.fill_diagonal_(2.01)
    cov[0, 1] = cov[1, 0] = 1.0
    assert frechet(cov=cov, samples=4000)(net) < 0.02 < 0.2 < first
    with torch.no_grad():
        net.bias.fill_(1e30).mul_(1e30)  # type: ignore[operator]
    assert metric(net) == math.inf
