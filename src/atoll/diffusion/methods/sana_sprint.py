"""SANA-Sprint: continuous-time consistency in TrigFlow, with a discriminator on the teacher's features."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from atoll.core.card import Card, Cite
from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser, viewed
from atoll.diffusion.distiller import Distiller, Draw, Needs, Nets, Role, Update, Work, best
from atoll.diffusion.gan_heads import Adversary
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.losses import inner
from atoll.diffusion.rollouts import Sample, clean, few_steps
from atoll.diffusion.rows import Rows
from atoll.diffusion.schedules import LogNormal, TimeLaw, Trig, add_noise, convert, shaped
from atoll.diffusion.tangent import jvp_tangent

CARD = Card(
    name="sana_sprint",
    area="few-step distillation",
    summary="the answer is constant along the teacher's flow, to first order exactly, and looks real to its features",
    cites=(
        Cite(
            authors="Chen, Xue, Zhao, Yu, Paul, Chen, Cai, Han, Xie", year=2025, arxiv="2503.09641",
            title="SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation",
        ),
        Cite(
            authors="Lu, Song", year=2024, arxiv="2410.11081",
            title="Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
        ),
        Cite(
            authors="Sauer, Boesel, Dockhorn, Blattmann, Esser, Rombach", year=2024, arxiv="2403.12015",
            title="Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation",
        ),
    ),
    suits=("generative models", "few calls a sample"),
)  # fmt: skip


def consistency_gradient(
    said: Tensor, slope: Tensor, x_t: Tensor, t: Tensor, along: Tensor, r: float
) -> Tensor:  # fmt: skip
    """``cos t df/dt`` of ``f = cos t x_t - sin t U`` on the teacher's trajectory; the part that asks for a second look
    comes in with r.

    Args:
        said: U, the student's sd F: the slope dx/dt that it would follow.
        slope: dx/dt of the teacher.
        along: derivative of U along ``cos t sin t (dx/dt, 1)``.
        r: from 0 (then g only makes U the teacher's slope) to 1 (then g = 0 where f is a consistency function).
    """
    c, s = shaped(t.cos(), x_t), shaped(t.sin(), x_t)
    return -(c**2) * (said - slope) - r * (c * s * x_t + along)


class LogVariance(nn.Module):
    """How large the loss at a time ``[B]`` usually is, as a logarithm ``[B]``; it starts at zero."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, 1))
        for p in self.body[-1].parameters():
            nn.init.zeros_(p)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * 2.0 ** torch.arange(8, device=t.device)
        out: Tensor = self.body(torch.cat([angles.cos(), angles.sin()], 1))[:, 0].float()
        return out


@dataclass(frozen=True)
class SanaSprint(Distiller):
    """SANA-Sprint (Chen et al., 2025, arXiv 2503.09641): sCM (Lu and Song, 2024, 2410.11081) and LADD (Sauer et al.,
    2024, 2403.12015).

    Any teacher is looked at as a TrigFlow model: the same point at the same ratio sigma / alpha, without training. The
    student's answer has to be constant along the teacher's flow; its derivative there is exact (forward mode). The
    discriminator adds what squared errors blur. Left out: the paper's changes to its teacher (normalised queries and
    keys, times in [0, 1]), and that the student is told the scale of guidance: one scale becomes part of it.

    Args:
        scm: the consistency loss; without it the discriminator teaches alone.
        adversary: the discriminator; None leaves it out.
        guidance: of the teacher; the student is then sampled without any.
        law: noise levels of both losses.
        max_time: share of the discriminator's samples that the student makes from noise alone.
        warmup: share of the run over which the derivative comes in.
        norm: c of ``g / (|g| + c)``.
        exact: derivative in forward mode; otherwise by central differences, at two calls.
        high: ratio sigma / alpha where sampling starts, and the highest of training.
        middle: angle at which samples of two calls are noised again.
        rows: what is noised: real images, or samples that the teacher has made (without an adversary).
        lr, critic_lr: of the student, and of the discriminator and the weighting.
        ema: decay of the average that is kept in the end.
    """

    scm: bool = True
    adversary: Adversary | None = Adversary(
        on="teacher", blocks=4, apart=True, misaligned=True, kind="hinge", weight=0.5, critic_weight=1.0,
        law=LogNormal(-0.6, 1.0),
    )  # fmt: skip
    guidance: Guidance = Guidance()
    law: TimeLaw = LogNormal(0.2, 1.6)
    max_time: Annotated[float, Ge(0), Le(1)] = 0.5
    warmup: Annotated[float, Ge(0), Le(1)] = 0.2
    norm: Annotated[float, Gt(0)] = 0.1
    exact: bool = True
    high: Annotated[float, Gt(0)] = 40.0
    middle: Annotated[float, Gt(0), Le(1.57)] = 1.3
    rows: Rows = Rows()
    lr: Annotated[float, Gt(0)] = 1e-4
    critic_lr: Annotated[float, Gt(0)] = 3e-4
    ema: Annotated[float, Ge(0), Le(1)] = 0.97
    few: ClassVar[tuple[int, ...]] = (1, 2, 4)

    def __post_init__(self) -> None:
        if not self.scm and self.adversary is None:
            raise AtollError(
                "Without `scm` and without an `adversary` there is nothing to learn; switch one of them on."
            )

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return "images" if self.adversary is not None else self.rows.needs

    def material(self, teacher: Denoiser, work: Work) -> dict[str, Tensor]:
        return self.rows.material(teacher, work)

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        roles = {
            "teacher": Role(teacher, saved=False),
            "student": Role(work.copy_of(teacher), self.lr, ema=self.ema),
        }
        if self.scm:
            roles["variance"] = Role(LogVariance(), self.critic_lr)
        head = self.adversary.head(teacher, work) if self.adversary is not None else None
        if head is not None:
            roles["head"] = Role(head, self.critic_lr)
        return roles

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        nets["student"].train()  # with its dropout, where it has some
        losses = {"consistency": self.consistency(nets, draw)} if self.scm else {}
        if self.adversary is not None:
            losses["adversary"] = self.adversary.generator_loss(nets, self.sample(nets, draw), draw)
        yield ("student", "variance") if self.scm else "student", losses
        if self.adversary is not None:
            with torch.no_grad():
                sample = self.sample(nets, draw)
            yield "head", {"discriminator": self.adversary.critic_loss(nets, sample, draw)}

    def consistency(self, nets: Nets, draw: Draw) -> Tensor:
        """sCM: |F - sg(F + g / (|g| + c))|^2 / (sd tan t), divided by what it usually is at t."""
        student, trig = self.in_trig(nets["student"])
        teacher = viewed(nets["teacher"], trig)  # type: ignore[arg-type]
        x, cond = self.rows.draw(draw)
        t = trig.time(draw.ratios(self.law, len(x)).clamp(max=self.high))
        x_t = add_noise(trig, x, draw.noise_like(x), t)

        def said(x_t: Tensor, t: Tensor) -> Tensor:
            return convert(trig, student(x_t, t, cond), "x0", "flow", x_t, t)

        with torch.no_grad():
            slope = convert(trig, self.guidance(teacher, x_t, t, cond), "x0", "flow", x_t, t)
            both = t.cos() * t.sin()
            before, along = jvp_tangent(said, (x_t, t), (shaped(both, x) * slope, both), self.exact)
            g = consistency_gradient(before, slope, x_t, t, along, self.share(draw.progress))
            g = g / shaped(inner(g, g).sqrt() + self.norm, g)
        change = (said(x_t, t) - before) / trig.sigma_data - g
        usual = nets["variance"](t)
        loss: Tensor = (inner(change, change) / trig.ratio(t) * (-usual).exp() + usual).mean()
        return loss

    def share(self, progress: float) -> float:
        """How much of the derivative counts."""
        return min(1.0, progress / self.warmup) if self.warmup else 1.0

    def sample(self, nets: Nets, draw: Draw) -> Sample:
        """What the discriminator sees: the student's answers at the law's noise levels, many at the highest."""
        student, trig = self.in_trig(nets["student"])
        x, cond = self.rows.draw(draw)
        ratio = draw.ratios(self.law, len(x)).clamp(max=self.high)
        t = trig.time(torch.where(draw.uniform(len(x)) < self.max_time, self.high, ratio))
        return clean(student(add_noise(trig, x, draw.noise_like(x), t), t, cond), cond)

    def in_trig(self, network: nn.Module) -> tuple[Denoiser, Trig]:
        denoiser: Any = network
        trig = Trig(denoiser.sigma_data)
        return viewed(denoiser, trig), trig

    def generate(
        self, nets: Nets, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        student, trig = self.in_trig(best(nets).eval())
        first = math.atan(self.high / trig.sigma_data)
        angles = first * torch.arange(calls, -1, -1, dtype=torch.float64) / calls
        if calls == 2:
            angles[1] = self.middle
        return few_steps(student, z, cond, trig.ratio(angles), generator)
