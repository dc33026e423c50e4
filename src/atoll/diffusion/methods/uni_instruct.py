"""Uni-Instruct: one-step distillation by any f-divergence."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from atoll.core.card import Card, Cite
from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Draw, Nets, Role, Work
from atoll.diffusion.f_divergences import LevelMean
from atoll.diffusion.gan_heads import Adversary
from atoll.diffusion.losses import Probe, RatioLoss, UniLoss
from atoll.diffusion.rollouts import Sample
from atoll.diffusion.schedules import UniformTime
from atoll.diffusion.score_distillation import ScoreDistillation

CARD = Card(
    name="uni_instruct",
    area="few-step distillation",
    summary="a one-step generator minimises any f-divergence: two gradients of scores, weighted by a learned ratio",
    cites=(
        Cite(
            authors="Wang, Bai, Zhang, Zhang, Luo, Sun", year=2025, arxiv="2505.20755",
            title="Uni-Instruct: One-step Diffusion Model through Unified Diffusion Divergence Instruction",
        ),
        Cite(
            authors="Xu, Nie, Vahdat", year=2025, arxiv="2502.15681",
            title="One-step Diffusion Models with f-Divergence Distribution Matching",
        ),
    ),
    suits=("generative models", "few calls a sample"),
)  # fmt: skip


@dataclass(frozen=True)
class UniInstruct(ScoreDistillation):
    """Uni-Instruct (Wang et al., 2025, arXiv 2505.20755).

    A divergence D_f(data || student) is the integral over noise levels of E_student[H(rho) |s_fake - s_real|^2] with
    H = rho^2 f''. Its gradient, which cannot be had directly, equals one of two known kinds, that of Diff-Instruct and
    that of SIM, under weights that depend on the density ratio rho alone; a discriminator estimates rho, so real rows
    are needed. Not so for the reverse KL divergence, whose weights are 1: pass ``adversary=None`` with it.

    Here the weights are divided by their running mean at each noise level, so that a divergence chooses between samples
    and not between levels, and what the gradient has because rho depends on the student is bounded (see
    :class:`UniLoss`): exact with the exact ratio, it ran away with a learnt one. (The paper's own constants per
    divergence could not be checked.)

    Args:
        loss: the divergence: :class:`UniLoss`, or the DMD gradient with the same weights, :class:`FDistillLoss`.
        adversary: who estimates the ratio. It judges where the generator is judged.
        warmup: fraction of the run, at its start, in which the ratio is taken as 1 everywhere (which is the reverse KL
            divergence), while the discriminator learns.
    """

    loss: RatioLoss = UniLoss()
    adversary: Adversary | None = Adversary(weight=1e-4, critic_weight=1.0, law=UniformTime(0.02, 0.98), clip=20.0)
    warmup: Annotated[float, Ge(0), Le(1)] = 0.1

    def __post_init__(self) -> None:
        if self.adversary is not None and self.adversary.kind == "hinge":
            raise AtollError(
                "A hinge discriminator's logit says nothing about the density ratio; let `adversary.kind` be softplus "
                "or bce."
            )

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        return {**super().roles(teacher, work), "levels": Role(LevelMean())}

    def probe(self, nets: Nets, sample: Sample, draw: Draw) -> Probe:
        probe = super().probe(nets, sample, draw)
        if probe.rho is None or draw.progress < self.warmup:
            return dataclasses.replace(probe, rho=None)
        return dataclasses.replace(probe, usual=nets["levels"](probe.ratio, self.loss.weight(probe.rho)))
