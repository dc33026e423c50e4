"""What a way to make a fast generator is: networks with roles, and updates that read like the paper's algorithm.

A method is a frozen dataclass. ``updates`` is a Python generator that yields, for each optimiser step in turn, whose
weights it is for and the losses; when it goes on, the step has been taken. So critic and generator alternate, or one
network learns alone, in the same loop (``trainer.py``), which also owns averages, checkpoints and resuming.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from atoll.core.build import find
from atoll.core.errors import AtollError
from atoll.data.dataset import Dataset
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.schedules import TimeLaw

Nets = Mapping[str, nn.Module]
"""Networks by role; ``student_ema`` is the average of ``student``, where it has one."""
Update = tuple[str | tuple[str, ...], Mapping[str, Tensor]]
"""Whose weights one optimiser step changes, and the losses (scalars by name) whose sum it descends."""
Needs = Literal["nothing", "teacher samples", "images"]


@dataclass(slots=True)
class Role:
    """A network with a part in a distillation.

    Args:
        module: the network.
        lr: of its Adam optimiser; None: frozen.
        decay: how the step size falls over the run: not at all, or along a half cosine to nothing.
        warmup: steps over which it first rises.
        betas, weight_decay: of the same.
        clip: largest norm of a gradient; None: any.
        ema: decay of the average that is kept of it; None keeps none. It warms up: no more weight on the past than a
            mean over a third of it.
        saved: part of checkpoints. False for what can be had again, as the teacher.
    """

    module: nn.Module
    lr: float | None = None
    decay: Literal["none", "cosine"] = "none"
    warmup: int = 0
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.0
    clip: float | None = 1.0
    ema: float | None = None
    saved: bool = True

    def lr_at(self, step: int, steps: int) -> float:
        """Step size of a step of the run, from 0."""
        assert self.lr is not None
        falling = 0.5 * (1 + math.cos(math.pi * step / max(1, steps))) if self.decay == "cosine" else 1.0
        return self.lr * falling * min(1.0, (step + 1) / (self.warmup + 1))


@dataclass(frozen=True)
class Images:
    """Real rows for methods that need them, scaled so that their standard deviation is ``sigma_data``.

    Args:
        data: columns ``x`` and, unless ``classes`` is 0, ``y``.
        sigma_data: standard deviation after scaling (``data`` itself is normalised to 1).
        rows: which rows may be drawn; None: all.
    """

    data: Dataset
    sigma_data: float = 0.5
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.data) if self.rows is None else len(self.rows)

    def take(self, positions: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """``(x [n, ...], cond [n])`` at positions among the rows that may be drawn."""
        positions = positions.cpu()
        batch = self.data.ready(positions if self.rows is None else self.rows[positions], device)
        x = batch["x"] * self.sigma_data
        return x, batch["y"] if "y" in batch else torch.zeros(len(x), dtype=torch.int64, device=device)

    def all(self, most: int | None = None, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The first ``most`` rows (default: all)."""
        return self.take(torch.arange(len(self) if most is None else min(most, len(self))), device)


@dataclass(frozen=True)
class Conditions:
    """What samples may be asked for: rows of conditions, drawn with equal chance.

    Args:
        rows: classes ``[N]`` (int64) or embeddings ``[N, ...]``.
    """

    rows: Tensor

    @classmethod
    def classes(cls, count: int) -> Conditions:
        return cls(torch.arange(count))

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        rows = self.rows.to(generator.device)
        return rows[torch.randint(len(rows), (n,), generator=generator, device=generator.device)]


@dataclass(frozen=True)
class Work:
    """What a method is given besides the teacher.

    Args:
        shape: of one sample.
        conditions: what may be asked for.
        images: real rows; None where there are none, as at a server whose sites keep theirs.
        seed: root of all random streams.
        batch: samples per loss.
        device: where tensors live.
        build: makes a fresh network for students and fake scores that cannot be copies of the teacher, as when the
            teacher is exact; None copies it.
    """

    shape: tuple[int, ...]
    conditions: Conditions
    images: Images | None = None
    seed: int = 0
    batch: int = 128
    device: str = "cpu"
    build: Callable[[], Denoiser] | None = None

    def copy_of(self, teacher: Denoiser) -> Denoiser:
        """The teacher's weights, to be trained (or the network that stands in for them: of one with adapters, these
        alone may train)."""
        return copy.deepcopy(teacher).requires_grad_(True) if self.build is None else self.build()


@dataclass(frozen=True)
class Draw:
    """Fresh random numbers for one step, and where the run is. Equal (seed, step) give equal numbers, in the order in
    which they are asked for."""

    work: Work
    generator: torch.Generator
    step: int
    steps: int
    material: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return self.step / max(1, self.steps)

    def noise(self, n: int | None = None) -> Tensor:
        shape = (n or self.work.batch, *self.work.shape)
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def noise_like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.generator, device=self.generator.device)

    def cond(self, n: int | None = None) -> Tensor:
        return self.work.conditions.draw(n or self.work.batch, self.generator)

    def uniform(self, n: int | None = None) -> Tensor:
        return torch.rand(n or self.work.batch, generator=self.generator, device=self.generator.device)

    def integers(self, low: int, high: int, n: int | None = None) -> Tensor:
        """From ``low`` to ``high - 1``, int64."""
        return torch.randint(low, high, (n or self.work.batch,), generator=self.generator, device=self.generator.device)

    def ratios(self, law: TimeLaw, n: int | None = None) -> Tensor:
        return law.draw(n or self.work.batch, self.generator)

    def real(self, n: int | None = None) -> tuple[Tensor, Tensor]:
        """Real rows and their conditions."""
        images = self.work.images
        if images is None or not len(images):
            raise AtollError("This method trains on real images, and it was given none.")
        return images.take(self.integers(0, len(images), n), self.work.device)

    def stored(self, *names: str, n: int | None = None) -> tuple[Tensor, ...]:
        """The same random rows of some of the method's material."""
        first = self.material[names[0]]
        rows = self.integers(0, len(first), n).to(first.device)
        return tuple(self.material[name][rows].to(self.work.device) for name in names)


class Distiller(Protocol):
    """Makes a generator that needs few calls out of a teacher that needs many.

    Must   roles     the module that generates is called ``student``; the teacher is frozen and never changed
           pure      ``updates`` keeps nothing between steps but weights: a resumed run has the same bits
           honest    ``generate`` calls networks ``calls`` times per sample, guidance counted
    """

    package: ClassVar[str] = "atoll.diffusion.methods"
    needs: ClassVar[Needs] = "nothing"
    few: ClassVar[tuple[int, ...]] = (1,)
    """Numbers of calls per sample that its students are made for."""
    parts: ClassVar[int] = 1
    """That every batch is divided into."""

    def material(self, teacher: Denoiser, work: Work) -> dict[str, Tensor]:
        """What is made once, before training: pairs or trajectories of the teacher. Kept on disk."""
        return {}

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        """The networks. Fresh weights come from the global generator, which the trainer seeds."""
        ...

    def begin(self, nets: Nets, step: int, steps: int) -> Iterable[str]:
        """Before a step: switch teachers, start the next phase. Returns the roles whose optimiser starts afresh."""
        return ()

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        """The optimiser steps of one step."""
        ...

    def joined(self, nets: Nets) -> dict[str, nn.Module]:
        """Networks made of other roles' networks, as a ``student`` that hands each sample to one of several. They join
        ``nets``, and hold no weights of their own."""
        return {}

    def generate(
        self, nets: Nets, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Samples ``[B, ...]`` from unit noise, without gradients."""
        ...


def best(nets: Nets, role: str = "student") -> Denoiser:
    """The average of a role's weights where one is kept, else its weights."""
    return nets.get(f"{role}_ema", nets[role])  # type: ignore[return-value]


def most(*needs: Needs) -> Needs:
    """What methods that work together need."""
    return max(needs, key=get_args(Needs).index)


def usual(name: str) -> Any:
    """A field whose default is the method ``name`` as it comes: a method that wraps others imports none of them."""
    return field(default_factory=lambda: find(Distiller.package, name, Distiller)())
