"""SIM: score implicit matching."""

from __future__ import annotations

from dataclasses import dataclass

from atoll.core.card import Card, Cite
from atoll.diffusion.losses import GeneratorLoss, SIMLoss
from atoll.diffusion.score_distillation import ScoreDistillation

CARD = Card(
    name="sim",
    area="few-step distillation",
    summary="a one-step generator minimises any distance between the two scores, through their gradients",
    cites=(
        Cite(
            authors="Luo, Huang, Geng, Kolter, Qi", year=2024, arxiv="2410.16794",
            title="One-Step Diffusion Distillation through Score Implicit Matching",
        ),
    ),
    suits=("generative models", "few calls a sample", "distilling without data"),
)  # fmt: skip


@dataclass(frozen=True)
class SIM(ScoreDistillation):
    """Score implicit matching (Luo et al., 2024, arXiv 2410.16794).

    Minimises the distance d(s_fake - s_real) over noised student samples; the score-gradient theorem gives its
    parameter gradient without the derivative of the fake score's weights. The Huber distance normalises each sample by
    itself, so no step is huge however bad the start. No data is needed.
    """

    loss: GeneratorLoss = SIMLoss()
