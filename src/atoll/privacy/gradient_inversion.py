"""From a gradient back to the rows behind it: an attack, to measure what a message gives away.

Zhu, Liu, Han, "Deep Leakage from Gradients", NeurIPS 2019, arXiv 1906.08935; the cosine distance and the total
variation are those of Geiping et al., "Inverting Gradients", NeurIPS 2020, arXiv 2003.14053. Labels are taken as known,
which is the worst case. Tensors of the site that the attacker lacks (passports) are guessed: held at the guess, or
optimised along with the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from atoll.core.tree import Tree

Loss = Callable[[Tree, Tensor], Tensor]
"""The site's loss from guesses of its secret tensors and of its inputs, as a function of ``weights``."""


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """How hard the attacker tries.

    Args:
        steps: of Adam.
        lr: its step size, in units of the inputs.
        distance: between gradients: ``"cosine"``, 1 - cos of all entries as one vector, or ``"squared"``.
        variation: weight of the mean absolute difference between neighbouring pixels; images only.
    """

    steps: Annotated[int, Ge(1)] = 300
    lr: Annotated[float, Gt(0)] = 0.1
    distance: Literal["cosine", "squared"] = "cosine"
    variation: Annotated[float, Ge(0)] = 0.0


@dataclass(frozen=True, slots=True)
class Found:
    """What an attack came to: inputs, secrets, and how far their gradient is from the one that was seen."""

    x: Tensor
    secrets: Tree
    distance: float


def invert(
    loss: Loss, weights: Sequence[Tensor], observed: Sequence[Tensor], start: Tensor, secrets: Tree,
    optimise: Sequence[str] = (), knobs: Inversion = Inversion(),
) -> Found:  # fmt: skip
    """The inputs whose gradient is nearest to the observed one; the best of all steps.

    Args:
        loss: must depend on ``weights`` (which require a gradient).
        observed: d loss / d weights at the site.
        start: first guess of the inputs.
        secrets: first guess of what else the loss needs.
        optimise: which of these to optimise too.
    """
    x = start.detach().clone().requires_grad_()
    guess = {n: t.detach().clone().requires_grad_(n in optimise) for n, t in secrets.items()}
    free = [x, *(guess[n] for n in optimise)]
    optimiser = torch.optim.Adam(free, lr=knobs.lr)
    best = Found(x.detach().clone(), {}, float("inf"))
    for _ in range(knobs.steps):
        gradient = torch.autograd.grad(loss(guess, x), list(weights), create_graph=True)
        d = gradient_distance(gradient, observed, knobs.distance)
        if float(d.detach()) < best.distance:
            best = Found(x.detach().clone(), {n: t.detach().clone() for n, t in guess.items()}, float(d.detach()))
        if knobs.variation:
            d = d + knobs.variation * (x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean())
        for p, g in zip(free, torch.autograd.grad(d, free), strict=True):
            p.grad = g
        optimiser.step()
    return best


def gradient_distance(ours: Sequence[Tensor], observed: Sequence[Tensor], distance: str) -> Tensor:
    """Between two lists of gradients, each taken as one vector."""
    a, b = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (ours, observed))
    if distance == "squared":
        squared: Tensor = (a - b).square().sum()
        return squared
    cosine: Tensor = torch.dot(a, b) / (a.norm() * b.norm()).clamp(min=1e-12)
    return 1 - cosine


def reconstruction_error(found: Tensor, truth: Tensor) -> float:
    """Mean squared error per entry, each found row against the true row that is nearest to it."""
    apart = (found.flatten(1)[:, None] - truth.flatten(1)[None]).square().mean(2)
    return float(apart.min(1).values.mean())
