"""SIM: scores keep their graph to the sample, and the ring from an exact teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from atoll.core.streams import stream
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Draw, Work
from atoll.diffusion.losses import GeneratorLoss, SiDLoss, SIMLoss
from atoll.diffusion.methods.sim import SIM
from atoll.diffusion.trainer import Trainer


def draw(work: Work, step: int = 0) -> Draw:
    return Draw(work, torch.Generator().manual_seed(step), step, 100)


def gradients(method: SIM, trainer: Trainer, role: str = "student") -> list[Tensor | None]:
    d = draw(trainer.work)
    sample = method.rollout(trainer.nets["student"], d)  # type: ignore[arg-type]
    loss = method.generator_losses(trainer.nets, sample, d)["scores"]
    return list(torch.autograd.grad(loss, list(trainer.nets[role].parameters()), allow_unused=True))


def test_the_generators_loss_keeps_the_graph_through_both_scores(
    ring_teacher: Denoiser, ring_work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the graph through ``x_t`` it would be a biased DMD."""
    trainer = Trainer(SIM(), ring_teacher, ring_work(16), 10)
    nets, log = trainer.nets, []
    plain = Denoiser.forward

    def watched(self: Denoiser, x_t: Tensor, *args: Any, **more: Any) -> Tensor:
        out = plain(self, x_t, *args, **more)
        log.append((next(role for role, net in nets.items() if net is self), x_t.requires_grad, out.requires_grad))
        return out

    monkeypatch.setattr(Denoiser, "forward", watched)
    *_, (roles, _) = trainer.method.updates(nets, draw(trainer.work))
    assert roles == "student"
    assert log[:2] == [("student", False, False), ("fake", False, True)]
    assert log[2:] == [("student", False, True), ("teacher", True, True), ("fake", True, True)]


def test_its_step_changes_the_student_alone(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    trainer = Trainer(SIM(), ring_teacher, ring_work(16), 10)
    turns = trainer.method.updates(trainer.nets, draw(trainer.work))
    next(turns)
    before = [p.clone() for p in trainer.nets["fake"].parameters()]
    roles, losses = next(turns)
    assert roles == "student"
    trainer._descend(("student",), losses)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.nets["fake"].parameters(), strict=True))
    assert all(p.grad is None for p in trainer.nets["fake"].parameters())


def test_squares_are_sid_of_one_within_the_method(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    found = []
    for loss in (SIMLoss("l2"), SiDLoss(1.0)):
        method = SIM(loss=loss)
        found.append(gradients(method, Trainer(method, ring_teacher, ring_work(32), 10)))
    assert any(g is not None and float(g.abs().max()) > 1e-4 for g in found[0])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", [SIMLoss(), SIMLoss("l2"), SiDLoss(1.2)], ids=repr)
def test_a_fake_score_like_the_teachers_moves_nothing(
    loss: GeneratorLoss, digit_teacher: Denoiser, digit_work: Work
) -> None:
    method = SIM(loss=loss)
    found = gradients(method, Trainer(method, digit_teacher, digit_work, 10))
    assert all(float(g.abs().max()) < 1e-6 for g in found if g is not None)


def energy_distance(a: Tensor, b: Tensor) -> float:
    n, m = len(a), len(b)
    own = torch.cdist(a, a).sum() / (n * (n - 1)) + torch.cdist(b, b).sum() / (m * (m - 1))
    return float(2 * torch.cdist(a, b).mean() - own)


@pytest.mark.parametrize("loss", [SIMLoss(), SiDLoss(1.0)], ids=["sim", "sid"])
def test_it_covers_the_ring(loss: GeneratorLoss, ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    mixture: Any = ring_teacher.net
    truth, _ = mixture.draw(2000, stream(9, "truth"))
    z, cond = torch.randn(1000, 2, generator=stream(8, "z")), torch.arange(1000) % 4
    method = SIM(loss=loss, lr=1.5e-3, critic_lr=5e-3)
    trainer = Trainer(method, ring_teacher, ring_work(128), 250)
    before = energy_distance(method.generate(trainer.nets, z, cond, 1), truth)
    for _ in range(250):
        trainer.once()
    x = method.generate(trainer.nets, z, cond, 1)
    nearest = torch.cdist(x, mixture.means).argmin(1)
    assert energy_distance(x, truth) < 0.06 < 0.3 < before
    assert (torch.bincount(nearest, minlength=8) >= 25).all()  # a fifth of their share
    assert float((mixture.labels[nearest] == cond).float().mean()) > 0.9
