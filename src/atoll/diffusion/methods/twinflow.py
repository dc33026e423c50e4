"""TwinFlow: one network is generator, real score and fake score; negative time tells which."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from atoll.core.card import Card, Cite
from atoll.diffusion.denoiser import Denoiser, viewed
from atoll.diffusion.distiller import Distiller, Draw, Needs, Nets, Role, Update, Work, best
from atoll.diffusion.fresh import redrawn
from atoll.diffusion.losses import hidden
from atoll.diffusion.numbered import with_numbers
from atoll.diffusion.rollouts import few_step_ratios
from atoll.diffusion.rows import Rows
from atoll.diffusion.schedules import RF, TimeLaw, UniformTime, add_noise, as_times, convert, shaped
from atoll.diffusion.solvers import start

CARD = Card(
    name="twinflow",
    area="few-step distillation",
    summary="one network learns average velocities, and at negative time its own samples, which rectify its jump",
    cites=(
        Cite(
            authors="Cheng, Sun, Li, Lin", year=2025, arxiv="2512.05150",
            title="TwinFlow: Realizing One-step Generation on Large Models with Self-adversarial Flows",
        ),
        Cite(
            authors="Sun, Lin", year=2026, venue="ICLR",
            title="Any-step Generation via N-th Order Recursive Consistent Velocity Field Estimation",
        ),
    ),
    suits=("generative models", "few calls a sample"),
)  # fmt: skip

FLOW = RF()
E2E, MUL, ANY, ADV = range(4)
"""The four parts of a batch: from noise to the clean sample, a small step, any step, and the twin's."""


@dataclass(frozen=True)
class TwinFlow(Distiller):
    """TwinFlow (Cheng et al., 2025, arXiv 2512.05150) on recursive consistent velocities (RCGM; Sun and Lin, 2026).

    ``F(x_t, t, r)`` is the mean velocity from time t of the rectified flow ``x_t = (1 - t) x + t z`` to the earlier
    time r. The base loss makes a jump equal a small step along the data's ``v = z - x`` and ``order`` jumps of the
    average network thereafter. The twin lives at negative time: there F learns the velocity of the student's own
    one-step samples. The difference of the twins, ``F(-t) - F(t)``, is that of fake and real score as in DMD, and
    rectifies the one-step jump. There is no frozen teacher, no second trained network and no discriminator.

    The network is told t and r as numbers, with their sign; where it was built without, they enter through a branch
    that starts at zero (``numbered.py``), so a copy of a teacher starts as the teacher, and both twins agree. It is
    asked at positive times only, so any denoiser will do, whatever its schedule.

    Departs: sampling starts where sigma / alpha is ``high`` and not at pure noise, as preconditioned networks have seen
    nothing above. A row counts as much in one loss as in another: weighted by the mean over its own quarter, the
    rectification would outrun the scores that it follows, and from scratch it then collapses to a point per class.

    Args:
        rows: what is noised: real images, or samples that the teacher has made.
        scratch: draw the student's weights anew; otherwise it starts as the teacher.
        twin: learn at negative time and rectify; without, this is plain RCGM, and the batch has three parts.
        rectify: weight of the rectification of a row, against that of its base loss.
        order: jumps of the average network in the base loss.
        gap: length of the small step before them.
        enhance: guidance that becomes part of the data's velocity: v + enhance (F_cond - F_null).
        drop: fraction of the conditions that are hidden.
        clamp: bound of every number of a residual. How many reach it is reported, as it would hide divergence.
        robust: c of the loss sqrt(d + c^2) of a sample's mean squared residual d (Barron's with alpha 1).
        law: of times t.
        high: sigma / alpha at which sampling starts.
        sampler: ``any`` jumps from time to time; ``few`` guesses the clean sample and noises it again; ``multi``
            follows the velocity at each time.
        at: modules of the network to which the numbers are added; empty takes those that embed the time.
        lr: of Adam.
        ema: decay of the average, which is also what the base loss asks.
    """

    rows: Rows = Rows()
    scratch: bool = False
    twin: bool = True
    rectify: Annotated[float, Ge(0)] = 0.5
    order: Annotated[int, Ge(1)] = 2
    gap: Annotated[float, Gt(0), Le(1)] = 0.01
    enhance: Annotated[float, Ge(0)] = 0.0
    drop: Annotated[float, Ge(0), Le(1)] = 0.1
    clamp: Annotated[float, Gt(0)] = 1.0
    robust: Annotated[float, Gt(0)] = 1e-3
    law: TimeLaw = UniformTime()
    high: Annotated[float, Gt(0)] = 40.0
    sampler: Literal["any", "few", "multi"] = "any"
    at: tuple[str, ...] = ()
    lr: Annotated[float, Gt(0)] = 2e-4
    ema: Annotated[float, Ge(0), Le(1)] = 0.99
    few: ClassVar[tuple[int, ...]] = (1, 2, 4)

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return self.rows.needs

    @property
    def last(self) -> float:
        """The time at which sampling starts."""
        return self.high / (1 + self.high)

    def material(self, teacher: Denoiser, work: Work) -> dict[str, Tensor]:
        return self.rows.material(teacher, work)

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        student = work.copy_of(teacher)
        if self.scratch and work.build is None:
            redrawn(student)
        student = with_numbers(student, 2, work, self.at)
        return {"student": Role(student, self.lr, betas=(0.9, 0.99), ema=self.ema)}

    # ---------------------------------------------------------------- training

    @property
    def parts(self) -> int:  # type: ignore[override]
        return 4 if self.twin else 3

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        student: Any = nets["student"]
        x, cond = self.rows.draw(draw)
        cond = hidden(student, cond, draw.uniform() < self.drop)
        part = torch.arange(len(x), device=x.device) * self.parts // len(x)
        t, r = self.times(part, draw)
        sign = torch.where(part == ADV, -1.0, 1.0)
        base, ends = part != ADV, part == E2E
        if self.twin:
            x = torch.cat([x[base], self.one_step(student, draw.noise(int((~base).sum())), cond[~base])])

        z = draw.noise()
        x_t, v = add_noise(FLOW, x, z, t), z - x
        said = velocity(student, x_t, t, r, cond, sign)
        with torch.no_grad():
            wrong = said - v  # at negative time nothing else is learnt
            ema: Any = best(nets)
            off = self.recursion(ema, said[base], x_t[base], t[base], r[base], cond[base], v[base])
            wrong = torch.cat([off.clamp(-self.clamp, self.clamp), wrong[~base]])
        each = self.distance(said, wrong) * ((1 - (t - r)) * math.pi / 2.5).tan().add(1)
        losses = {"base": each[base].sum() / len(x), "clamped": (off.abs() > self.clamp).float().mean()}
        # The latter is for the eye: it has no gradient.
        if self.twin:
            losses["twin"] = each[~base].sum() / len(x)
            made = (x_t[ends] - shaped(t[ends], x) * said[ends]).detach()
            delta = self.twins_apart(student, made, cond[ends], draw).clamp(-self.clamp, self.clamp)
            losses["rectify"] = self.rectify * self.distance(said[ends], delta).sum() / len(x)
        yield "student", losses

    def times(self, part: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """``t`` and the earlier time ``r`` of every row; the twin's are equal."""
        t = self.drawn(draw, len(part))
        u = draw.uniform()
        t = torch.where(part == E2E, self.last, t)
        near = (t - self.gap * u).clamp(min=0)
        r = torch.where(part == MUL, near, torch.where(part == ANY, t * u, t))
        return t, torch.where(part == E2E, 0.0, r)

    def drawn(self, draw: Draw, n: int) -> Tensor:
        ratio = draw.ratios(self.law, n)
        return (ratio / (1 + ratio)).clamp(max=self.last)

    def recursion(
        self, ema: Denoiser, said: Tensor, x_t: Tensor, t: Tensor, r: Tensor, cond: Tensor, v: Tensor
    ) -> Tensor:
        """How far F is from a step of length ``gap`` along v and then ``order`` jumps of the average, over ``gap``;
        from v alone where there is no room for the step."""
        if self.enhance:
            x2, t2 = torch.cat([x_t, x_t]), torch.cat([t, t])
            given, null = velocity(ema, x2, t2, t2, torch.cat([cond, ema.null(cond)])).chunk(2)
            v = v + self.enhance * (given - null)
        there, way = x_t - self.gap * v, torch.zeros_like(v)
        s = torch.maximum(t - self.gap, r)
        for i in range(self.order):
            a, b = (torch.lerp(s, r, k / self.order) for k in (i, i + 1))
            step = shaped(a - b, v) * velocity(ema, there, a, b, cond)
            there, way = there - step, way + step
        far = (shaped(t - r, v) * said - way) / self.gap - v
        return torch.where(shaped(t - r < self.gap, v), said - v, far)

    def twins_apart(self, student: Denoiser, x: Tensor, cond: Tensor, draw: Draw) -> Tensor:
        """``F(x_t, -t, -t) - F(x_t, t, t)`` at one-step samples, noised afresh: (D_real - D_fake) / t."""
        t = self.drawn(draw, len(x))
        x_t = add_noise(FLOW, x, draw.noise_like(x), t)
        x2, t2, sign = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([-torch.ones_like(t), torch.ones_like(t)])
        with torch.no_grad():
            fake, real = velocity(student, x2, t2, t2, torch.cat([cond, cond]), sign).chunk(2)
        return fake - real

    def distance(self, said: Tensor, wrong: Tensor) -> Tensor:
        """``|F - sg[F - wrong]|^2`` per sample, weighted so that its gradient is bounded ``[B]``."""
        square = (said - (said - wrong).detach()).square().flatten(1).mean(1)
        return square * (square.detach() + self.robust**2).rsqrt()

    def one_step(self, student: Denoiser, z: Tensor, cond: Tensor) -> Tensor:
        t = torch.full((len(z),), self.last, device=z.device)
        with torch.no_grad():
            x = start(FLOW, z, t)
            return x - shaped(t, z) * velocity(student, x, t, torch.zeros_like(t), cond)

    # ---------------------------------------------------------------- afterwards

    def generate(
        self, nets: Nets, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        times = as_times(FLOW, few_step_ratios(calls, self.high), z)
        with torch.no_grad():
            x = start(FLOW, z, times[0])
            for t, to in pairwise(times):
                r = {"any": to, "few": torch.zeros_like(t), "multi": t}[self.sampler]
                f = velocity(best(nets), x, t.expand(len(x)), r.expand(len(x)), cond)
                if self.sampler == "few" and to > 0:
                    eps = torch.randn(x.shape, generator=generator, device=x.device)
                    x = add_noise(FLOW, x - t * f, eps, to)
                else:
                    x = x - (t - to) * f
        return x


def velocity(denoiser: Denoiser, x_t: Tensor, t: Tensor, r: Tensor, cond: Tensor, sign: Tensor | float = 1.0) -> Tensor:
    """The mean velocity from time t ``[B]`` to r ``[B]`` of the rectified flow; ``sign`` -1 asks the twin. In full
    precision always, as a small step of 0.01 makes errors a hundred times larger."""
    numbers = torch.stack([sign * t, sign * r], 1)
    t = t.clamp(min=1e-4)  # at 0 there is no velocity to be read from a clean sample
    with torch.autocast(x_t.device.type, enabled=False):
        return convert(FLOW, viewed(denoiser, FLOW)(x_t, t, cond, numbers=numbers), "x0", "flow", x_t, t)
