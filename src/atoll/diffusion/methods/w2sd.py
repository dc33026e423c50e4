"""W2SD: better samples from a pair of models, a strong and a weak one, without training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from atoll.core.card import Card, Cite
from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser, viewed
from atoll.diffusion.distiller import Distiller, Draw, Nets, Role, Update, Work
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.reflection import lora_scaled, reflect, reflections
from atoll.diffusion.schedules import as_times
from atoll.diffusion.solvers import SOLVERS, Guess, Sampler, start

CARD = Card(
    name="w2sd",
    area="sampler",
    summary="each step is reflected between a strong and a weak model, which adds their difference; no training",
    cites=(
        Cite(
            authors="Bai, Sugiyama, Xie", year=2025, arxiv="2502.00473",
            title="Weak-to-Strong Diffusion with Reflection",
        ),
    ),
    suits=("generative models", "pretrained models"),
)  # fmt: skip


@dataclass(frozen=True)
class W2SD(Distiller):
    """Weak-to-strong diffusion (Bai, Sugiyama and Xie, 2025, arXiv 2502.00473).

    What a strong model lacks towards the ideal one cannot be known, but what a weak model lacks towards the strong one
    can, and both often point the same way. So before each of its first steps the sample is denoised by one step of the
    strong model and inverted by one of the weak: to first order it moves by their difference. Three predictions a
    reflected step, and where one is guided, each of those counts twice.

    The pair is the teacher under two guidances; or the teacher and ``weak_model``, such as a half-trained copy, or the
    common model when the teacher is a site's own; or two scales of the teacher's LoRA. Guidances a and b make, to first
    order, the guidance 2 a - b; large differences overshoot as a large scale does: lower ``first`` or ``gap``. Nothing
    is trained.

    Args:
        strong, weak: guidance of either.
        weak_model: the weak model; None: the teacher.
        lora: factors of the teacher's LoRA adapters, strong and weak, such as (1.0, -1.5); None leaves them.
        sampler: solver and grid; the number of steps follows from the calls, and its guidance is ``strong``.
        first: how many steps, from the noisy end, are reflected; None: all but the last.
        gap: how much of the difference is added.
    """

    strong: Guidance = Guidance(2.0)
    weak: Guidance = Guidance(1.0)
    weak_model: Denoiser | None = None
    lora: tuple[float, float] | None = None
    sampler: Sampler = Sampler(solver="ddim", steps=8)
    first: Annotated[int, Ge(0)] | None = None
    gap: Annotated[float, Ge(0)] = 1.0

    def __post_init__(self) -> None:
        if self.lora is not None and self.weak_model is not None:
            raise AtollError("w2sd takes its weak model from `weak_model` or from a scale in `lora`, not from both.")

    @property
    def few(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.calls(max(1, self.sampler.steps // 2)), self.calls(self.sampler.steps)

    def calls(self, steps: int) -> int:
        """Rows that go through networks per sample."""
        plain = replace(self.sampler, steps=steps, guidance=self.strong).calls
        return plain + reflections(steps, self.first) * (self.strong.calls + self.weak.calls)

    def steps(self, calls: int) -> int:
        """The most steps that ``calls`` allow, at least one."""
        steps = 1
        while self.calls(steps + 1) <= calls:
            steps += 1
        return steps

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        roles = {"student": Role(teacher, saved=False)}
        if self.weak_model is not None:
            roles["weak"] = Role(self.weak_model.eval(), saved=False)
        return roles

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        yield from ()

    def generate(
        self, nets: Nets, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        model: Denoiser = nets["student"]  # type: ignore[assignment]
        weak: Denoiser = nets.get("weak", model)  # type: ignore[assignment]
        scales = self.lora or (None, None)
        guesses = (
            guess_of(model, self.strong, cond, scales[0]),
            guess_of(viewed(weak, model.schedule), self.weak, cond, scales[1]),
        )
        times = as_times(model.schedule, replace(self.sampler, steps=self.steps(calls)).ratios(), z)
        with torch.no_grad():
            solver = reflect(SOLVERS[self.sampler.solver], guesses[1], self.first, self.gap)
            return solver(model.schedule, guesses[0], start(model.schedule, z, times[0]), times)


def guess_of(denoiser: Denoiser, guidance: Guidance, cond: Tensor, lora: float | None = None) -> Guess:
    """What a denoiser says under a guidance and a scale of its LoRA."""

    def guess(x: Tensor, t: Tensor) -> Tensor:
        with nullcontext() if lora is None else lora_scaled(denoiser, lora):
            return guidance(denoiser, x, t, cond)

    return guess
