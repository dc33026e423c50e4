"""Step down with a strong model, go back up with a weak one: what is left is their difference (Bai et al., 2025).

A reflection moves a point before the solver's own step, so it goes with every deterministic solver, and the strong and
the weak *guess* may differ in anything: weights, guidance, the scale of a LoRA, a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.diffusion.schedules import NoiseSchedule, convert
from atoll.diffusion.solvers import Guess, ddim_step

Solver = Callable[..., Tensor]
"""One of ``solvers.SOLVERS``: ``(schedule, guess, x, times, before=...) -> x``."""


def invert_step(schedule: NoiseSchedule, x: Tensor, x0: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """From a point at the cleaner time ``to`` back up to ``t``, along the noise that a guess made at ``t`` implies."""
    eps = convert(schedule, x0, "x0", "eps", x, t)
    return schedule.alpha(t) / schedule.alpha(to) * (x - schedule.sigma(to) * eps) + schedule.sigma(t) * eps


def reflected(schedule: NoiseSchedule, strong: Guess, weak: Guess, x: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """One step from ``t`` to ``to`` with the strong guess, inverted with the weak one; two calls.

    To first order it adds ``alpha (r - r') / r (strong - weak)``, with r = sigma / alpha, to ``x``: the clean samples'
    difference, as far as the step reaches.
    """
    there = ddim_step(schedule, x, strong(x, t), t, to)
    return invert_step(schedule, there, weak(there, t), t, to)


def reflections(times: int, first: int | None) -> int:
    """How many of ``times`` solver steps are reflected: the ``first`` ones, but never the last."""
    return max(0, times - 1) if first is None else min(first, max(0, times - 1))


def reflect(solver: Solver, weak: Guess, first: int | None = None, gap: float = 1.0) -> Solver:
    """``solver`` with a reflection before each of its ``first`` steps (None: all but the last), against ``weak``.

    Args:
        gap: how much of the reflection's displacement is kept.
    """

    def run(schedule: NoiseSchedule, strong: Guess, x: Tensor, times: Tensor) -> Tensor:
        until = times[reflections(len(times) - 1, first)]

        def before(x: Tensor, t: Tensor, to: Tensor) -> Tensor:
            if t <= until:
                return x
            return torch.lerp(x, reflected(schedule, strong, weak, x, t, to), gap)

        return solver(schedule, strong, x, times, before=before)

    return run


@contextmanager
def lora_scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """Inside, what the model's LoRA adapters add is multiplied by ``factor`` (which may be negative).

    Raises:
        AtollError: when the model has none.
    """
    from atoll.adapters.lora import lora_layers

    layers = list(lora_layers(model).values())
    if not layers:
        raise AtollError("A pair of LoRA scales needs a model with LoRA adapters, and this one has none.")
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: factor * value for name, value in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
