"""DMD: the gradient's mechanics, and the ring from an exact teacher."""

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
from atoll.diffusion.exact import PlaneNet, exact_mixture
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.losses import Probe
from atoll.diffusion.methods.dmd import DMD
from atoll.diffusion.rollouts import OneStep
from atoll.diffusion.schedules import EDM, RF, KarrasIndex, NoiseSchedule, Trig
from atoll.diffusion.trainer import Trainer

STEPS = 250


def draw(work: Work, step: int = 0) -> Draw:
    return Draw(work, torch.Generator().manual_seed(step), step, 100)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|; 0 for equal laws."""
    n, m = len(a), len(b)
    own = torch.cdist(a, a).sum() / (n * (n - 1)) + torch.cdist(b, b).sum() / (m * (m - 1))
    return float(2 * torch.cdist(a, b).mean() - own)


def quality(teacher: Denoiser, x: Tensor, cond: Tensor) -> tuple[float, int, float]:
    """Energy distance to true samples, modes with a fifth of their share, share in the right class."""
    mixture: Any = teacher.net
    truth, _ = mixture.draw(2000, stream(9, "truth"))
    nearest = torch.cdist(x, mixture.means).argmin(1)
    covered = torch.bincount(nearest, minlength=len(mixture.means)) >= 0.2 * len(x) / len(mixture.means)
    return energy_distance(x, truth), int(covered.sum()), float((mixture.labels[nearest] == cond).float().mean())


def sampled(trainer: Trainer, n: int = 1000) -> tuple[Tensor, Tensor]:
    cond = torch.arange(n) % 4
    z = torch.randn(n, 2, generator=stream(8, "z"))
    return trainer.method.generate(trainer.nets, z, cond, 1), cond


def test_the_generator_step_has_one_call_with_a_graph(
    ring_teacher: Denoiser, ring_work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what its loss descends reaches the student's weights alone."""
    trainer = Trainer(DMD(critic_steps=3), ring_teacher, ring_work(16), 10)
    nets, log = trainer.nets, []
    plain = Denoiser.forward

    def watched(self: Denoiser, x_t: Tensor, *args: Any, **more: Any) -> Tensor:
        out = plain(self, x_t, *args, **more)
        log.append((next(role for role, net in nets.items() if net is self), out.requires_grad))
        return out

    monkeypatch.setattr(Denoiser, "forward", watched)
    turns = []
    for roles, losses in trainer.method.updates(nets, draw(trainer.work)):
        turns.append((roles, list(losses), log.copy()))
        log.clear()
    assert turns[:3] == [("fake", ["denoising"], [("student", False), ("fake", True)])] * 3
    assert turns[3] == ("student", ["scores"], [("student", True), ("teacher", False), ("fake", False)])


def test_no_gradient_reaches_teacher_or_fake(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    trainer = Trainer(DMD(), ring_teacher, ring_work(16), 10)
    *_, (_, losses) = trainer.method.updates(trainer.nets, draw(trainer.work))
    total = losses["scores"]
    for role in ("fake", "student"):
        found = torch.autograd.grad(total, list(trainer.nets[role].parameters()), allow_unused=True, retain_graph=True)
        reached = [float(g.abs().sum()) > 0 for g in found if g is not None]
        assert any(reached) is (role == "student")


def test_the_critics_step_reaches_the_fake_alone(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    trainer = Trainer(DMD(), ring_teacher, ring_work(16), 10)
    roles, losses = next(iter(trainer.method.updates(trainer.nets, draw(trainer.work))))
    assert roles == "fake"
    found = torch.autograd.grad(losses["denoising"], list(trainer.nets["student"].parameters()), allow_unused=True)
    assert all(g is None for g in found)


def test_a_fake_score_like_the_teachers_moves_nothing(digit_teacher: Denoiser, digit_work: Work) -> None:
    """As both are copies at the start, the first generator step of a method without critic steps is empty."""
    trainer = Trainer(DMD(), digit_teacher, digit_work, 10)
    method: DMD = trainer.method  # type: ignore[assignment]
    d = draw(trainer.work)
    sample = method.rollout(trainer.nets["student"], d)  # type: ignore[arg-type]
    loss = method.generator_losses(trainer.nets, sample, d)["scores"]
    found = torch.autograd.grad(loss, list(trainer.nets["student"].parameters()), allow_unused=True)
    assert all(float(g.abs().max()) < 1e-6 for g in found if g is not None)


@pytest.mark.parametrize("schedule", [EDM(), RF(), Trig()], ids=repr)
def test_samples_are_noised_to_the_laws_levels(schedule: NoiseSchedule) -> None:
    """Fresh noise of the schedule's own scale, levels over Karras's grid without its noisiest fifth."""
    method, work = DMD(law=KarrasIndex(0.02, 40.0)), Work((1,), Conditions.classes(1), batch=4000)
    teacher = exact_mixture(torch.tensor([[0.7]]), 0.3, schedule=schedule)
    d = draw(work)
    sample = method.rollout(teacher, d)
    noisy = method.noisy(teacher, sample, d, method.law)
    assert torch.allclose(noisy.ratio, schedule.ratio(noisy.t), rtol=1e-4)
    assert 0.019 < float(noisy.ratio.min()) < 0.025
    assert 13 < float(noisy.ratio.max()) < 15
    a, s = schedule.alpha(noisy.t)[:, None], schedule.sigma(noisy.t)[:, None]
    eps = (noisy.x_t - a * sample.x) / s
    assert float(eps.std()) == pytest.approx(1.0, abs=0.05)
    assert torch.allclose(eps, noisy.eps, atol=2e-2)
    assert len(noisy.ratio.unique()) > 3900  # every row its own


def test_guidance_is_the_teachers(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    """Scores: guided teacher, plain fake; sampling: one call, none."""
    work = ring_work(64)
    seen: list[Probe] = []

    class Looks(type(DMD().loss)):  # type: ignore[misc]
        def __call__(self, sample: Any, probe: Probe) -> Tensor:
            seen.append(probe)
            return super().__call__(sample, probe)  # type: ignore[no-any-return]

    method = DMD(loss=Looks(), guidance=Guidance(2.0))
    trainer = Trainer(method, ring_teacher, work, 10)
    torch.manual_seed(0)
    d = draw(work)
    sample = method.rollout(trainer.nets["student"], d)  # type: ignore[arg-type]
    method.generator_losses(trainer.nets, sample, d)
    (probe,) = seen
    given, null = (ring_teacher(probe.x_t, probe.t, c) for c in (sample.cond, ring_teacher.null(sample.cond)))
    assert torch.allclose(probe.real, 2 * given - null, atol=1e-5)
    assert torch.allclose(probe.fake, trainer.nets["fake"](probe.x_t, probe.t, sample.cond), atol=1e-6)
    assert not torch.allclose(probe.real, given, atol=1e-3)


def test_it_asks_the_student_at_one_level(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    work = ring_work(8)
    student = work.copy_of(ring_teacher)
    d = draw(work, 3)
    sample = OneStep(2.5)(student, draw(work, 3))
    z, cond = d.noise(), d.cond()
    assert torch.allclose(sample.x, student(2.5 * z, torch.tensor(2.5), cond), atol=1e-6)
    assert torch.equal(sample.cond, cond)
    assert sample.anchor is sample.x
    assert torch.equal(sample.s, torch.zeros(8))
    assert torch.allclose(OneStep(2.5).generate(student, z, cond, 1), sample.x, atol=1e-6)


def test_it_covers_the_ring(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    """Judged at little noise alone it does not: samples between modes see no way to them (as the Phased DMD paper
    reports)."""

    def train(law: KarrasIndex) -> list[tuple[float, int, float]]:
        trainer = Trainer(DMD(lr=1.5e-3, critic_lr=5e-3, law=law), ring_teacher, ring_work(128), STEPS)
        found = [quality(ring_teacher, *sampled(trainer))]
        for _ in range(STEPS):
            trainer.once()
        return [*found, quality(ring_teacher, *sampled(trainer))]

    start, (distance, modes, agreement) = train(KarrasIndex())
    assert distance < 0.06 < 0.3 < start[0]
    assert modes == 8
    assert agreement > 0.9
    _, (blind, _, _) = train(KarrasIndex(0.02, 0.15, most=1.0))
    assert blind > 3 * distance


def test_it_runs_on_rectified_flows_too(ring_work: Callable[..., Work]) -> None:
    """A teacher and students of another schedule, which predict velocities."""
    means = torch.tensor([[1.5, 0.0], [-1.5, 0.0]])
    teacher = exact_mixture(means, 0.3, torch.tensor([0, 1]), RF())

    def build() -> Denoiser:
        return Denoiser(PlaneNet(2, 2, width=64), RF(), "flow", classes=2)

    work = replace(ring_work(128), build=build, conditions=Conditions.classes(2))
    trainer = Trainer(DMD(lr=2e-3, critic_lr=6e-3), teacher, work, 120)
    cond, z = torch.arange(400) % 2, torch.randn(400, 2, generator=stream(7, "z"))

    def miss() -> float:
        x = trainer.method.generate(trainer.nets, z, cond, 1)
        return float((x - means[cond]).norm(dim=1).mean())

    before = miss()
    for _ in range(120):
        trainer.once()
    assert miss() < 1.0 < 0.6 * before
