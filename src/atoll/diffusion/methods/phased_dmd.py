"""Phased DMD: experts for noise levels, learned one after the other."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from atoll.core.card import Card, Cite
from atoll.core.tree import copy_, named_tensors
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Nets, Role, Work, best
from atoll.diffusion.losses import CriticLoss, SubInterval
from atoll.diffusion.rollouts import PhasePrefix
from atoll.diffusion.schedules import TimeLaw, UniformTime
from atoll.diffusion.score_distillation import ScoreDistillation
from atoll.diffusion.time_router import TimeRouter

CARD = Card(
    name="phased_dmd",
    area="few-step distillation",
    summary="DMD in phases: each expert learns to bring samples from one noise level to the next, the noisiest first",
    cites=(
        Cite(
            authors="Fan, Qiu, Wu, Wu, Liu, Loy, Liu", year=2025, arxiv="2510.27684",
            title="Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals",
        ),
    ),
    suits=("generative models", "few calls a sample", "distilling without data"),
)  # fmt: skip


@dataclass(frozen=True)
class PhasedDMD(ScoreDistillation):
    """Phased distribution matching distillation (Fan et al., 2025, arXiv 2510.27684).

    The student is several experts, one per stretch of noise levels; each is a copy of the teacher, and learns when the
    ones before it are done and frozen. Its samples stay noisy, are noised further to any level above their own, and
    follow DMD's direction there. Only noisy samples are known then, so the fake score learns from an unbiased target;
    it starts from the teacher again in every phase. No data is needed.

    Levels suit data of unit variance, as in the paper; for other data ``shift`` and ``ratio`` scale with its standard
    deviation.
    """

    rollout: PhasePrefix = PhasePrefix()
    critic: CriticLoss = SubInterval()
    law: TimeLaw = UniformTime()
    critic_law: TimeLaw = UniformTime()

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        roles = super().roles(teacher, work)
        first: Any = roles["student"].module
        experts = [first, *(work.copy_of(teacher) for _ in range(self.rollout.phases - 1))]
        roles["student"].module = TimeRouter(experts, self.rollout.ends[:-1])
        # What the fake score starts from again: the teacher, unless a fresh network stands in for its copies.
        fresh = copy.deepcopy(roles["fake"].module) if work.build is not None else teacher
        return {**roles, "origin": Role(fresh, saved=False)}

    def begin(self, nets: Nets, step: int, steps: int) -> Iterable[str]:
        """Next phase: what is averaged is what later phases see and what is sampled; the fake score starts afresh."""
        phase = self.rollout.phase
        if step == 0 or phase(step, steps) == phase(step - 1, steps):
            return ()
        with torch.no_grad():
            copy_(named_tensors(nets["student"]), named_tensors(best(nets)))
            copy_(named_tensors(nets["fake"]), named_tensors(nets["origin"]))
        return "student", "fake"
