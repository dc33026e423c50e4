"""What a generator descends, and what its critic does: pure functions of clean samples, all in float32.

Notation, as in the papers' common language: ``x`` the student's sample, ``x_t`` the same with noise, ``real`` and
``fake`` what teacher and fake score say is under the noise (D_r, D_f), ``delta = real - fake``, ``rho = p_real /
p_student``. No loss calls a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.f_divergences import FDivergence, Weight, weights
from atoll.diffusion.rollouts import Sample
from atoll.diffusion.schedules import add_noise, shaped


@dataclass(frozen=True, slots=True)
class Probe:
    """What both scores say of a sample at one noise level.

    Attributes:
        x_t, t: the noisy sample and its time ``[B]``.
        ratio: sigma / alpha at t ``[B]``.
        real, fake: the clean sample as teacher and fake score see it.
        rho: the density ratio p_real / p_student at ``x_t`` ``[B]``, without graph; None where nobody estimates it.
        usual: what weights that depend on ``rho`` are divided by ``[B]``, such as their mean at this noise level.
    """

    x_t: Tensor
    t: Tensor
    ratio: Tensor
    real: Tensor
    fake: Tensor
    rho: Tensor | None = None
    usual: Tensor | None = None


class GeneratorLoss(Protocol):
    package: ClassVar[str] = "atoll.diffusion.losses"
    through_scores: ClassVar[bool]
    """The gradient flows through both scores into ``x_t`` (their weights stay as they are)."""
    needs_ratio: ClassVar[bool] = False

    def __call__(self, sample: Sample, probe: Probe) -> Tensor:
        """A scalar."""
        ...


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Per-sample inner product ``[B]``."""
    return (a * b).flatten(1).sum(1)


def over_distance(x: Tensor, real: Tensor) -> Tensor:
    """1 / mean |x - real| per sample, at most 1e5, without graph: makes steps of equal size at all noise levels."""
    return 1 / (x - real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)


@dataclass(frozen=True)
class DMDLoss(GeneratorLoss):
    """The gradient of KL(student || teacher), ``w (fake - real)``, given to ``x`` (or to a noisy anchor)."""

    through_scores: ClassVar[bool] = False

    def __call__(self, sample: Sample, probe: Probe) -> Tensor:
        direction = (probe.fake - probe.real).detach() * shaped(over_distance(sample.x, probe.real), probe.real)
        target = (sample.anchor - direction).detach()
        return 0.5 * (sample.anchor - target).square().mean()


@dataclass(frozen=True)
class TDMLoss(GeneratorLoss):
    """DMD's direction, Huberised, for the clean guess of a trajectory's step (Luo et al., 2025, arXiv 2503.06674).

    The paper's ``(real - fake) + (w - 1) (real - null)`` is ``guided - fake``, so guidance is the teacher's. A step
    along the flow is affine in the guess, with a positive factor: pulling at one pulls at the other.

    Args:
        c: where the Huber distance bends, for directions of about unit size: below, DMD's gradient; above, only its
            direction counts. None: DMD's squared distance.
    """

    c: Annotated[float, Gt(0)] | None = 1e-3
    through_scores: ClassVar[bool] = False

    def __call__(self, sample: Sample, probe: Probe) -> Tensor:
        direction = (probe.real - probe.fake).detach() * shaped(over_distance(sample.x, probe.real), probe.real)
        square = (sample.x - (sample.x + direction).detach()).square().flatten(1).mean(1)
        if self.c is None:
            return 0.5 * square.mean()
        return ((square + self.c**2).sqrt() - self.c).mean()


@dataclass(frozen=True)
class SiDLoss(GeneratorLoss):
    """``w <delta, (real - x) - alpha delta>`` of score identity distillation (Zhou et al., 2024, arXiv 2404.04057).

    Args:
        alpha: how much of the squared difference is taken off again; 1 is SIM with the squared distance.
    """

    alpha: Annotated[float, Gt(0)] = 1.0
    through_scores: ClassVar[bool] = True

    def __call__(self, sample: Sample, probe: Probe) -> Tensor:
        delta = probe.real - probe.fake
        per_sample = inner(delta, probe.real - sample.x - self.alpha * delta) / delta[0].numel()
        return (over_distance(sample.x, probe.real) * per_sample).mean()


@dataclass(frozen=True)
class SIMLoss(GeneratorLoss):
    """``<d'(delta), fake - x>`` of score implicit matching (Luo et al., 2024, arXiv 2410.16794).

    Args:
        distance: between the scores: ``"huber"``, sqrt(|y|^2 + c^2) - c, whose gradient is bounded; or ``"l2"``, |y|^2,
            which is weighted per sample as SiD is.
        c: where the Huber distance bends; None: 0.015 sqrt(numbers in a sample).
    """

    distance: Literal["huber", "l2"] = "huber"
    c: Annotated[float, Gt(0)] | None = None
    through_scores: ClassVar[bool] = True

    def __call__(self, sample: Sample, probe: Probe) -> Tensor:
        delta = probe.real - probe.fake
        size = delta[0].numel()
        if self.distance == "l2":
            return (over_distance(sample.x, probe.real) * inner(delta, probe.fake - sample.x) / size).mean()
        c = self.c or 0.015 * size**0.5
        slope = delta / shaped((inner(delta, delta) + c**2).sqrt(), delta)
        loss: Tensor = inner(slope, probe.fake - sample.x).mean() / size**0.5
        return loss


class RatioLoss(GeneratorLoss, Protocol):
    """A loss of an f-divergence, weighted by functions of the density ratio. Without a ratio it is that of the reverse
    KL divergence, which needs none."""

    def weight(self, rho: Tensor) -> Tensor:
        """H(rho) ``[B]``, finite whatever the ratio."""
        ...


@dataclass(frozen=True)
class FDistillLoss(FDivergence, RatioLoss):  # type: ignore[override]
    """DMD's gradient times ``h(rho) = rho^2 f''(rho)``: that of the divergence D_f(data || student) of the noised laws
    (Xu, Nie and Vahdat, 2025, arXiv 2502.15681). Weights are divided by their mean over the batch, unless the probe
    has another.

    Args:
        f: the divergence.
        clip: bounds of the density ratio, 1 / clip and clip.
    """

    through_scores: ClassVar[bool] = False

    def __call__(self, sample: Sample, probe: Probe) -> Tensor:
        factor = over_distance(sample.x, probe.real)
        if probe.rho is not None:
            h = self.weight(probe.rho)
            factor = factor * h / (h.mean() if probe.usual is None else probe.usual)
        direction = (probe.fake - probe.real).detach() * shaped(factor, probe.real)
        target = (sample.anchor - direction).detach()
        return 0.5 * (sample.anchor - target).square().mean()


@dataclass(frozen=True)
class UniLoss(FDivergence, RatioLoss):  # type: ignore[override]
    """:func:`f_divergence_loss`, weighted per sample as SiD is (Wang et al., 2025, arXiv 2505.20755).

    Args:
        f: the divergence D_f(data || student): the reverse KL seeks modes, the forward KL covers them.
        clip: bounds of the density ratio, 1 / clip and clip.
        correction: bound of what the gradient has because the ratio itself depends on the student, against the pull
            towards the data; 0 leaves it out, inf is exact. It grows with the cube of the difference of scores, and may
            point away from the data (it does for JS); only a right ratio holds it, so with a learnt one and no bound
            samples can run away.
    """

    correction: Annotated[float, Ge(0)] = 0.5
    through_scores: ClassVar[bool] = True

    def __call__(self, sample: Sample, probe: Probe) -> Tensor:
        size = sample.x[0].numel()
        if probe.rho is None:
            per_sample = f_divergence_loss(torch.ones_like, sample.x, probe, torch.ones_like(probe.ratio))
        else:
            rho = self.clipped(probe.rho)
            inside = rho == probe.rho  # where it is clipped, the ratio does not depend on the student
            most = torch.where(inside, self.correction * 2 * self.h(rho), 0.0)
            per_sample = f_divergence_loss(self.h, sample.x, probe, rho, most)
        if probe.usual is not None:
            per_sample = per_sample / probe.usual
        return (over_distance(sample.x, probe.real) * per_sample).mean() / size


def f_divergence_loss(h: Weight, x: Tensor, probe: Probe, rho: Tensor, most: Tensor | None = None) -> Tensor:
    """``C |delta|^2 + 2 H <delta, fake - x>`` per sample ``[B]``, with C = H - rho H' and weights without graph. Its
    gradient is that of the weighted squared difference of scores, ``H(rho) |delta|^2``, whose mean over noise levels is
    the divergence: a gradient along the scores (that of SIM) and one along their difference (that of Diff-Instruct).

    Args:
        h: H(rho) = rho^2 f''(rho).
        x: clean samples.
        probe: what both scores say, with a graph to ``x_t``.
        rho: the density ratio ``[B]``, without graph.
        most: bound ``[B]`` of what comes from grad rho = rho (s_real - s_fake), the weights' own dependence on the
            student; None has all of it.
    """
    delta, w = probe.real - probe.fake, weights(h, rho)
    square, along = inner(delta, delta), inner(delta, probe.fake - x)
    loss = w.c * square + 2 * w.h * along
    pull = (2 * w.dh * along + w.dc * square).detach() / probe.ratio**2
    if most is not None:
        pull = torch.maximum(torch.minimum(pull, most), -most)
    return loss + pull * inner(delta.detach(), x)


# ------------------------------------------------------------------------------------------- critics


class CriticLoss(Protocol):
    """How the fake score learns what the student makes."""

    package: ClassVar[str] = "atoll.diffusion.losses"

    def __call__(self, guess: Tensor, sample: Sample, probe: Noisy) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Noisy:
    """A sample with noise, for a denoising loss: ``x_t = a anchor + b eps`` at time t, with sigma / alpha = ratio.

    Attributes:
        alpha: of the schedule at t.
        floor: sigma / alpha at the anchor; 0 for a clean one.
    """

    x_t: Tensor
    t: Tensor
    ratio: Tensor
    eps: Tensor
    a: Tensor
    b: Tensor
    alpha: Tensor
    floor: Tensor


@dataclass(frozen=True)
class Denoising(CriticLoss):
    """``(1 / sigma^2 + 1 / sigma_data^2) |guess - x|^2``: plain denoising score matching, weighted as in EDM.

    Args:
        sigma_data: standard deviation of the data.
    """

    sigma_data: Annotated[float, Gt(0)] = 0.5

    def __call__(self, guess: Tensor, sample: Sample, probe: Noisy) -> Tensor:
        return denoising_loss(guess, sample.x.detach(), probe.ratio, self.sigma_data).mean()


@dataclass(frozen=True)
class ImportanceDenoising(CriticLoss):
    """Denoising of points that were noised from a noisy place on the student's trajectory.

    Such a point is ``alpha x + sigma e`` with an *effective* noise e: what the step left of its own and what was added.
    It need not be normal, so each sample is weighted by how much likelier e is under the normal law than the noise that
    was drawn, and by the signal-to-noise ratio, capped (min-SNR).

    Args:
        most: largest signal-to-noise ratio that counts.
        sigma_data: standard deviation of the data, which the ratio is measured against.
    """

    most: Annotated[float, Gt(0)] = 5.0
    sigma_data: Annotated[float, Gt(0)] = 0.5

    def __call__(self, guess: Tensor, sample: Sample, probe: Noisy) -> Tensor:
        x = sample.x.detach()
        snr = (self.sigma_data / probe.ratio).square().clamp(max=self.most)
        error = (guess - x).square().flatten(1).mean(1) / self.sigma_data**2
        return (importance(effective_noise(x, probe), probe.eps) * snr * error).mean()


def effective_noise(x: Tensor, probe: Noisy) -> Tensor:
    """The e of ``x_t = alpha x + sigma e``."""
    alpha = shaped(probe.alpha, x)
    return (probe.x_t - alpha * x).detach() / (alpha * shaped(probe.ratio, x))


def importance(mixed: Tensor, drawn: Tensor) -> Tensor:
    """How much likelier, per number, ``mixed`` is than ``drawn`` under the normal law ``[B]``."""
    return (0.5 * (drawn.square() - mixed.square()).flatten(1).mean(1)).exp()


@dataclass(frozen=True)
class SubInterval(CriticLoss):
    """Denoising from a noisy anchor, without bias: ``x_s / alpha_s - (alpha_t sigma_s^2) / (alpha_s^2 b) eps`` has the
    mean E[x0 | x_t] of the whole process, though only ``x_s`` is known (Fan et al., 2025, arXiv 2510.27684).

    Its variance grows without bound as t nears s; the weight falls as fast. A clean anchor gives plain denoising.

    Args:
        most: cap on one over the rectified-flow variance between s and t.
        sigma_data: standard deviation of the data.
    """

    most: Annotated[float, Gt(0)] = 10.0
    sigma_data: Annotated[float, Gt(0)] = 0.5

    def __call__(self, guess: Tensor, sample: Sample, probe: Noisy) -> Tensor:
        between = probe.ratio**2 - probe.floor**2  # variance from s to t, of samples divided by alpha
        weight = (self.most * between / (1 + probe.ratio) ** 2).clamp(max=1)
        target = sub_interval_target(sample.anchor.detach(), probe)
        return (weight * denoising_loss(guess, target, probe.ratio, self.sigma_data)).mean()


def sub_interval_target(anchor: Tensor, probe: Noisy) -> Tensor:
    """What a denoiser at ``x_t`` learns from an anchor that is noisy itself."""
    noise = probe.floor**2 / (probe.ratio**2 - probe.floor**2).sqrt()
    return anchor * shaped(probe.a / probe.alpha, anchor) - shaped(noise, anchor) * probe.eps


def denoising_loss(guess: Tensor, x0: Tensor, ratio: Tensor, sigma_data: float = 0.5) -> Tensor:
    """EDM's weighted squared error per sample ``[B]``, averaged over numbers."""
    return (ratio**-2 + sigma_data**-2) * (guess - x0).square().flatten(1).mean(1)


def training_loss(denoiser: Denoiser, x0: Tensor, cond: Tensor, ratio: Tensor, eps: Tensor) -> Tensor:
    """What a denoiser is trained with, per sample ``[B]``: EDM's weighted error for the preconditioned form, the plain
    squared error of what the network says (noise, velocity, ...) otherwise."""
    schedule = denoiser.schedule
    t = schedule.time(ratio)
    x_t = add_noise(schedule, x0, eps, t)
    if denoiser.predicts in ("edm", "x0"):
        return denoising_loss(denoiser(x_t, t, cond), x0, ratio, denoiser.sigma_data)
    alpha, sigma = shaped(schedule.alpha(t), x0), shaped(schedule.sigma(t), x0)
    d_alpha, d_sigma = shaped(schedule.d_alpha(t), x0), shaped(schedule.d_sigma(t), x0)
    target = {"eps": eps, "v": alpha * eps - sigma * x0, "flow": d_alpha * x0 + d_sigma * eps}[denoiser.predicts]
    said = denoiser.predict(x_t, t, cond, denoiser.predicts)
    return (said - target).square().flatten(1).mean(1)


def hidden(denoiser: Denoiser, cond: Tensor, hide: Tensor) -> Tensor:
    """``cond`` with the null condition in the rows where ``hide`` ``[B]`` is true."""
    return torch.where(shaped(hide, cond), denoiser.null(cond), cond)


def pseudo_huber(a: Tensor, b: Tensor, c: float | None = None) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c per sample ``[B]``; c is 0.00054 sqrt(numbers in a sample) by default."""
    c = 0.00054 * a[0].numel() ** 0.5 if c is None else c
    return (inner(a - b, a - b) + c**2).sqrt() - c
