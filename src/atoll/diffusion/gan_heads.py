"""Discriminators on a denoiser's features: real and generated samples are noised to the same law, and told apart.

Real data is needed, so at sites, or where public or generated rows stand in for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from atoll.core.card import Card, Cite
from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser, tapped
from atoll.diffusion.distiller import Draw, Nets, Work
from atoll.diffusion.rollouts import Sample
from atoll.diffusion.schedules import LogNormal, TimeLaw, add_noise

CARD = Card(
    name="gan_heads",
    area="discriminator",
    summary="a light head on a denoiser's own features tells noised real rows from noised generated ones",
    cites=(
        Cite(authors="Wang, Zheng, He, Chen, Zhou", year=2023, title="Diffusion-GAN", arxiv="2206.02262"),
        Cite(
            authors="Sauer, Boesel, Dockhorn, Blattmann, Esser, Rombach", year=2024, arxiv="2403.12015",
            title="Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation",
        ),
        Cite(
            authors="Yin, Gharbi, Park, Zhang, Shechtman, Durand, Freeman", year=2024, arxiv="2405.14867",
            title="Improved Distribution Matching Distillation for Fast Image Synthesis",
        ),
    ),
    suits=("generative models",),
)  # fmt: skip

Kind = Literal["softplus", "bce", "hinge"]


def discriminator_loss(real: Tensor, fake: Tensor, kind: Kind = "softplus") -> Tensor:
    """Of logits (any shape), high for real. ``bce`` is ``softplus``, averaged; ``hinge`` stops at margins of 1."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    both = F.softplus(-real).mean() + F.softplus(fake).mean()
    return both if kind == "softplus" else 0.5 * both


def fooling_loss(fake: Tensor, kind: Kind = "softplus") -> Tensor:
    """What the generator descends."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def places(f: Tensor) -> Tensor:
    """Features ``[B, C, h, w]``, ``[B, T, C]`` or ``[B, C]`` as ``[B, C, places]``, float32."""
    f = f.float()
    return f[..., None] if f.dim() == 2 else f.flatten(2) if f.dim() == 4 else f.transpose(1, 2)


class ConvHead(nn.Module):
    """Features (see :func:`places`) and a class -> one logit ``[B]``; one small network per tapped layer, averaged, or
    (``apart``) left as they are, ``[B, layers]``. It starts at zero."""

    def __init__(self, channels: Sequence[int], classes: int | None, width: int = 64, apart: bool = False) -> None:
        super().__init__()
        self.apart = apart
        self.bodies = nn.ModuleList(
            nn.Sequential(nn.Conv1d(c, width, 1), nn.GroupNorm(math.gcd(width, 8), width), nn.SiLU()) for c in channels
        )
        self.outs = nn.ModuleList(nn.Linear(width, 1) for _ in channels)
        self.labels = nn.Embedding(classes + 1, width) if classes is not None else None
        for out in self.outs:
            nn.init.zeros_(out.weight)  # type: ignore[arg-type]
            nn.init.zeros_(out.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor], cond: Tensor) -> Tensor:
        logits = []
        for f, body, out in zip(features, self.bodies, self.outs, strict=True):
            h = body(places(f)).mean(2)
            if self.labels is not None:
                h = h * (1 + self.labels(cond))
            logits.append(out(h)[:, 0])
        every = torch.stack(logits, 1).float()  # also where the network computes in bfloat16
        return every if self.apart else every.mean(1)


def mean_logits(features: Sequence[Tensor]) -> Tensor:
    """A discriminator without parameters of its own: features averaged over channels ``[B, places]`` (SiDA, Zhou et
    al., 2024, arXiv 2410.14919). The network that has the features learns to make them tell."""
    return torch.cat([places(f).mean(1) for f in features], 1)


def blocks_of(net: nn.Module, count: int) -> tuple[str, ...]:
    """Names of ``count`` blocks (members of lists, and the network's own suggestion), spread evenly over the network.

    Raises:
        AtollError: when it has none.
    """
    listed = {f"{name}.{i}" for name, m in net.named_modules() if isinstance(m, nn.ModuleList) for i in range(len(m))}
    listed |= set(getattr(net, "taps", ()))
    names: list[str] = []
    for name, _ in net.named_modules():
        if name in listed and not any(name.startswith(f"{n}.") for n in names):  # a block's own parts are none
            names.append(name)
    if not names:
        raise AtollError(f"{type(net).__name__} has no blocks to look at; name some of its modules in `taps`.")
    count = min(count, len(names))
    return tuple(names[round((i + 0.5) * len(names) / count - 0.5)] for i in range(count))


@dataclass(frozen=True)
class Adversary:
    """A discriminator, and how much it counts.

    Args:
        on: whose features it sees: the ``fake`` score's, which then learns with it, or the frozen ``teacher``'s.
        learned: a head of its own; otherwise the mean over channels.
        taps: modules of the network to look at; empty takes the network's own suggestion, or, with ``blocks``, as
            many of its blocks, spread evenly.
        apart: each of them is judged by itself, as in LADD, not their mean.
        misaligned: real rows with another row's condition are fakes too.
        kind: of loss.
        weight: in the generator's loss; 0 only estimates the density ratio.
        critic_weight: in the critic's loss.
        r1: weight of ``(logit(x) - logit(x + 0.1 n))^2``, which keeps it smooth.
        law: noise levels at which it judges.
        clip: bounds of the density ratio that is read from it, 1 / clip and clip.
    """

    on: Literal["fake", "teacher"] = "fake"
    learned: bool = True
    taps: tuple[str, ...] = ()
    blocks: Annotated[int, Ge(0)] = 0
    apart: bool = False
    misaligned: bool = False
    kind: Kind = "softplus"
    weight: Annotated[float, Ge(0)] = 3e-3
    critic_weight: Annotated[float, Ge(0)] = 1e-2
    r1: Annotated[float, Ge(0)] = 0.0
    law: TimeLaw = LogNormal()
    clip: Annotated[float, Ge(1)] = 10.0

    def layers(self, denoiser: Denoiser) -> tuple[str, ...]:
        """Names of the tapped modules, from the denoiser."""
        inner: Any = denoiser
        names = self.taps or (blocks_of(inner.net, self.blocks) if self.blocks else inner.net.taps)
        return tuple(f"net.{name}" for name in names)

    def head(self, net: Denoiser, work: Work) -> nn.Module | None:
        """A fresh head that fits the features of a network; None without parameters."""
        if not self.learned:
            return None
        device = next(net.parameters(), torch.zeros(0, device=work.device)).device
        x = torch.zeros(1, *work.shape, device=device)
        with torch.no_grad(), tapped(net, self.layers(net)) as features:
            net(x, net.schedule.time(torch.ones(1, device=x.device)), work.conditions.rows[:1].to(x.device))
        return ConvHead([places(f).shape[1] for f in features.values()], net.classes, apart=self.apart)

    def levels(self, nets: Nets, x: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """A fresh time ``[B]`` and fresh noise for every row."""
        net: Any = nets[self.on]
        return net.schedule.time(draw.ratios(self.law, len(x))), draw.noise_like(x)

    def logits(
        self, nets: Nets, x: Tensor, cond: Tensor, draw: Draw, level: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Of clean samples, each at a fresh noise level unless one is given: ``[B]``, or ``[B, places]`` without a
        head."""
        net: Any = nets[self.on]
        t, eps = self.levels(nets, x, draw) if level is None else level
        with tapped(net, self.layers(net)) as features:
            net(add_noise(net.schedule, x, eps, t), t, cond)
        return self.read(nets, list(features.values()), cond)

    def read(self, nets: Nets, features: Sequence[Tensor], cond: Tensor) -> Tensor:
        if "head" in nets:
            out: Tensor = nets["head"](features, cond)
            return out
        return mean_logits(features)

    def critic_loss(self, nets: Nets, sample: Sample, draw: Draw) -> Tensor:
        x, cond = draw.real(len(sample.x))
        level = self.levels(nets, x, draw)
        real = self.logits(nets, x, cond, draw, level)
        fake = self.logits(nets, sample.x.detach(), sample.cond, draw)
        if self.misaligned:
            wrong = cond.roll(1, 0)
            differs = (wrong != cond).reshape(len(cond), -1).any(1)
            if differs.any():
                fake = torch.cat([fake, self.logits(nets, x[differs], wrong[differs], draw)])
        loss = discriminator_loss(real, fake, self.kind)
        if self.r1:
            nudged = self.logits(nets, x + 0.1 * draw.noise_like(x), cond, draw, level)  # the step alone differs
            loss = loss + self.r1 * (real - nudged).square().mean()
        return self.critic_weight * loss

    def generator_loss(self, nets: Nets, sample: Sample, draw: Draw) -> Tensor:
        return self.weight * fooling_loss(self.logits(nets, sample.x, sample.cond, draw), self.kind)

    def density_ratio(self, nets: Nets, features: Sequence[Tensor], cond: Tensor) -> Tensor:
        """p_real / p_student ``[B]``: the exponential of the optimal logit, within bounds."""
        logit = self.read(nets, features, cond)
        logit = logit.mean(1) if logit.dim() > 1 else logit
        bound = math.log(self.clip)
        return logit.clamp(-bound, bound).exp()
