"""Match distributions with two scores: the frame that DMD, SiD, SIM, Uni-Instruct, TDM, Phased DMD and others share.

A frozen teacher gives the score of the data, an online *fake score* learns that of the student's samples, and the
student follows their difference. A method is this frame with named differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser, tapped
from atoll.diffusion.distiller import Distiller, Draw, Needs, Nets, Role, Update, Work, best
from atoll.diffusion.gan_heads import Adversary
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.losses import CriticLoss, Denoising, DMDLoss, GeneratorLoss, Noisy, Probe, hidden
from atoll.diffusion.rollouts import OneStep, Rollout, Sample
from atoll.diffusion.schedules import TimeLaw, UniformTime, shaped, step_between


@dataclass(frozen=True)
class ScoreDistillation(Distiller):
    """A generator trained by the difference of two scores.

    Args:
        loss: what the generator descends.
        rollout: how it makes the sample that is judged.
        critic: what the fake score descends.
        law: noise levels at which the generator is judged. SiD's own is ``KarrasIndex``, which looks at details more
            often; here the high levels, where classes and outlines are decided, pay more in short runs.
        critic_law: noise levels at which the fake score learns: it has to be right where it is asked.
        guidance: of the teacher; a student trained with it is sampled without any.
        fake_guidance: of the fake score while it judges.
        fake_condition: of the fake score while it learns: a scale of 0 hides every condition from it.
        fake_drop: fraction of the conditions that are hidden while it learns.
        critic_steps: updates of the fake score per update of the generator.
        lr, critic_lr: of the two Adam optimisers.
        ema: decay of the generator's average, which is what is kept in the end. With an adversary much depends on it:
            the weights themselves circle.
        adversary: a discriminator beside the scores; it needs real images.
    """

    loss: GeneratorLoss = DMDLoss()
    rollout: Rollout = OneStep()
    critic: CriticLoss = Denoising()
    law: TimeLaw = UniformTime(0.02, 0.98)
    critic_law: TimeLaw = UniformTime(0.02, 0.98)
    guidance: Guidance = Guidance()
    fake_guidance: Guidance = Guidance()
    fake_condition: Guidance = Guidance()
    fake_drop: Annotated[float, Ge(0), Le(1)] = 0.0
    critic_steps: Annotated[int, Ge(1)] = 1
    lr: Annotated[float, Gt(0)] = 1e-4
    critic_lr: Annotated[float, Gt(0)] = 3e-4
    ema: Annotated[float, Ge(0), Le(1)] = 0.995
    adversary: Adversary | None = None
    margin: ClassVar[float] = 0.02
    """Rectified-flow time that a re-noised point is at least above its anchor."""

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return "images" if self.adversary is not None or self.loss.needs_ratio else "nothing"

    @property
    def few(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.rollout.few

    # ---------------------------------------------------------------- who takes part

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        if self.loss.needs_ratio and self.adversary is None:
            raise AtollError(
                f"{type(self.loss).__name__} needs the density ratio of real to generated samples, which a "
                "discriminator estimates; give the method an `adversary`."
            )
        roles = {
            "teacher": Role(teacher, saved=False),
            "student": Role(work.copy_of(teacher), self.lr, ema=self.ema),
            "fake": Role(work.copy_of(teacher), self.critic_lr),
        }
        if self.adversary is not None:
            judge = roles[self.adversary.on].module  # where the teacher is exact, not of its shape
            head = self.adversary.head(judge, work)  # type: ignore[arg-type]
            if head is not None:
                roles["head"] = Role(head, self.critic_lr)
        return roles

    # ---------------------------------------------------------------- what they do

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        for _ in range(self.critic_steps):
            with torch.no_grad():
                sample = self.rollout(nets["student"], draw)  # type: ignore[arg-type]
            yield ("fake", "head") if "head" in nets else "fake", self.critic_losses(nets, sample, draw)
        sample = self.rollout(nets["student"], draw)  # type: ignore[arg-type]
        yield "student", self.generator_losses(nets, sample, draw)

    def critic_losses(self, nets: Nets, sample: Sample, draw: Draw) -> dict[str, Tensor]:
        """Denoising of the student's samples, and the discriminator's loss where there is one."""
        fake: Any = nets["fake"]
        noisy = self.noisy(fake, sample, draw, self.critic_law)
        cond = sample.cond
        if self.fake_drop:
            cond = hidden(fake, cond, draw.uniform(len(cond)) < self.fake_drop)
        guess = self.fake_condition(fake, noisy.x_t, noisy.t, cond, **sample.told)
        losses = {"denoising": self.critic(guess, sample, noisy)}
        if self.adversary is not None:
            losses["discriminator"] = self.adversary.critic_loss(nets, sample, draw)
        return losses

    def generator_losses(self, nets: Nets, sample: Sample, draw: Draw) -> dict[str, Tensor]:
        """What the student descends."""
        losses = {"scores": self.loss(sample, self.probe(nets, sample, draw))}
        if self.adversary is not None and self.adversary.weight:
            losses["adversary"] = self.adversary.generator_loss(nets, sample, draw)
        return losses

    def probe(self, nets: Nets, sample: Sample, draw: Draw) -> Probe:
        """Both scores at a fresh noise level, with a graph to ``x_t`` where the loss asks for one."""
        teacher, fake = nets["teacher"], nets["fake"]
        noisy = self.noisy(teacher, sample, draw, self.law)  # type: ignore[arg-type]
        judge, layers = fake, ()
        if self.loss.needs_ratio and self.adversary is not None:
            judge = nets[self.adversary.on]
            layers = self.adversary.layers(judge)  # type: ignore[arg-type,assignment]
        with nullcontext() if self.loss.through_scores else torch.no_grad(), tapped(judge, layers) as features:
            real = self.guidance(teacher, noisy.x_t, noisy.t, sample.cond)  # type: ignore[arg-type]
            guessed = self.fake_guidance(fake, noisy.x_t, noisy.t, sample.cond, **sample.told)  # type: ignore[arg-type]
        rho = None
        if self.loss.needs_ratio:
            assert self.adversary is not None
            with torch.no_grad():
                rho = self.adversary.density_ratio(nets, [f[: len(sample.x)] for f in features.values()], sample.cond)
        return Probe(noisy.x_t, noisy.t, noisy.ratio, real, guessed, rho)

    def noisy(self, denoiser: Denoiser, sample: Sample, draw: Draw, law: TimeLaw) -> Noisy:
        """The sample's anchor, noised to a level that the law draws (above the anchor's own)."""
        schedule = denoiser.schedule
        floor, top = schedule.ratio(sample.s), None if sample.top is None else schedule.ratio(sample.top)
        ratio = self.above(floor, draw.ratios(law, len(sample.x)), top)
        t, eps = schedule.time(ratio), draw.noise_like(sample.anchor)
        a, b = step_between(schedule, sample.s, t)
        x_t = shaped(a, eps) * sample.anchor + shaped(b, eps) * eps
        return Noisy(x_t, t, schedule.ratio(t), eps, a, b, schedule.alpha(t), floor)

    def above(self, floor: Tensor, ratio: Tensor, top: Tensor | None = None) -> Tensor:
        """Levels are moved above their anchor's: squeezed, in rectified-flow time, into the interval from the anchor's
        (plus a margin) to that of ``top``, or 1. Anchors without noise or ``top`` leave the law as it is."""
        low, high = floor / (1 + floor), torch.ones_like(floor) if top is None else top / (1 + top)
        least, u = low + ((high - low) / 2).clamp(max=self.margin), ratio / (1 + ratio)
        squeezed = least + (high - least) * u
        u = (torch.where(floor > 0, squeezed, u) if top is None else squeezed).clamp(max=1 - 1e-5)
        return u / (1 - u)

    # ---------------------------------------------------------------- afterwards

    def generate(
        self, nets: Nets, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.rollout.generate(best(nets), z, cond, calls, generator)
