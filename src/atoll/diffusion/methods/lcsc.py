"""LCSC: linear combination of saved checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from atoll.core.card import Card, Cite
from atoll.core.streams import stream
from atoll.core.tree import copy_, named_tensors
from atoll.data.dataset import Dataset, Info
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Distiller, Draw, Images, Needs, Nets, Role, Update, Work, most, usual
from atoll.diffusion.evaluate import Judge, Reference, make_judge
from atoll.diffusion.rows import Rows
from atoll.diffusion.search import Evolution, FewStepFrechet, Metric, Ranking, scored
from atoll.diffusion.trail import Recorder, put

CARD = Card(
    name="lcsc",
    area="few-step distillation",
    summary="evolutionary search finds the best linear combination of one run's checkpoints, negative weights included",
    cites=(
        Cite(
            authors="Liu, Zhu, Lin, Ning, Wang, Blaschko, Yekhanin, Yan, Dai, Yang, Wang", year=2024,
            title="Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better",
            arxiv="2404.02241",
        ),
    ),
    suits=("generative models", "few calls a sample"),
)  # fmt: skip


class Population(nn.Module):
    """The search's :class:`Ranking`, and the coefficients ``chosen`` of the model that came out, as state."""

    coefficients: Tensor
    scores: Tensor
    floor: Tensor
    chosen: Tensor

    def __init__(self, size: int, count: int) -> None:
        super().__init__()
        self.register_buffer("coefficients", torch.zeros(size, count, dtype=torch.float64))
        self.register_buffer("scores", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("floor", torch.zeros((), dtype=torch.float64))
        self.register_buffer("chosen", torch.zeros(count, dtype=torch.float64))

    def read(self) -> Ranking:
        return Ranking(self.coefficients.cpu(), self.scores.cpu(), self.floor.cpu())

    def write(self, ranking: Ranking, chosen: Tensor) -> None:
        copy_(named_tensors(self), {**vars(ranking), "chosen": chosen})


@dataclass(frozen=True)
class LCSC(Distiller):
    """Linear combination of saved checkpoints (Liu et al., 2024, arXiv 2404.02241), of any method's student.

    The run's first part is the base method; from some point on its student (not its average) is saved now and then.
    Then nothing is trained any more: each step scores one combination of the checkpoints, ``theta_1 + sum_i a_i
    (theta_i - theta_1)``, on samples from fixed noise, and evolution keeps the best. It starts from averages with
    several decays, single checkpoints and the plain mean, so on that noise it never ends behind them. The last step
    scores the finalists on fresh noise and four times as many samples. One model comes out. On the ring it is twice as
    close as the last checkpoint of a short run, on noise that it never saw, and no closer than the best average.

    Departs: the authors' search code was not at hand; the operators are :class:`Evolution`'s. For checkpoints that are
    there already, :func:`atoll.diffusion.search.search` does the same alone.

    Args:
        base: the method that is trained.
        record: share of the run that trains; the rest searches.
        checkpoints: K.
        window: share of the training, at its end, that they are spread over. (In a training too short for K of them,
            the missing first ones are its beginning.)
        how: the search's knobs.
        samples: per combination.
        calls: per sample; None: the base method's fewest.
        finalists: combinations that the last step scores again; 1 takes the search's word.
        reference: the rows whose features' mean and covariance are the aim: real images, or samples of the teacher.
            Features are those of a small classifier of these rows (``evaluate.py``), and rows that are no images of
            known classes are compared as they are.
        metric: ``model -> float`` to minimise instead (from Python only); then no such rows are needed.
    """

    base: Distiller = usual("dmd")
    record: Annotated[float, Gt(0), Lt(1)] = 0.8
    checkpoints: Annotated[int, Ge(2)] = 20
    window: Annotated[float, Gt(0), Le(1)] = 0.5
    how: Evolution = Evolution()
    samples: Annotated[int, Ge(50)] = 1000
    calls: Annotated[int, Ge(1)] | None = None
    finalists: Annotated[int, Ge(1)] = 3
    reference: Rows = Rows()
    metric: Callable[[nn.Module], float] | None = None
    more: ClassVar[int] = 4
    """Times as many samples for a finalist."""

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return most(self.base.needs, "nothing" if self.metric else self.reference.needs)

    @property
    def few(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.few

    def training(self, steps: int) -> int:
        """How many steps train."""
        return max(1, round(self.record * steps))

    def due(self, step: int, steps: int) -> int | None:
        """Which checkpoint, from 0, is saved after a step of the training; they are equally far apart."""
        train = self.training(steps)
        every = max(1, int(self.window * train / self.checkpoints))
        back, rest = divmod(train - step - 1, every)
        return self.checkpoints - 1 - back if not rest and back < self.checkpoints else None

    def material(self, teacher: Denoiser, work: Work) -> dict[str, Tensor]:
        made = self.base.material(teacher, work)
        if self.metric is None:
            images = work.images
            if self.reference.made is not None:
                images = as_images(self.reference.material(teacher, work), teacher.classes)
            assert images is not None
            made |= {f"lcsc.{name}": t for name, t in aim(images).items()}
        return made

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        roles = self.base.roles(teacher, work)
        own = {name: role.module for name, role in roles.items()}
        student = {**own, **self.base.joined(own)}["student"]
        size = min(self.how.population, len(self.how.seeds(self.checkpoints)))
        return {
            **roles,
            "trail": Role(Recorder(self.checkpoints, student)),
            "search": Role(Population(size, self.checkpoints)),
        }

    def begin(self, nets: Nets, step: int, steps: int) -> Iterable[str]:
        train = self.training(steps)
        return self.base.begin(nets, step, train) if step < train else ()

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        train = self.training(draw.steps)
        if draw.step >= train:
            self.evolve(nets, draw, train)
            return
        trail: Any = nets["trail"]
        if draw.step == 0:
            for i in range(self.checkpoints):
                trail.write(i, nets["student"])
        yield from self.base.updates(nets, dataclasses.replace(draw, steps=train))
        place = self.due(draw.step, draw.steps)
        if place is not None:
            trail.write(place, nets["student"])

    def evolve(self, nets: Nets, draw: Draw, train: int) -> None:
        """One step of the search; the student is the best combination so far."""
        state: Any = nets["search"]
        recorder: Any = nets["trail"]
        trail, own = recorder.trail, stream(draw.work.seed, "lcsc", draw.step)
        served = [nets[name] for name in ("student", "student_ema") if name in nets]
        metric = self.metric or self.frechet(nets, draw)

        def score(a: Tensor, metric: Metric = metric) -> float:
            become(a)
            return scored(metric, served[0])

        def become(a: Tensor) -> None:
            values = trail.mix(a)
            for net in served:
                put(values, net)

        if draw.step == train:
            seeds = self.how.seeds(self.checkpoints)
            scores = torch.tensor([score(a) for a in seeds], dtype=torch.float64)
            ranking = Ranking.of(seeds, scores, self.how.population)
        else:
            before: Ranking = state.read()
            a = self.how.child(before.coefficients, (draw.step - train) / (draw.steps - train), own)
            ranking = before.after(a, score(a))
        chosen = ranking.coefficients[0]
        last = draw.step == draw.steps - 1
        if last and self.finalists > 1 and isinstance(metric, FewStepFrechet):
            fresh = dataclasses.replace(metric, seed=own.initial_seed(), samples=self.more * metric.samples)
            chosen = min(ranking.finalists(self.finalists), key=lambda a: score(a, fresh))
        become(chosen)
        state.write(ranking, chosen)

    def frechet(self, nets: Nets, draw: Draw) -> FewStepFrechet:
        """How far few-step samples are from the reference; ``student`` is the network that is being tried."""
        calls, work = self.calls or min(self.few), draw.work
        found = {n.removeprefix("lcsc."): t for n, t in draw.material.items() if n.startswith("lcsc.")}
        return FewStepFrechet(
            lambda _, z, cond, generator: self.base.generate(nets, z, cond, calls, generator),
            seen_by(found, work.shape), found["mean"], found["cov"], work.shape, work.conditions.rows.cpu(),
            self.samples, seed=work.seed, device=work.device,
        )  # fmt: skip

    def joined(self, nets: Nets) -> dict[str, nn.Module]:
        return self.base.joined(nets)

    def generate(
        self, nets: Nets, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.base.generate(nets, z, cond, calls, generator)


def as_images(made: Mapping[str, Tensor], classes: int | None) -> Images:
    """The teacher's samples as rows of a data set."""
    x, cond = made["x"], made["cond"]
    kind = "image" if x.dim() == 4 else "table"
    info = Info(name="teacher samples", kind=kind, shape=tuple(x.shape[1:]), num_classes=classes)
    return Images(Dataset({"x": x, "y": cond}, info), sigma_data=1.0)  # as they are


def aim(images: Images) -> dict[str, Tensor]:
    """``mean`` and ``cov`` of the rows' features, and the weights of the judge that has them, if there is one."""
    info = images.data.info
    if info.num_classes is None or len(info.shape) != 3:
        x = torch.cat([images.take(rows)[0] for rows in torch.arange(len(images)).split(2000)]).flatten(1).double()
        return {"mean": x.mean(0), "cov": x.T.cov()}
    reference = Reference.of(images, make_judge(images))
    weights = {f"judge.{name}": t.clone() for name, t in named_tensors(reference.judge).items()}
    return {"mean": reference.mean, "cov": reference.cov, **weights}


def seen_by(found: Mapping[str, Tensor], shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Features as :func:`aim` took them."""
    weights = {n.removeprefix("judge."): t for n, t in found.items() if n.startswith("judge.")}
    if not weights:
        return lambda x: x.flatten(1)
    judge = Judge(shape, len(weights["out.bias"]))
    judge.load_state_dict(weights)
    return judge.features
