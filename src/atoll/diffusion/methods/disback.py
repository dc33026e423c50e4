"""DisBack: distribution backtracking distillation."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from atoll.core.card import Card, Cite
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Distiller, Draw, Needs, Nets, Role, Update, Work, usual
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.score_distillation import ScoreDistillation
from atoll.diffusion.trail import Recorder

CARD = Card(
    name="disback",
    area="few-step distillation",
    summary="the teacher is first degraded to fit the untrained student, which then follows it back to itself",
    cites=(
        Cite(
            authors="Zhang, Yang, Li, Zhao, Meng, Yang, Yang, Yang, Sun", year=2024, arxiv="2408.15991",
            title="Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation",
        ),
    ),
    suits=("generative models", "few calls a sample", "distilling without data"),
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Where the parts of a run begin.

    Attributes:
        every: steps between two checkpoints of the degradation.
        degrading: steps that it takes in all; 0 where there is no path.
        switch: steps for which the student follows one of the path's targets.
    """

    every: int
    degrading: int
    switch: int


@dataclass(frozen=True)
class DisBack(Distiller):
    """Distribution backtracking (Zhang et al., 2024, arXiv 2408.15991), around any score distillation.

    A teacher knows little about what an untrained student makes. So a copy of it, which is the fake score, first learns
    those samples, and is saved on the way: teacher = c_0, c_1, ..., c_N. Then the student's real score is that of
    c_{N-1}, ..., c_1 in turn, and from then on the teacher's own. Degradation is part of the run: its first steps, each
    of which costs one update of the fake score. A run too short to have a path is the base method. The published
    pseudo-code divides where it must take a remainder; and on the path the teacher is not guided (our choice: what
    was degraded on a student's samples has no null condition to be guided away from).

    On the ring, where a student starts as the teacher's copy, it gains nothing: with as many steps in all it is behind
    its base at first and level with it at the end.

    Args:
        base: the method that is helped.
        targets: N; 0 is the base method, bit for bit.
        degrade: share of the run in which the path is recorded.
        backtrack: share of the rest in which it is walked back.
    """

    base: ScoreDistillation = usual("dmd")
    targets: Annotated[int, Ge(0)] = 5
    degrade: Annotated[float, Gt(0), Le(0.5)] = 0.08
    backtrack: Annotated[float, Gt(0), Le(1)] = 0.3

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return self.base.needs

    @property
    def few(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.few

    def plan(self, steps: int) -> Plan:
        n = self.targets
        every = min(max(1, round(self.degrade * steps / n)), steps // 2 // n) if n else 0
        rest = steps - every * n
        return Plan(every, every * n, max(1, round(self.backtrack * rest / max(1, n - 1))))

    def target(self, step: int, steps: int) -> int:
        """Which c_i the student follows at a step of the run; 0 is the teacher."""
        plan = self.plan(steps)
        return max(0, self.targets - 1 - (step - plan.degrading) // plan.switch) if plan.degrading else 0

    def material(self, teacher: Denoiser, work: Work) -> dict[str, Tensor]:
        return self.base.material(teacher, work)

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        roles = self.base.roles(teacher, work)
        if self.targets:
            fake = roles["fake"].module
            roles["target"] = Role(copy.deepcopy(fake))
            roles["path"] = Role(Recorder(self.targets - 1, fake))  # c_N need not be kept: the fake score is c_N
        return roles

    def begin(self, nets: Nets, step: int, steps: int) -> Iterable[str]:
        plan = self.plan(steps)
        if step < plan.degrading:
            return
        now, inner = self.target(step, steps), step - plan.degrading
        if now and inner % plan.switch == 0:
            path: Any = nets["path"]
            path.trail.put(now - 1, nets["target"])
        if plan.degrading and not inner:
            yield "fake"
        yield from self.base.begin(self.seen(nets, now), inner, steps - plan.degrading)

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        plan = self.plan(draw.steps)
        if draw.step < plan.degrading:
            yield "fake", self.degradation(nets, draw)
            saved, rest = divmod(draw.step + 1, plan.every)
            if not rest and saved < self.targets:
                path: Any = nets["path"]
                path.write(saved - 1, nets["fake"])
            return
        now = self.target(draw.step, draw.steps)
        own = dataclasses.replace(draw, step=draw.step - plan.degrading, steps=draw.steps - plan.degrading)
        yield from self.towards(now).updates(self.seen(nets, now), own)

    def degradation(self, nets: Nets, draw: Draw) -> dict[str, Tensor]:
        """Denoising of what the untrained student makes, without a discriminator."""
        student: Any = nets["student"]
        with torch.no_grad():
            sample = self.base.rollout(student, draw)
        losses = self.base.critic_losses(nets, sample, draw)
        return {name: loss for name, loss in losses.items() if name != "discriminator"}

    def seen(self, nets: Nets, target: int) -> dict[str, nn.Module]:
        """The networks as the base method sees them."""
        return {**nets, "teacher": nets["target"]} if target else dict(nets)

    def towards(self, target: int) -> ScoreDistillation:
        """The base method, unguided while it follows a degraded teacher."""
        if target and self.base.guidance.scale > 1:
            return dataclasses.replace(self.base, guidance=Guidance())
        return self.base

    def generate(
        self, nets: Nets, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.base.generate(nets, z, cond, calls, generator)
