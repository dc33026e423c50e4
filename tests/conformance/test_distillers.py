"""Every way to make a few-step generator, against what all of them promise (``atoll/diffusion/distiller.py``)."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.core.build import describe, find, names_in
from atoll.core.errors import AtollError, DataError
from atoll.core.streams import stream
from atoll.core.tree import clone, equal, named_tensors
from atoll.data.sources.digits import Digits
from atoll.diffusion.as_denoiser import AsDenoiser
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distillation import Distillation
from atoll.diffusion.distiller import Conditions, Distiller, Images, Work
from atoll.diffusion.latent_reward import LatentReward
from atoll.diffusion.pairs import TeacherPairStore, TrajectoryStore
from atoll.diffusion.rewards import InkFraction
from atoll.diffusion.solvers import Sampler
from atoll.diffusion.student import load_student, save_student
from atoll.diffusion.teacher import make_denoiser
from atoll.diffusion.trainer import Trainer
from atoll.federated.share.learned import Learned
from atoll.models.export import about_model
from atoll.models.unet import UNet

METHODS = names_in(Distiller.package, Distiller)
ARGUMENTS: dict[str, dict[str, Any]] = {
    "dollar": {"taste": LatentReward(InkFraction(), trust=0.0, ramp=0.5, keep=40)},
    "agd": {"trajectories": TrajectoryStore(count=8, sampler=Sampler(solver="ddim", steps=3))},
    "hipa": {"pairs": TeacherPairStore(count=24, sampler=Sampler(steps=2))},
    "rfpp": {"pairs": TeacherPairStore(count=24, sampler=Sampler(steps=2))},
    "disback": {"targets": 2, "degrade": 0.34, "backtrack": 0.5},
    "lcsc": {"record": 0.5, "checkpoints": 3, "samples": 60},
}
"""What makes a method small enough for a test."""
REFUSED_AT_SITES = {"agd", "disback", "dollar", "hipa", "lcsc", "msd", "pd", "phased_dmd", "rfpp", "w2sd"}
STEPS = 6


def make(name: str) -> Any:
    return find(Distiller.package, name, Distiller)(**ARGUMENTS.get(name, {}))


def world(name: str) -> tuple[Denoiser, Work]:
    images = Images(Digits().load().train)
    teacher = make_denoiser(UNet(width=8), images.data.info, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    needs_images = make(name).needs == "images"
    work = Work(images.data.info.shape, Conditions.classes(10), images if needs_images else None, seed=5, batch=12)
    return teacher, work


@functools.cache
def trained(name: str) -> Trainer:
    """After a whole run in float32, for tests that only look."""
    trainer = Trainer(make(name), *world(name), STEPS)
    trainer.go()
    return trainer


def samples(method: Any, trainer: Trainer, calls: int) -> torch.Tensor:
    z = torch.randn(10, *trainer.work.shape, generator=torch.Generator().manual_seed(1))
    made: torch.Tensor = method.generate(trainer.nets, z, torch.arange(10), calls, torch.Generator().manual_seed(2))
    return made


@pytest.mark.parametrize("name", METHODS)
def test_it_resumes_to_the_same_bits_and_leaves_the_teacher_alone(name: str, tmp_path: Path) -> None:
    method = make(name)
    teacher, work = world(name)
    before = clone(named_tensors(teacher))

    straight = Trainer(method, copy.deepcopy(teacher), work, STEPS, tmp_path / "straight")
    straight.go()

    broken = Trainer(method, copy.deepcopy(teacher), work, STEPS, tmp_path / "broken")
    for step in broken.iterate():
        if step == STEPS // 2:
            broken.save()
            break
    resumed = Trainer(method, teacher, work, STEPS, tmp_path / "broken")
    resumed.go()

    assert resumed.step == straight.step == STEPS
    for role, module in straight.nets.items():
        assert equal(named_tensors(module), named_tensors(resumed.nets[role])), role
    assert equal(before, named_tensors(teacher))
    for calls in method.few:
        made = samples(method, straight, calls)
        assert made.shape == (10, *work.shape)
        assert torch.isfinite(made).all()
        assert not made.requires_grad
        assert torch.equal(made, samples(method, resumed, calls))


@pytest.mark.parametrize("name", METHODS)
def test_sampling_calls_networks_as_often_as_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The billed number: rows that go through any denoiser, per sample."""
    method = make(name)
    teacher, work = world(name)
    trainer = Trainer(method, teacher, work, STEPS)
    trainer.prepare()
    rows = 0
    plain = Denoiser.forward

    def counted(self: Denoiser, x_t: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        nonlocal rows
        rows += len(x_t)
        return plain(self, x_t, *args, **more)

    monkeypatch.setattr(Denoiser, "forward", counted)
    for calls in method.few:
        rows = 0
        samples(method, trainer, calls)
        assert rows == 10 * calls, f"{name} says {calls} calls and makes {rows / 10}"


@pytest.mark.parametrize("name", METHODS)
def test_it_is_plain_data(name: str) -> None:
    """A method is a value: equal ones compare equal, and its description builds it again."""
    method = make(name)
    assert dataclasses.is_dataclass(method)
    assert method == make(name)
    assert describe(method)["name"] == name


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_student_draws_the_same(name: str, tmp_path: Path) -> None:
    trainer = trained(name)
    method, teacher, work, nets = trainer.method, trainer.teacher, trainer.work, trainer.nets
    info = Digits().load().train.info
    builder = about_model(UNet(width=8), info, 10, 0, AsDenoiser("edm", 0.5))
    save_student(tmp_path, method, nets, teacher, info, 0.5, builder, {})

    student = load_student(tmp_path)
    assert describe(student.method) == describe(method)
    for calls in method.few:
        z = torch.randn(10, *work.shape, generator=stream(3, "draw", "noise"))
        own = torch.Generator().manual_seed(stream(3, "draw", "sampler").initial_seed())
        expected = method.generate(nets, z, torch.arange(10), calls, own)
        assert torch.equal(student.draw(torch.arange(10), calls, seed=3), expected)
    assert student.pixels(expected).shape == (10, 8, 8, 1)
    with pytest.raises(DataError, match="0 to 9"):
        student.draw(torch.tensor([10]))


@pytest.mark.parametrize("name", sorted(REFUSED_AT_SITES))
def test_what_sites_cannot_do_is_refused(name: str) -> None:
    teacher, work = world(name)
    with pytest.raises(AtollError, match=r"a server can make|between phases|trains nothing|remembers"):
        Distillation(make(name), teacher, replace(work, images=None))


@pytest.mark.parametrize("name", sorted(set(METHODS) - REFUSED_AT_SITES))
def test_sites_do_the_rest_together(name: str) -> None:
    """Two steps at one: finite changes of what learns, which is what travels, and of nothing else."""
    teacher, work = world(name)
    model = Distillation(make(name), teacher, replace(work, images=None))
    before = {n: t.clone() for n, t in named_tensors(model).items()}
    images = Images(Digits().load().train.select(range(40)))
    trainer = Trainer(make(name), teacher, replace(work, images=images), STEPS, roles=model.roles)
    trainer.once()
    trainer.once()
    after = named_tensors(model)
    assert all(torch.equal(after[n], t) for n, t in before.items() if n.startswith("teacher."))
    assert any(not torch.equal(after[n], t) for n, t in before.items() if n.startswith("learned.student"))
    assert all(bool(torch.isfinite(t).all()) for t in after.values() if t.is_floating_point())
    shared = set(Learned().split(model).shared)
    assert {n for n, p in model.named_parameters() if p.requires_grad} <= shared
    assert {n for n, t in before.items() if not torch.equal(after[n], t) and t.is_floating_point()} <= shared


@pytest.mark.parametrize("name", METHODS)
def test_networks_may_compute_in_bfloat16(name: str) -> None:
    """Weights, losses and samples stay float32, and the student learns about what it does in float32."""
    method = make(name)
    trainer = Trainer(method, *world(name), STEPS, precision="bf16")
    trainer.prepare()
    while trainer.step < STEPS:
        assert all(math.isfinite(v) for v in trainer.once().values())
    for role, module in trainer.nets.items():
        for tensor_name, tensor in named_tensors(module).items():
            assert tensor.dtype != torch.bfloat16, f"{role} {tensor_name}"
    made, exact = samples(method, trainer, method.few[0]), samples(method, trained(name), method.few[0])
    assert made.dtype == torch.float32
    assert float((made - exact).std() / exact.std()) < 0.1
