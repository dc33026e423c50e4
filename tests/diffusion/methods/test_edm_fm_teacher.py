"""Training a denoiser: its loss, what it hides, and that it learns what the exact one knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from atoll.core.streams import stream
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Draw, Work
from atoll.diffusion.exact import PlaneNet
from atoll.diffusion.losses import training_loss
from atoll.diffusion.methods.edm_fm_teacher import EdmFmTeacher
from atoll.diffusion.schedules import EDM, RF, LogNormal, add_noise
from atoll.diffusion.solvers import Sampler
from atoll.diffusion.trainer import Trainer


def plane(kind: str) -> Denoiser:
    torch.manual_seed(0)
    if kind == "edm":
        return Denoiser(PlaneNet(), EDM(), "edm", classes=4, sigma_data=1.4)
    return Denoiser(PlaneNet(), RF(), "flow", classes=4, time_scale=4.0)


def ring_trainer(make: Callable[..., Work], kind: str, steps: int, **more: Any) -> Trainer:
    work = replace(make(256, images=True), build=None)
    return Trainer(EdmFmTeacher(lr=5e-3, ema=0.98, **more), plane(kind), work, steps)


@pytest.mark.parametrize("kind", ["edm", "flow"])
def test_it_learns_the_exact_denoiser(kind: str, ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    """Conditions, the null condition and all noise levels; more calls give better samples."""
    trainer = ring_trainer(ring_work, kind, 350)
    mixture: Any = ring_teacher.net
    x0, y = mixture.draw(2000, stream(1, "held out"))
    ratio = LogNormal(-0.5, 1.0).draw(2000, stream(2, "levels"))
    eps = torch.randn(2000, 2, generator=stream(3, "eps"))

    def miss(cond: Tensor) -> float:
        student: Any = trainer.nets["student_ema"]
        schedule = student.schedule
        t = schedule.time(ratio)
        with torch.no_grad():
            said = student(add_noise(schedule, x0, eps, t), t, cond)
            exact = ring_teacher(add_noise(EDM(), x0, eps, ratio), ratio, cond)
        return float((said - exact).square().mean())

    before = [miss(y), miss(torch.full_like(y, 4))]
    for _ in range(350):
        trainer.once()
    after = [miss(y), miss(torch.full_like(y, 4))]
    assert after[0] < 0.06 * before[0]
    assert after[1] < 0.5 * before[1]  # seen a tenth of the time

    z, cond = torch.randn(800, 2, generator=stream(4, "z")), torch.arange(800) % 4
    distance = []
    for calls in (1, 4, 19):
        x = trainer.method.generate(trainer.nets, z, cond, calls)
        near = torch.cdist(x, mixture.means).min(1)
        distance.append(float(near.values.mean()))
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 0.36 < 0.6 < distance[0]  # exact samples: 0.19
    assert float((mixture.labels[near.indices] == cond).float().mean()) > 0.95


def test_the_step_is_edms_loss_with_conditions_hidden(ring_work: Callable[..., Work]) -> None:
    """Draw by draw: real rows, which to hide, levels, noise."""
    method, trainer = EdmFmTeacher(drop=0.3), ring_trainer(ring_work, "edm", 5)
    draws = [Draw(trainer.work, torch.Generator().manual_seed(5), 0, 5) for _ in range(2)]
    ((role, losses),) = list(method.updates(trainer.nets, draws[0]))
    x, y = draws[1].real()
    hide = draws[1].uniform() < 0.3
    s, eps = LogNormal(-1.2, 1.2).draw(256, draws[1].generator), draws[1].noise()
    student: Any = trainer.nets["student"]
    guess = student(x + s[:, None] * eps, s, torch.where(hide, torch.full_like(y, 4), y))
    weight = (s**2 + 1.4**2) / (s * 1.4) ** 2
    assert role == "student"
    assert float(losses["denoising"].detach()) == pytest.approx(
        float((weight * (guess - x).square().mean(1)).mean().detach()), rel=1e-4
    )
    assert 0.2 < float(hide.float().mean()) < 0.4


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_conditions_are_hidden_as_often_as_asked(drop: float, ring_work: Callable[..., Work]) -> None:
    trainer = ring_trainer(ring_work, "edm", 5)
    seen: list[Tensor] = []
    trainer.nets["student"].register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    list(EdmFmTeacher(drop=drop).updates(trainer.nets, Draw(trainer.work, torch.Generator(), 0, 5)))
    assert bool((seen[0] == 4).all()) is (drop == 1.0)
    assert bool((seen[0] == 4).any()) is (drop == 1.0)


def test_flows_see_the_middle_and_edm_the_clean_end(ring_work: Callable[..., Work]) -> None:
    found = {}
    for kind in ("edm", "flow"):
        trainer, seen = ring_trainer(ring_work, kind, 5), []
        trainer.nets["student"].net.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[1]))  # type: ignore[union-attr]
        for step in range(8):
            list(trainer.method.updates(trainer.nets, Draw(trainer.work, torch.Generator().manual_seed(step), 0, 5)))
        found[kind] = torch.cat(seen)
    assert float((4 * found["edm"]).mean()) == pytest.approx(-1.2, abs=0.1)
    assert float((found["flow"] / 4).logit().mean()) == pytest.approx(0.0, abs=0.1)


def test_its_optimiser_and_average_are_the_cards(ring_work: Callable[..., Work]) -> None:
    role = EdmFmTeacher().roles(plane("edm"), ring_work(8, images=True))["student"]
    assert (role.lr, role.decay, role.betas, role.ema) == (2e-3, "cosine", (0.9, 0.99), 0.999)
    assert EdmFmTeacher.needs == "images"


def test_it_is_sampled_within_the_calls_that_are_asked_for(ring_work: Callable[..., Work]) -> None:
    trainer = ring_trainer(ring_work, "edm", 1)
    z, cond = torch.randn(3, 2), torch.arange(3)
    by_hand = Sampler("heun", 5)(trainer.nets["student_ema"], z, cond)  # type: ignore[arg-type]
    assert torch.equal(trainer.method.generate(trainer.nets, z, cond, 9), by_hand)
    plain = Sampler("ddim", 4)(trainer.nets["student_ema"], z, cond)  # type: ignore[arg-type]
    assert torch.equal(trainer.method.generate(trainer.nets, z, cond, 4), plain)


def test_conditions_may_be_embeddings() -> None:
    """One row per condition instead of a class."""
    from atoll.data.dataset import Dataset, Info
    from atoll.diffusion.distiller import Images

    class Reads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = torch.nn.Linear(3, 2)

        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            out: Tensor = x + self.mix(cond)
            return out

    teacher = Denoiser(Reads(), RF(), "flow", null=torch.zeros(3))
    x, cond = torch.randn(8, 2), torch.randn(8, 3)
    loss = training_loss(teacher, x, cond, torch.ones(8), torch.randn(8, 2))
    assert loss.shape == (8,)
    work = Work((2,), Conditions(cond), Images(Dataset({"x": x}, Info(name="rows", shape=(2,)))), batch=4)
    d = Draw(work, torch.Generator().manual_seed(0), 0, 1)
    assert d.cond().shape == (4, 3)
    x, _ = d.real()
    assert x.shape == (4, 2)
