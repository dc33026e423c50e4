"""DMD, Diff-Instruct, VSD: one gradient under three names."""

from __future__ import annotations

from dataclasses import dataclass

from atoll.core.card import Card, Cite
from atoll.diffusion.score_distillation import ScoreDistillation

CARD = Card(
    name="dmd",
    area="few-step distillation",
    summary="a one-step generator follows the difference of the teacher's score and its own",
    cites=(
        Cite(authors="Luo, Hu, Zhang, Sun, Li, Zhang", year=2023, title="Diff-Instruct", arxiv="2305.18455"),
        Cite(authors="Wang, Lu, Wang, Bao, Li, Su, Zhu", year=2023, title="ProlificDreamer", arxiv="2305.16213"),
        Cite(
            authors="Yin, Gharbi, Zhang, Shechtman, Durand, Freeman, Park", year=2023, arxiv="2311.18828",
            title="One-step Diffusion with Distribution Matching Distillation",
        ),
        Cite(
            authors="Yin, Gharbi, Park, Zhang, Shechtman, Durand, Freeman", year=2024, arxiv="2405.14867",
            title="Improved Distribution Matching Distillation for Fast Image Synthesis",
        ),
    ),
    suits=("generative models", "few calls a sample", "distilling without data"),
)  # fmt: skip


@dataclass(frozen=True)
class DMD(ScoreDistillation):
    """Distribution matching distillation (Yin et al., 2023/24, arXiv 2311.18828, 2405.14867; Luo et al., 2023,
    2305.18455).

    The gradient of KL(student || teacher), averaged over noise levels, is the difference of the two scores at the
    student's own noised samples; no network is differentiated. No data is needed. DMD's regression on teacher pairs is
    left out, as DMD2 leaves it out; give it an ``adversary`` to have DMD2.
    """
