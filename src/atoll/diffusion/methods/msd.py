"""MSD: multi-student diffusion distillation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from atoll.core.card import Card, Cite
from atoll.core.errors import AtollError
from atoll.core.streams import key, stream
from atoll.core.tree import copy_, named_tensors
from atoll.data.dataset import Info
from atoll.diffusion.condition_router import ConditionRouter, MultiStudent, routed
from atoll.diffusion.denoiser import Denoiser, viewed
from atoll.diffusion.distiller import Conditions, Distiller, Draw, Needs, Nets, Role, Update, Work, most, usual
from atoll.diffusion.losses import denoising_loss
from atoll.diffusion.pairs import TeacherPairStore
from atoll.diffusion.rows import Rows
from atoll.diffusion.schedules import LogNormal, TimeLaw, add_noise
from atoll.models.model import ModelBuilder

CARD = Card(
    name="msd",
    area="few-step distillation",
    summary="conditions are split among several one-step students, which may be smaller than their teacher",
    cites=(
        Cite(
            authors="Song, Lorraine, Nie, Kreis, Lucas", year=2024, arxiv="2410.23274",
            title="Multi-student Diffusion Distillation for Better One-step Generators",
        ),
    ),
    suits=("generative models", "few calls a sample", "distilling without data"),
)  # fmt: skip


@dataclass(frozen=True)
class MSD(Distiller):
    """Multi-student distillation (Song et al., 2024, arXiv 2410.23274), by any method that makes one student.

    Conditions are split into K parts; student k is trained on part k alone, with a fake score (and a head) of its own
    and the shared teacher. A sample costs one student's calls, whatever K; storage and training cost K times one
    student's. (An ``adversary`` of the base method makes the paper's second, adversarial stage.) Roles are named
    ``0.student``, ``0.fake``, ``1.student``, ...; ``student`` is all of them behind the router.

    A student of another size cannot start as the teacher's copy, so it first learns what the teacher says of noised
    samples, as a denoiser for all noise levels (*teacher score matching*); teacher and fake scores keep their size.

    Args:
        base: the method that makes each student.
        students: K; with 1 of the teacher's size it is the base method, bit for bit.
        partition: ``alike`` puts neighbouring classes together, or clusters of embeddings; ``random``, for classes, is
            what it should be compared with.
        network: of the students; None: the teacher's. (From Python also a function that makes a denoiser.)
        match: share of the run that such students spend on teacher score matching; 0: they start from random weights.
        match_lr: of Adam there.
        match_law: noise levels there.
        match_rows: clean rows that are noised there: samples of the teacher, or real images.
    """

    base: Distiller = usual("dmd")
    students: Annotated[int, Ge(1)] = 2
    partition: Literal["alike", "random"] = "alike"
    network: ModelBuilder | Callable[[], Denoiser] | None = None
    match: Annotated[float, Ge(0), Lt(1)] = 0.3
    match_lr: Annotated[float, Gt(0)] = 2e-3
    match_law: TimeLaw = LogNormal()
    match_rows: Rows = Rows(TeacherPairStore(count=2000))

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return most(self.base.needs, self.match_rows.needs if self._matches else "nothing")

    @property
    def few(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.few

    @property
    def _matches(self) -> bool:
        return self.network is not None and self.match > 0

    def matching(self, steps: int) -> int:
        """How many steps go to teacher score matching."""
        return round(self.match * steps) if self._matches else 0

    # ---------------------------------------------------------------- who is asked for what

    def router(self, teacher: Denoiser, work: Work) -> ConditionRouter:
        rows = work.conditions.rows
        if teacher.classes is None:
            if self.partition == "random":
                raise AtollError("Embeddings have no random partition that new ones could be sorted into; use `alike`.")
            return ConditionRouter.of_embeddings(rows, self.students, key(work.seed, "msd", "clusters"))
        shuffle = stream(work.seed, "msd", "partition") if self.partition == "random" else None
        return ConditionRouter.of_classes(rows, teacher.classes, self.students, shuffle)

    def part(self, work: Work, router: ConditionRouter, k: int) -> Work:
        """What student k is given: its conditions, and images of them."""
        if router.count == 1:
            return work
        rows, images = work.conditions.rows, work.images
        chosen = (router(rows.to(work.device)) == k).to(rows.device)
        if images is not None:
            y = images.data.column("y")
            own = torch.arange(len(y)) if images.rows is None else images.rows
            mine = torch.cat([router(y[some].to(work.device)).cpu() == k for some in own.split(10_000)])
            images = dataclasses.replace(images, rows=own[mine])
        return dataclasses.replace(work, conditions=Conditions(rows[chosen]), images=images)

    def material(self, teacher: Denoiser, work: Work) -> dict[str, Tensor]:
        router = self.router(teacher, work).to(work.device)
        made: dict[str, Tensor] = {}
        for k in range(self.students):
            own = self.part(work, router, k)
            made |= {f"{k}.{name}": t for name, t in self.base.material(teacher, own).items()}
            if self._matches:
                made |= {f"{k}.match.{name}": t for name, t in self.match_rows.material(teacher, own).items()}
            if own.images is not None and own.images.rows is not None:
                made[f"{k}.images"] = own.images.rows
        return made

    def draw_of(self, k: int, nets: Nets, draw: Draw) -> Draw:
        """A step's random numbers, conditions and rows for student k; students do not disturb each other's."""
        material = {n.removeprefix(f"{k}."): t for n, t in draw.material.items() if n.startswith(f"{k}.")}
        router: Any = nets["router"]
        work, images = self.part(dataclasses.replace(draw.work, images=None), router, k), draw.work.images
        if images is not None:  # looked up once, see above
            images = dataclasses.replace(images, rows=material.get("images", images.rows))
        generator = draw.generator
        if k:
            number = key(draw.work.seed, "msd", k, draw.step)
            generator = torch.Generator(draw.work.device).manual_seed(number)
        work = dataclasses.replace(work, images=images)
        return dataclasses.replace(draw, work=work, material=material, generator=generator)

    # ---------------------------------------------------------------- who takes part

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        router = self.router(teacher, work).to(work.device)
        roles = {"router": Role(router)}
        for k in range(self.students):
            for name, role in self.base.roles(teacher, self.part(work, router, k)).items():
                roles[name if role.module is teacher else f"{k}.{name}"] = role
            if self.network is not None:
                small = resized(self.network, teacher, work)
                roles[f"{k}.student"].module = small
                if self._matches:  # the same weights, with step sizes of their own
                    roles[f"{k}.match"] = Role(small, self.match_lr, saved=False)
        return roles

    def nets_of(self, k: int, nets: Nets) -> dict[str, nn.Module]:
        """The networks as the base method knows them."""
        shared = {name: net for name, net in nets.items() if not name[0].isdigit()}
        return {**shared, **{n.removeprefix(f"{k}."): net for n, net in nets.items() if n.startswith(f"{k}.")}}

    def joined(self, nets: Nets) -> dict[str, nn.Module]:
        each: list[dict[str, Any]] = [self.nets_of(k, nets) for k in range(self.students)]
        router: Any = nets["router"]
        every = [{**own, **self.base.joined(own)} for own in each]
        names = [name for name in ("student", "student_ema") if name in every[0]]
        return {name: MultiStudent([own[name] for own in every], router) for name in names}

    # ---------------------------------------------------------------- what they do

    def begin(self, nets: Nets, step: int, steps: int) -> Iterable[str]:
        matching = self.matching(steps)
        if step < matching:
            return
        for k in range(self.students):
            own = self.nets_of(k, nets)
            if matching and step == matching and "student_ema" in own:
                copy_(named_tensors(own["student_ema"]), named_tensors(own["student"]))
            for name in self.base.begin(own, step - matching, steps - matching):
                yield f"{k}.{name}"

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        matching = self.matching(draw.steps)
        for k in range(self.students):
            own, mine = self.nets_of(k, nets), self.draw_of(k, nets, draw)
            if draw.step < matching:
                yield f"{k}.match", {"teacher": self.matching_loss(own, mine)}
                continue
            mine = dataclasses.replace(mine, step=draw.step - matching, steps=draw.steps - matching)
            for roles, losses in self.base.updates(own, mine):
                names = (roles,) if isinstance(roles, str) else roles
                yield tuple(f"{k}.{name}" for name in names), losses

    def matching_loss(self, nets: Nets, draw: Draw) -> Tensor:
        """How far the student is from the teacher on noised rows, over all noise levels."""
        teacher: Any = nets["teacher"]
        student: Any = nets["student"]
        stored = {n.removeprefix("match."): t for n, t in draw.material.items() if n.startswith("match.")}
        x, cond = self.match_rows.draw(dataclasses.replace(draw, material=stored))
        ratio, eps = draw.ratios(self.match_law), draw.noise_like(x)
        t = teacher.schedule.time(ratio)
        x_t = add_noise(teacher.schedule, x, eps, t)
        with torch.no_grad():
            said = teacher(x_t, t, cond)
        return denoising_loss(viewed(student, teacher.schedule)(x_t, t, cond), said, ratio, teacher.sigma_data).mean()

    def generate(
        self, nets: Nets, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        router: Any = nets["router"]
        return routed(
            router(cond),
            lambda k, rows: self.base.generate(self.nets_of(k, nets), z[rows], cond[rows], calls, generator),
        )


def resized(network: ModelBuilder | Callable[[], Denoiser], teacher: Denoiser, work: Work) -> Denoiser:
    """A fresh denoiser with another network, under the teacher's schedule and conditions."""
    build = getattr(network, "build", None)
    if build is None:
        made: Denoiser = network()  # type: ignore[operator]
        return made.requires_grad_(True)
    if network.architecture.denoises is False:  # type: ignore[union-attr]
        raise AtollError(f"{type(network).__name__} does not take a noise level; choose `unet` or `dit` as `network`.")
    info = Info(name="samples", kind="image", shape=work.shape, num_classes=teacher.classes)
    return Denoiser(
        build(info, teacher.classes or 1), teacher.schedule, teacher.predicts, classes=teacher.classes,
        sigma_data=teacher.sigma_data, time_scale=teacher.time_scale, null=teacher.null_embedding,
    )  # fmt: skip
