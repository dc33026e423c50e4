"""TDM: trajectory distribution matching."""

from __future__ import annotations

from dataclasses import dataclass

from atoll.core.card import Card, Cite
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Role, Work
from atoll.diffusion.losses import CriticLoss, GeneratorLoss, ImportanceDenoising, TDMLoss
from atoll.diffusion.numbered import with_numbers
from atoll.diffusion.rollouts import OdePrefix
from atoll.diffusion.schedules import TimeLaw, UniformTime
from atoll.diffusion.score_distillation import ScoreDistillation

CARD = Card(
    name="tdm",
    area="few-step distillation",
    summary="a deterministic few-step student whose every trajectory point follows the teacher's distribution there",
    cites=(
        Cite(
            authors="Luo, Hu, Song, Sun, Tang", year=2025, arxiv="2503.06674",
            title="Learning Few-Step Diffusion Models by Trajectory Distribution Matching",
        ),
    ),
    suits=("generative models", "few calls a sample", "distilling without data"),
)  # fmt: skip


@dataclass(frozen=True)
class TDM(ScoreDistillation):
    """Trajectory distribution matching (Luo et al., 2025, arXiv 2503.06674).

    The student takes K steps of the probability flow, so the same noise gives the same sample. For each sample one step
    is drawn and done again with a graph; the point where it ends, noised further, is judged by both scores, and the
    step's clean guess follows their difference. With K = 1 this is DMD. No data is needed.

    Steps-aware: with several ``counts`` one student serves them all. It is told K, and the fake score K and the step,
    so that targets stay apart; networks that take no numbers get a branch for them (``atoll.diffusion.numbered``).
    """

    loss: GeneratorLoss = TDMLoss()
    rollout: OdePrefix = OdePrefix()
    critic: CriticLoss = ImportanceDenoising()
    law: TimeLaw = UniformTime()
    critic_law: TimeLaw = UniformTime()

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        roles = super().roles(teacher, work)
        if self.rollout.numbers:
            for name in ("student", "fake"):
                role = roles[name]
                role.module = with_numbers(role.module, self.rollout.numbers, work)  # type: ignore[arg-type]
        return roles
