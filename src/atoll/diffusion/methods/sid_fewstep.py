"""Few-step SiD with Zero-CFG and Anti-CFG."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Gt

from atoll.core.card import Card, Cite
from atoll.core.errors import AtollError
from atoll.diffusion.distiller import Draw, Nets, Update
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.losses import GeneratorLoss, SiDLoss
from atoll.diffusion.rollouts import RandomExit, Rollout
from atoll.diffusion.score_distillation import ScoreDistillation

CARD = Card(
    name="sid_fewstep",
    area="few-step distillation",
    summary="score identity distillation of all steps of a short re-noising chain at once; guidance set role by role",
    cites=(
        Cite(
            authors="Zhou, Zheng, Wang, Yin, Huang", year=2024, arxiv="2404.04057",
            title="Score Identity Distillation",
        ),
        Cite(
            authors="Zhou, Wang, Zheng, Huang", year=2024, arxiv="2406.01561",
            title="Long and Short Guidance in Score Identity Distillation for One-Step Text-to-Image Generation",
        ),
        Cite(
            authors="Zhou, Gu, Wang", year=2025, arxiv="2505.12674",
            title="Few-Step Diffusion via Score Identity Distillation",
        ),
    ),
    suits=("generative models", "few calls a sample", "distilling without data"),
)  # fmt: skip

Mode = Literal["none", "cfg", "lsg", "zero", "anti"]


@dataclass(frozen=True)
class SidFewstep(ScoreDistillation):
    """Few-step score identity distillation (Zhou, Gu and Wang, 2025, arXiv 2505.12674).

    One generator makes K guesses, each from the last one with fresh noise; if their uniform mixture follows the data,
    each of them does. So a step is drawn for each sample and its guess is judged by SiD's loss; the fake score is not
    told which. Earlier steps carry no graph. With K = 1 this is SiD.

    Guidance has three scales: of the fake score while it learns and while it judges, and of the teacher.

    ====== ============ ============= ======= ==========================================================
    mode   fake, learns fake, judges  teacher
    ====== ============ ============= ======= ==========================================================
    cfg    1            1             scale   the student learns the guided teacher
    lsg    scale        scale         scale   long and short guidance
    zero   0            0             1       Zero-CFG: the fake score never sees a condition
    anti   1            -scale        1       Anti-CFG: it learns with one in ten hidden, and judges against
    ====== ============ ============= ======= ==========================================================

    No data is needed. With some, ``adversary=Adversary(learned=False, weight=1e-4)`` adds SiDA's discriminator, which
    is the mean over channels of the fake score's features and has no weights of its own.

    Args:
        mode: sets the three scales. ``none`` leaves ``guidance``, ``fake_guidance``, ``fake_condition`` and
            ``fake_drop`` as they are given: no guidance, unless they say so.
        scale: of the guidance that ``mode`` turns on; None takes 2, and 1 for ``anti``.
    """

    loss: GeneratorLoss = SiDLoss()
    rollout: Rollout = RandomExit()
    mode: Mode = "none"
    scale: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        given = (self.guidance, self.fake_guidance, self.fake_condition, self.fake_drop)
        if self.mode != "none" and given != (Guidance(), Guidance(), Guidance(), 0.0):
            raise AtollError(
                f"`mode: {self.mode}` sets the guidance of all roles; leave `guidance`, `fake_guidance`, "
                "`fake_condition` and `fake_drop` out, or use `mode: none`."
            )
        if self.mode in ("none", "zero") and self.scale is not None:
            raise AtollError(f"`mode: {self.mode}` takes no `scale`; choose `cfg`, `lsg` or `anti`, or leave it out.")

    def spelt_out(self) -> SidFewstep:
        """The same with its mode written as the guidance of each role."""
        if self.mode == "none":
            return self
        w = self.scale or (1.0 if self.mode == "anti" else 2.0)
        learns, judges, teacher = {
            "cfg": (1.0, 1.0, w), "lsg": (w, w, w), "zero": (0.0, 0.0, 1.0), "anti": (1.0, -w, 1.0),
        }[self.mode]  # fmt: skip
        return replace(
            self, mode="none", scale=None, guidance=Guidance(teacher), fake_guidance=Guidance(judges),
            fake_condition=Guidance(learns), fake_drop=0.1 if self.mode == "anti" else 0.0,
        )  # fmt: skip

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        return ScoreDistillation.updates(self.spelt_out(), nets, draw)
