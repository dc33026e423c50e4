"""DOLLAR: score distillation for quality, consistency for coverage, and a learned reward for taste."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from atoll.core.card import Card, Cite
from atoll.diffusion.consistency import Gaps, apart
from atoll.diffusion.denoiser import Denoiser, viewed
from atoll.diffusion.distiller import Draw, Needs, Nets, Role, Update, Work
from atoll.diffusion.latent_reward import LatentReward
from atoll.diffusion.rollouts import RandomExit, Rollout, Sample
from atoll.diffusion.rows import Rows
from atoll.diffusion.schedules import LogNormal, TimeLaw, add_noise
from atoll.diffusion.score_distillation import ScoreDistillation
from atoll.diffusion.solvers import ddim_step

CARD = Card(
    name="dollar",
    area="few-step distillation",
    summary="difference of scores, consistency along the teacher's steps, and a learned stand-in for any reward",
    cites=(
        Cite(
            authors="Ding, Jin, Liu, Zheng, Singh, Zhang, Kang, Lin, Liu", year=2024, arxiv="2412.15689",
            title="DOLLAR: Few-Step Video Generation via Distillation and Latent Reward Optimization",
        ),
    ),
    suits=("generative models", "few calls a sample"),
)  # fmt: skip


@dataclass(frozen=True)
class Dollar(ScoreDistillation):
    """DOLLAR (Ding et al., 2024, arXiv 2412.15689), for clips, images or points.

    The student guesses the clean sample at each of K noise levels, with fresh noise between guesses. A random one of
    its guesses follows the difference of teacher's and fake score, as in DMD; that gives quality. Beside it, its ends
    from two neighbouring points of the guided teacher's DDIM trajectory are to be the same; that keeps coverage. A
    reward of any kind, known by its answers alone, is learned by a small network, whose gradient joins in as soon as it
    ranks new samples well. ``consistency: 0`` without a reward is DMD with the same rollout.

    What the paper leaves open: both losses are means over numbers (a root of the squared distance over the root of
    their count), so that equal weights pull equally hard at a sample; gaps are weighted alike.

    Args:
        consistency: weight of the second loss.
        gaps: between the two points of it; the paper's teacher takes 50 steps.
        consistency_law: noise levels of the upper point.
        rows: what is noised for it: real images, or samples that the teacher has made.
        taste: a reward, and how much it counts; None: none. The difference of scores stays: without it, a reward is
            soon satisfied by samples that no longer look like the data.
    """

    rollout: Rollout = RandomExit()
    consistency: Annotated[float, Ge(0)] = 1.0
    gaps: Gaps = Gaps(first=50, last=50)
    consistency_law: TimeLaw = LogNormal(-1.1, 2.0)
    rows: Rows = Rows()
    taste: LatentReward | None = None

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        own = ScoreDistillation.needs.fget(self)  # type: ignore[attr-defined]
        return self.rows.needs if self.consistency and own == "nothing" else own

    def material(self, teacher: Denoiser, work: Work) -> dict[str, Tensor]:
        return self.rows.material(teacher, work) if self.consistency else {}

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        roles = super().roles(teacher, work)
        if self.taste is not None and self.taste.share:
            roles["reward"] = Role(self.taste.net(teacher, work), self.taste.lr, betas=(0.9, 0.999))
        return roles

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        yield from super().updates(nets, draw)
        # The reward's random numbers come last: until it is believed, the student is the one that it would be without.
        if "reward" in nets and self.taste is not None and draw.step % self.taste.every == 0:
            with torch.no_grad():
                sample = self.rollout(nets["student"], draw)  # type: ignore[arg-type]
            yield from self.taste.learn(nets["reward"], sample.x, sample.cond, draw)  # type: ignore[arg-type]

    def generator_losses(self, nets: Nets, sample: Sample, draw: Draw) -> dict[str, Tensor]:
        losses = super().generator_losses(nets, sample, draw)
        if "reward" in nets and self.taste is not None:
            liked = self.taste.generator_loss(nets["reward"], sample.x, sample.cond, losses["scores"])  # type: ignore[arg-type]
            losses |= {} if liked is None else {"reward": liked}
        if self.consistency:
            losses["consistency"] = self.consistency * self.consistency_loss(nets, draw)
        return losses

    def consistency_loss(self, nets: Nets, draw: Draw) -> Tensor:
        """Where the student sees two neighbouring points of one teacher trajectory end, apart."""
        student: Any = nets["student"]
        x, cond = self.rows.draw(draw)
        high, low = self.gaps.pair(draw.ratios(self.consistency_law, len(x)), self.gaps.widths(draw.progress))
        t, r = student.schedule.time(high), student.schedule.time(low)
        x_t = add_noise(student.schedule, x, draw.noise_like(x), t)
        with torch.no_grad():
            guess = self.guidance(viewed(nets["teacher"], student.schedule), x_t, t, cond)  # type: ignore[arg-type]
            x_r = ddim_step(student.schedule, x_t, guess, t, r)
        distance = apart(student, student, x_t, t, x_r, r, cond, self.gaps.low)
        loss: Tensor = distance.mean() / x[0].numel() ** 0.5
        return loss
