"""Evolutionary search over linear combinations of checkpoints: no gradient, any measure.

Coefficients sum to 1; they may be negative or above 1. What they weigh need not be one run's checkpoints: columns that
are sites' updates make it a way to aggregate, scored on what a server can generate by itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from atoll.core.streams import key, stream
from atoll.diffusion.evaluate import frechet
from atoll.diffusion.trail import CheckpointTrail, put

Metric = Callable[[nn.Module], float]
"""What a model is worth; lower is better."""


def ema_weights(count: int, rate: float) -> Tensor:
    """What an average with decay ``rate`` weighs the last ``count`` checkpoints with: (1 - b) b^(K - i), scaled to sum
    to 1. Float64 ``[count]``."""
    a = rate ** torch.arange(count - 1, -1, -1, dtype=torch.float64)
    return a / a.sum()


def summing_to_one(a: Tensor) -> Tensor:
    """The nearest coefficients ``[..., K]`` that do."""
    return a + (1 - a.sum(-1, keepdim=True)) / a.shape[-1]


@dataclass(frozen=True)
class Evolution:
    """How coefficients are varied.

    Args:
        population: how many are kept.
        mutation: standard deviation of the noise on a child's coefficients; it falls to a tenth of that.
        rates: decays of averages that the search starts from, beside each checkpoint alone and the plain mean.
    """

    population: Annotated[int, Ge(2)] = 20
    mutation: Annotated[float, Gt(0)] = 0.3
    rates: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)

    def seeds(self, count: int) -> Tensor:
        """What the search starts from, float64 ``[S, count]``."""
        averages = [ema_weights(count, rate) for rate in (*self.rates, 1.0)]
        return torch.cat([torch.stack(averages), torch.eye(count, dtype=torch.float64)])

    def child(self, parents: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """Of two of the better half of ``[P, K]``, best first: their mean, or coordinates of either; and noise."""
        a, b = parents[torch.randperm(max(2, len(parents) // 2), generator=generator)[:2]]
        mean, first = torch.rand(2, generator=generator) < 0.5, torch.rand(len(a), generator=generator) < 0.5
        mixed = (a + b) / 2 if mean[0] else torch.where(first, a, b)
        std = self.mutation * (1 - 0.9 * progress)
        return summing_to_one(mixed + std * torch.randn(len(a), generator=generator, dtype=a.dtype))


@dataclass(frozen=True)
class Ranking:
    """Coefficients and what they scored, best first; of equals, the older.

    Attributes:
        coefficients: ``[P, K]``, float64.
        scores: ``[P]``, float64.
        floor: the best score of a seed; later ones can only be better.
    """

    coefficients: Tensor
    scores: Tensor
    floor: Tensor

    @classmethod
    def of(cls, seeds: Tensor, scores: Tensor, most: int) -> Ranking:
        order = scores.sort(stable=True).indices[:most]
        return cls(seeds[order], scores[order], scores.min())

    def after(self, a: Tensor, score: float) -> Ranking:
        """With one more candidate, and without the worst."""
        scores = torch.cat([self.scores, self.scores.new_tensor([score])])
        order = scores.sort(stable=True).indices[:-1]
        return dataclasses.replace(
            self, coefficients=torch.cat([self.coefficients, a[None]])[order], scores=scores[order]
        )

    def finalists(self, most: int) -> Tensor:
        """The best few, none of them worse than every seed ``[n, K]``."""
        return self.coefficients[: max(1, min(most, int((self.scores <= self.floor).sum())))]


def scored(metric: Metric, model: nn.Module) -> float:
    """What ``metric`` says; a model that it cannot measure is the worst."""
    value = float(metric(model))
    return value if math.isfinite(value) else math.inf


def search(
    trail: CheckpointTrail, metric: Metric, model: nn.Module, *, evaluations: int = 200, how: Evolution | None = None,
    seed: int = 0,
) -> Ranking:  # fmt: skip
    """The best combination of a trail's checkpoints (Liu et al., 2024, arXiv 2404.02241).

    A metric overfits its own noise: score the ranking's first few again on other noise and more samples.

    Args:
        trail: checkpoints of one network.
        metric: ``model -> float``, lower is better: anything, such as :class:`FewStepFrechet`.
        model: a network of that kind. It serves for trials, and holds the best combination in the end.
        evaluations: of the metric; the seeds are all measured, however few these are.
        how: the search's knobs.
        seed: of its random numbers.
    """
    how = how or Evolution()

    def score(a: Tensor) -> float:
        put(trail.mix(a), model)
        return scored(metric, model)

    seeds = how.seeds(len(trail))
    ranking = Ranking.of(seeds, torch.tensor([score(a) for a in seeds], dtype=torch.float64), how.population)
    children = max(0, evaluations - len(seeds))
    for i in range(children):
        a = how.child(ranking.coefficients, i / children, stream(seed, "search", i))
        ranking = ranking.after(a, score(a))
    put(trail.mix(ranking.coefficients[0]), model)
    return ranking


@dataclass(frozen=True)
class FewStepFrechet:
    """Frechet distance between features of real rows and of samples from *fixed* noise: models differ, dice do not.

    Real rows are needed for their features' mean and covariance alone. So they may come as these two values from
    whoever has the rows: ``Reference.mean`` and ``Reference.cov`` (``evaluate.py``) with ``Reference.judge.features``,
    a published table, sites' sums; or be those of samples of the many-step teacher.

    Args:
        generate: ``(model, z, cond, generator) -> samples``, in few steps.
        features: ``samples [B, ...] -> [B, F]``.
        mean, cov: of real rows' features, float64.
        shape: of one sample.
        conditions: asked for in turn.
        samples: how many.
        batch: at a time.
        seed: of the noise.
        device: where samples are made; features are taken on the CPU.
    """

    generate: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]
    features: Callable[[Tensor], Tensor]
    mean: Tensor
    cov: Tensor
    shape: tuple[int, ...]
    conditions: Tensor
    samples: int = 1000
    batch: int = 500
    seed: int = 0
    device: str = "cpu"

    def __call__(self, model: nn.Module) -> float:
        noise = stream(self.seed, "fixed noise")
        own = torch.Generator(self.device).manual_seed(key(self.seed, "fixed noise", "sampler"))
        found = []
        with torch.no_grad():
            for cond in self.conditions[torch.arange(self.samples) % len(self.conditions)].split(self.batch):
                z = torch.randn(len(cond), *self.shape, generator=noise).to(self.device)
                x = self.generate(model, z, cond.to(self.device), own)
                with torch.autocast("cpu", enabled=False):  # features have the reference's precision
                    found.append(self.features(x.float().cpu()).double())
        f = torch.cat(found)
        return frechet(self.mean, self.cov, f.mean(0), f.T.cov()) if torch.isfinite(f).all() else math.inf
