"""Distillation at sites: a site alone does what a training in one place does, and only what learns travels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from atoll.core.streams import stream
from atoll.core.tree import clone, equal, named_tensors
from atoll.data.dataset import Dataset, Federation
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.diffusers_model import load_denoiser
from atoll.diffusion.distiller import Conditions, Distiller, Draw, Images, Nets, Role, Update, Work
from atoll.diffusion.gan_heads import Adversary
from atoll.diffusion.methods.cd_ct import CdCt
from atoll.diffusion.methods.dmd import DMD
from atoll.diffusion.methods.twinflow import TwinFlow
from atoll.diffusion.trainer import Trainer
from atoll.federated.combine.weighted_mean import WeightedMean
from atoll.federated.engine import federate
from atoll.federated.methods.distil_at_sites import distil_at_sites
from atoll.recipes.recipe import read_recipe
from atoll.tasks.distilling import Distilling

METHOD = DMD(adversary=Adversary(weight=0.01), lr=1e-3)


def learned(rows: list[Any]) -> dict[str, Tensor]:
    return rows[-1].engine.state.replica["weights"]


def only(federation: Federation, site: int) -> Federation:
    return replace(federation, sites=(federation.sites[site],))


@pytest.mark.parametrize("moments", ["kept", "fresh"])
def test_one_site_is_a_training_in_one_place(
    moments: Any, digits: Dataset, digits_federation: Federation, generator: str
) -> None:
    """To the bit: the same steps on the same draws, role by role, step sizes and cooldown, and what Adam remembers."""
    federation, task = only(digits_federation, 0), Distilling(digits.info, start=generator, method=METHOD, samples=20)
    made = distil_at_sites(steps=2, batch=16, cooldown=0.5, moments=moments, average=0)
    made = made.but(combine=WeightedMean(by="uniform"))
    rows = list(federate(task=task, federation=federation, method=made, rounds=2, seed=3))

    train, model, known = federation.sites[0].train, task.model(3), dict[str, Any]()
    for visit in range(2):
        seed = stream(3, "distil", visit, 0).initial_seed()
        work = Work(digits.info.shape, Conditions(train.column("y")), Images(train), seed, 16)
        trainer = Trainer(METHOD, model.teacher, work, 4, cooldown=0.5, roles=model.roles, step=2 * visit)
        trainer.restore_moments(known if moments == "kept" else {})
        start = {name: named_tensors(model)[name].clone() for name in learned(rows)}
        trainer.once()
        trainer.once()
        known = {name: clone(tree) for name, tree in trainer.moments().items()}
        for name, t in start.items():  # as it travels
            named_tensors(model)[name].copy_(t + (named_tensors(model)[name] - t))
    assert equal(learned(rows), {name: named_tensors(model)[name] for name in learned(rows)})


def test_what_learns_travels_and_the_teacher_stays(
    digits: Dataset, digits_federation: Federation, generator: str
) -> None:
    task = Distilling(digits.info, start=generator, method=METHOD, samples=20)
    rows = list(federate(task=task, federation=digits_federation, method=distil_at_sites(steps=1, batch=8), rounds=2))
    fresh, after = task.model(0), learned(rows)
    assert {n.split(".")[1] for n in after} == {"student", "fake", "head"}
    model = rows[-1].engine.workers.local.site_model(None).model
    assert equal(clone(named_tensors(model.teacher)), clone(named_tensors(fresh.teacher)))
    for role in ("student", "fake", "head"):
        assert any(
            not torch.equal(t, named_tensors(fresh)[n]) for n, t in after.items() if n.startswith(f"learned.{role}")
        )


@dataclass(frozen=True)
class Watching(Distiller):
    """Learns nothing of use, and writes down which conditions it was given."""

    asked: ClassVar[set[int]] = set()
    shown: ClassVar[set[int]] = set()
    steps: ClassVar[set[tuple[int, int]]] = set()

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        return {"teacher": Role(teacher), "student": Role(work.copy_of(teacher), 1e-3)}

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        if draw.steps != 2:  # the step whose operations are counted
            self.asked.update(draw.cond().tolist())
            self.shown.update(draw.real()[1].tolist())
            self.steps.add((draw.step, draw.steps))
        yield "student", {"size": sum(p.square().sum() for p in nets["student"].parameters())}  # type: ignore[dict-item]

    def generate(
        self, nets: Nets, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        return z


def test_a_site_is_asked_for_the_classes_that_it_has(
    digits: Dataset, digits_federation: Federation, generator: str
) -> None:
    """And steps count through the rounds, so that what a method schedules over a run goes on."""
    site = digits_federation.sites[0].train
    some = site.select(torch.nonzero(site.column("y") < 3).flatten())
    federation = replace(digits_federation, sites=(replace(digits_federation.sites[0], train=some),))
    method = Watching()
    task = Distilling(digits.info, start=generator, method=method, samples=20)
    list(federate(task=task, federation=federation, method=distil_at_sites(steps=2, batch=64, rounds=2), rounds=3))
    assert method.asked == method.shown == set(some.column("y").tolist())
    assert method.steps == {(0, 4), (1, 4), (2, 4), (3, 4)}  # a round too many goes on at the end of the schedule


def test_sites_learn_what_none_of_them_has_alone(
    digits: Dataset, digits_federation: Federation, generator: str
) -> None:
    """Consistency training from the teacher's weights: one call comes closer to the digits."""
    task = Distilling(digits.info, start=generator, method=CdCt(mode="train", lr=3e-3), samples=300)
    made = distil_at_sites(steps=15, batch=32, rounds=3)
    rows = list(federate(task=task, federation=digits_federation, method=made, rounds=3, evaluate_every=1))
    before = task.evaluate(task.model(0), digits_federation.test)["energy_distance"]
    assert rows[-1].metrics["energy_distance"] < 0.85 * before


def test_the_schedule_is_as_long_as_the_run(digits: Dataset, digits_federation: Federation, generator: str) -> None:
    """Unless somebody says otherwise."""
    method = Watching()
    method.steps.clear()
    task = Distilling(digits.info, start=generator, method=method, samples=20)
    list(federate(task=task, federation=only(digits_federation, 1), method=distil_at_sites(steps=2, batch=4), rounds=3))
    assert {whole for _, whole in method.steps} == {6}
    recipe = read_recipe({"method": {"name": "distil_at_sites", "steps": 2}, "rounds": 7})
    assert recipe.make_method().local.rounds == 7  # type: ignore[attr-defined]
    attacked = read_recipe({"method": "distil_at_sites", "rounds": 7, "attack": "sign_flip"})
    assert attacked.make_method(10).local.inner.rounds == 7  # type: ignore[attr-defined]


def test_operations_are_those_of_a_training(digits: Dataset, digits_federation: Federation, generator: str) -> None:
    """What is billed for a visit is what the trainer counts of its steps, critics and adversary included."""
    task = Distilling(digits.info, start=generator, method=METHOD, samples=20)
    made = distil_at_sites(steps=3, batch=16)
    (row,) = federate(task=task, federation=only(digits_federation, 0), method=made, rounds=1)
    work = Work(digits.info.shape, Conditions.classes(10), Images(digits), batch=16)
    each = Trainer(METHOD, load_denoiser(generator), work, 2).flops_per_step()
    assert row.flops[0] == pytest.approx(3 * each, rel=1e-3)


def test_a_batch_that_the_method_cannot_divide_is_no_reply(
    digits: Dataset, digits_federation: Federation, generator: str
) -> None:
    task = Distilling(digits.info, start=generator, method=TwinFlow(), samples=20)
    made = distil_at_sites(steps=1, batch=3)
    (row,) = federate(task=task, federation=only(digits_federation, 0), method=made, rounds=1)
    assert "a batch of 3 is too small" in row.refused[0]
