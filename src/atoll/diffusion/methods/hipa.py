"""HiPA: one-step generation through a LoRA that learns the high frequencies that a single step leaves out."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from atoll.adapters import lora
from atoll.adapters.low_rank import LowRankUpdate
from atoll.core.card import Card, Cite
from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Distiller, Draw, Needs, Nets, Role, Update, Work, best
from atoll.diffusion.frequencies import high_frequency_loss
from atoll.diffusion.losses import pseudo_huber
from atoll.diffusion.pairs import TeacherPairStore
from atoll.diffusion.perceptual import Perceptual, perceptual_distance
from atoll.diffusion.schedules import as_times
from atoll.diffusion.solvers import start

CARD = Card(
    name="hipa",
    area="few-step distillation",
    summary="a low-rank adapter turns a many-step model into a one-step one, with losses on its high frequencies",
    cites=(
        Cite(
            authors="Zhang, Hooi", year=2023, arxiv="2311.18158",
            title="HiPA: Enabling One-Step Text-to-Image Diffusion Models via High-Frequency-Promoting Adaptation",
        ),
    ),
    suits=("generative models", "few calls a sample", "distilling without data", "pretrained models", "less traffic"),
)  # fmt: skip


@dataclass(frozen=True)
class HiPA(Distiller):
    """High-frequency-promoting adaptation (Zhang and Hooi, 2023, arXiv 2311.18158).

    One step from pure noise has the right low frequencies and lacks high ones. So little has to be learned: the model
    stays as it is and low-rank adapters on its linear layers and convolutions learn, from pairs of noise and the
    model's own many-step sample, under a spatial loss and a loss of the high frequencies. No data is needed.

    Departs: edges are taken of the high-pass part, so that all of that loss is blind to low frequencies; the spatial
    loss is a pseudo-Huber distance of pixels, with features on request (the paper's network is not at hand).

    Args:
        pairs: how the model's pairs are made; guidance, where it is used, goes into the adapters.
        rank: of the adapters. Of a layer with n outputs and m inputs, rank (n + m) / (n m) is trained: 1 or 2 percent
            in large models, far more in small ones.
        targets: patterns of modules that get adapters, such as ``attention``; empty: every linear layer and
            convolution whose weight is its own.
        high: weight of the high-frequency loss.
        cut: where high frequencies begin, as a part of Nyquist's.
        perceptual: features in which samples are compared as well; none by default.
        first: sigma / alpha of the one call: the largest noise that the model knows.
        lr, weight_decay: of AdamW.
        ema: decay of the average that is kept.
    """

    pairs: TeacherPairStore = field(default_factory=lambda: TeacherPairStore(count=10_000))
    rank: Annotated[int, Ge(1)] = 8
    targets: tuple[str, ...] = ()
    high: Annotated[float, Ge(0)] = 1.0
    cut: Annotated[float, Gt(0), Le(1)] = 0.25
    perceptual: Perceptual | None = None
    first: Annotated[float, Gt(0)] = 40.0
    lr: Annotated[float, Gt(0)] = 1e-4
    weight_decay: Annotated[float, Ge(0)] = 1e-2
    ema: Annotated[float, Ge(0), Le(1)] = 0.99
    few: ClassVar[tuple[int, ...]] = (1,)

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return "images" if self.perceptual is not None and self.perceptual.needs_images else "teacher samples"

    def material(self, teacher: Denoiser, work: Work) -> dict[str, Tensor]:
        return self.pairs.make(teacher, work)

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        if self.high and len(work.shape) != 3:
            raise AtollError(
                f"hipa compares frequencies of images; these samples have the shape {tuple(work.shape)}. Set `high: 0`."
            )
        student = with_adapters(copy.deepcopy(teacher), self.rank, self.targets)
        role = Role(student, self.lr, betas=(0.9, 0.999), weight_decay=self.weight_decay, ema=self.ema)
        roles = {"student": role}
        if self.perceptual is not None:
            roles["features"] = Role(self.perceptual.network(work), saved=False)
        return roles

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        z, y, cond = draw.stored("z", "x", "cond")
        x = one_step(nets["student"], z, cond, self.first)  # type: ignore[arg-type]
        losses = {"pixels": (pseudo_huber(x, y) / x[0].numel() ** 0.5).mean()}
        if "features" in nets:
            losses["perceptual"] = perceptual_distance(nets["features"], x, y).mean()
        if self.high:
            losses["frequencies"] = self.high * high_frequency_loss(x, y, self.cut).mean()
        yield "student", losses

    def generate(
        self, nets: Nets, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        with torch.no_grad():
            return one_step(best(nets), z, cond, self.first)


def one_step(denoiser: Denoiser, z: Tensor, cond: Tensor, first: float = 40.0) -> Tensor:
    """``(x_T - sigma_T eps(x_T, T)) / alpha_T``: the clean sample that a model sees in pure noise."""
    t = as_times(denoiser.schedule, first, z)
    out: Tensor = denoiser(start(denoiser.schedule, z, t), t, cond)
    return out


# ------------------------------------------------------------------------------------------- the adapters


def adaptable(net: nn.Module, targets: tuple[str, ...] = ()) -> list[str]:
    """Names of the linear layers and convolutions (ungrouped, with a weight of their own) that ``targets`` mean."""
    owners = Counter(id(p) for _, p in net.named_parameters(remove_duplicate=False))
    found = [
        name
        for name, m in net.named_modules()
        if type(m) in (nn.Linear, nn.Conv2d) and owners[id(m.weight)] == 1 and getattr(m, "groups", 1) == 1
    ]
    chosen = [name for name in found if not targets or lora.under(name, targets)]
    if not chosen:
        few = ", ".join(found[:6]) or "it has none"
        raise AtollError(f"hipa finds nothing to adapt for targets {list(targets)}. Layers of this model: {few}.")
    return chosen


def with_adapters(denoiser: Denoiser, rank: int, targets: tuple[str, ...] = ()) -> Denoiser:
    """``denoiser`` with fresh adapters, which are all that learns: peft freezes the rest. In place; they start at 0."""
    lora.inject(denoiser.net, adaptable(denoiser.net, targets), {rank: rank})
    return denoiser


def adapters(denoiser: Denoiser, rank: int) -> LowRankUpdate:
    """A copy of the adapters as plain factors; ``lora.as_peft(net, ...)`` puts them on a plain network, and its
    ``save_pretrained`` writes them in peft's format."""
    return lora.read(lora.lora_layers(denoiser.net), rank)


@contextmanager
def without_adapters(denoiser: Denoiser) -> Iterator[None]:
    """Inside, the model is the base again."""
    layers = list(lora.lora_layers(denoiser.net).values())
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        denoiser.requires_grad_(False)  # peft would train a frozen average
        for p in trained:
            p.requires_grad_(True)


def merged(denoiser: Denoiser) -> Denoiser:
    """A plain copy with the adapters inside its weights: nothing to add at each call."""
    out = copy.deepcopy(denoiser)
    for layer in lora.lora_layers(out.net).values():
        layer.merge()
    lora.unwrap(out.net)
    return out.requires_grad_(False)


def trainable_fraction(model: nn.Module) -> float:
    """Numbers that are trained, as a share of those that are not."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained / max(1, sum(p.numel() for p in model.parameters() if not p.requires_grad))
