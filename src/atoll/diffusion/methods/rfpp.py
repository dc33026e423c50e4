"""2-Rectified Flow++: one round of Reflow, done well, makes the flow straight enough for one or two steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from atoll.core.card import Card, Cite
from atoll.diffusion.denoiser import Denoiser, viewed
from atoll.diffusion.distiller import Distiller, Draw, Needs, Nets, Role, Update, Work, best
from atoll.diffusion.losses import pseudo_huber
from atoll.diffusion.pairs import TeacherPairStore
from atoll.diffusion.perceptual import Perceptual, perceptual_distance
from atoll.diffusion.rollouts import few_step_ratios
from atoll.diffusion.schedules import RF, NoiseSchedule, TimeLaw, UShaped, add_noise, as_times, convert, shaped
from atoll.diffusion.solvers import Guess, ddim, start

CARD = Card(
    name="rfpp",
    area="few-step distillation",
    summary="a flow trained on the teacher's own pairs of noise and sample is nearly straight, and can be inverted",
    cites=(
        Cite(
            authors="Lee, Lin, Fanti", year=2024, title="Improving the Training of Rectified Flows", arxiv="2405.20320"
        ),
        Cite(authors="Liu, Gong, Liu", year=2022, title="Flow Straight and Fast", arxiv="2209.03003"),
    ),
    suits=("generative models", "few calls a sample", "distilling without data"),
)  # fmt: skip


@dataclass(frozen=True)
class RFpp(Distiller):
    """2-Rectified Flow++ (Lee, Lin and Fanti, 2024, arXiv 2405.20320).

    The teacher's ODE pairs each noise z with a sample x, and those pairs hardly cross. So a velocity trained on the
    lines between them, ``v((1 - t) x + t z, t) -> z - x``, has nothing to average over, and one round is enough: what
    is left to do is to look at both ends more often, where it is hard, and to use distances that outliers do not rule.
    No data is needed. The student starts as the teacher itself, read as a velocity.

    Departs: times stop where the teacher's noise levels do (``first``; the paper's is 1e5), since a network that is
    seldom shown a level does not know it; real images with inverted noise are not mixed in. The factor 1 - t of the
    velocity's loss is used only together with features, which then rule at t = 1: without them nothing would be learned
    there, and a single step asks nowhere else.

    Args:
        pairs: how the teacher's pairs are made.
        law: times at which the velocity learns; levels above ``first`` are drawn at ``first``.
        distance: ``huber``, the pseudo-Huber distance, or ``l2``, which vanilla Reflow descends.
        perceptual: features in which guess and sample are compared as well, divided by t, while the velocity's distance
            counts 1 - t; none by default.
        perceptual_weight: of that part.
        sampler: ``euler``, or ``anchored``: from each guess back towards the noise that it started with.
        first: sigma / alpha at which sampling starts.
        lr, warmup: of Adam.
        ema: decay of the average that is kept.
    """

    pairs: TeacherPairStore = field(default_factory=TeacherPairStore)
    law: TimeLaw = UShaped()
    distance: Literal["huber", "l2"] = "huber"
    perceptual: Perceptual | None = None
    perceptual_weight: Annotated[float, Ge(0)] = 1.0
    sampler: Literal["euler", "anchored"] = "euler"
    first: Annotated[float, Gt(0)] = 40.0
    lr: Annotated[float, Gt(0)] = 2e-4
    warmup: Annotated[int, Ge(0)] = 100
    ema: Annotated[float, Ge(0), Le(1)] = 0.999
    few: ClassVar[tuple[int, ...]] = (1, 2)

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return "images" if self.perceptual is not None and self.perceptual.needs_images else "teacher samples"

    def material(self, teacher: Denoiser, work: Work) -> dict[str, Tensor]:
        return self.pairs.make(teacher, work)

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        student = work.copy_of(teacher)
        roles = {"student": Role(student, self.lr, warmup=self.warmup, betas=(0.9, 0.999), ema=self.ema)}
        if self.perceptual is not None:
            roles["features"] = Role(self.perceptual.network(work), saved=False)
        return roles

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        student: Denoiser = nets["student"]  # type: ignore[assignment]
        z, x, cond = draw.stored("z", "x", "cond")
        t = RF().time(draw.ratios(self.law).clamp(max=self.first))
        x_t = add_noise(RF(), x, z, t)
        v = velocity(student, x_t, t, cond)
        far = velocity_loss(v, z - x, self.distance)
        if "features" not in nets:
            yield "student", {"velocity": far.mean()}
            return
        looks = perceptual_distance(nets["features"], x_t - shaped(t, v) * v, x) / t
        yield "student", {"velocity": ((1 - t) * far).mean(), "perceptual": self.perceptual_weight * looks.mean()}

    def generate(
        self, nets: Nets, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        model = viewed(best(nets), RF())
        times = as_times(RF(), few_step_ratios(calls, self.first), z)
        with torch.no_grad():
            if self.sampler == "anchored":
                return anchored(RF(), lambda x, t: model(x, t, cond), z, times)
            return ddim(RF(), lambda x, t: model(x, t, cond), start(RF(), z, times[0]), times)


def velocity(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Tensor, **more: Any) -> Tensor:
    """``dx_t/dt`` at rectified-flow times ``[B]``, of a model of any schedule and parametrisation: for EDM's,
    ``(x_t - D(x_t / (1 - t); t / (1 - t))) / t``."""
    if denoiser.schedule == RF() and isinstance(denoiser, Denoiser):
        return denoiser.predict(x_t, t, cond, "flow", **more)
    return convert(RF(), viewed(denoiser, RF())(x_t, t, cond, **more), "x0", "flow", x_t, t.expand(len(x_t)))


def velocity_loss(v: Tensor, target: Tensor, distance: str = "huber") -> Tensor:
    """Per sample ``[B]``, as a mean over numbers: ``sqrt(|v - u|^2 + c^2) - c`` with c = 0.00054 for each number, or
    the squared error."""
    size = v[0].numel()
    if distance == "l2":
        return (v - target).square().flatten(1).mean(1)
    return pseudo_huber(v, target, 0.00054 * size) / size


def anchored(schedule: NoiseSchedule, guess: Guess, z: Tensor, times: Tensor) -> Tensor:
    """``x' = alpha' x0 + sigma' z`` with the unit noise that it started from, not the one that the guess implies; the
    same as Euler where the flow is straight."""
    x = start(schedule, z, times[0])
    for t, to in pairwise(times):
        x = schedule.alpha(to) * guess(x, t) + schedule.sigma(to) * z
    return x


def invert(denoiser: Denoiser, x: Tensor, cond: Tensor, steps: int, first: float = 40.0, least: float = 1e-3) -> Tensor:
    """The unit noise that the flow leads to ``x`` from, by Euler's steps upwards; ``x`` is taken for a point at the
    ratio ``least``."""
    ratios = few_step_ratios(steps, first).flip(0)
    ratios[0] = least
    times, model = as_times(RF(), ratios, x), viewed(denoiser, RF())
    with torch.no_grad():
        return ddim(RF(), lambda x, t: model(x, t, cond), x, times) / times[-1]


def straightness(denoiser: Denoiser, z: Tensor, cond: Tensor, steps: int = 32, first: float = 40.0) -> Tensor:
    """``mean_t |(x_1 - x_0) - v(x_t, t)|^2`` along the model's own path from ``z``, a mean over numbers, per sample
    ``[B]``; 0 for a straight flow (Liu et al., 2022, arXiv 2209.03003)."""
    times = as_times(RF(), few_step_ratios(steps, first), z)
    with torch.no_grad():
        first_x = x = start(RF(), z, times[0])
        slopes = []
        for t, to in pairwise(times):
            slopes.append(velocity(denoiser, x, t, cond))
            x = x + (to - t) * slopes[-1]
        chord = (first_x - x) / times[0]
        return torch.stack([(chord - v).square().flatten(1).mean(1) for v in slopes]).mean(0)
