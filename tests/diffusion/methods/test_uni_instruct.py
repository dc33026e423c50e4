"""Uni-Instruct as a method. Its losses are held against integrals in ``tests/diffusion/test_f_divergences.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Draw, Work
from atoll.diffusion.exact import PlaneNet
from atoll.diffusion.f_divergences import Divergence
from atoll.diffusion.gan_heads import Adversary
from atoll.diffusion.losses import FDistillLoss, SiDLoss, UniLoss
from atoll.diffusion.methods.uni_instruct import UniInstruct
from atoll.diffusion.rollouts import clean
from atoll.diffusion.schedules import RF, KarrasIndex, UniformTime
from atoll.diffusion.score_distillation import ScoreDistillation
from atoll.diffusion.trainer import Trainer

Worlds = Callable[..., Work]


def draw_of(work: Work, step: int = 50, steps: int = 100, seed: int = 0) -> Draw:
    return Draw(work, torch.Generator().manual_seed(seed), step, steps)


def energy(a: Tensor, b: Tensor) -> float:
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def test_reverse_kl_is_twice_sid_at_a_half_and_needs_no_images(ring_teacher: Denoiser, ring_work: Worlds) -> None:
    work = ring_work(batch=32)
    ours: Any = UniInstruct(loss=UniLoss("reverse_kl"), adversary=None)
    assert ours.needs == "nothing"
    trainer = Trainer(ours, ring_teacher, work, 1)
    for step in (0, 50):  # warm or not
        sample = clean(torch.randn(32, 2, requires_grad=True), torch.arange(32) % 4)
        loss = [
            m.generator_losses(trainer.nets, sample, draw_of(work, step))["scores"]
            for m in (ours, ScoreDistillation(loss=SiDLoss(0.5)))
        ]
        assert torch.allclose(loss[0], 2 * loss[1])


def test_the_head_learns_the_density_ratio_and_not_its_inverse(ring_teacher: Denoiser, ring_work: Worlds) -> None:
    """Against a student of known density: a round Gaussian of standard deviation 2."""
    adversary = Adversary(weight=0.0, critic_weight=1.0, law=UniformTime(0.1, 0.5), clip=100.0)
    method = UniInstruct(warmup=0.0, adversary=adversary, law=UniformTime(0.1, 0.5))
    work = ring_work(batch=256, images=True)
    trainer = Trainer(method, ring_teacher, work, 1)
    parameters = [*trainer.nets["fake"].parameters(), *trainer.nets["head"].parameters()]
    optimiser = torch.optim.Adam(parameters, lr=3e-3)
    draw = draw_of(work)
    for _ in range(80):
        sample = clean(2 * draw.noise(), draw.cond())
        optimiser.zero_grad()
        sum(method.critic_losses(trainer.nets, sample, draw).values()).backward()  # type: ignore[union-attr]
        optimiser.step()
    sample = clean(2 * draw.noise(), draw.cond())
    probe = method.probe(trainer.nets, sample, draw)
    assert probe.rho is not None
    net: Any = ring_teacher.net
    exact = net.log_density(probe.x_t, probe.t, sample.cond)
    student = torch.distributions.Normal(0, (4 + probe.t**2).sqrt()[:, None])
    exact = exact - student.log_prob(probe.x_t).sum(1)
    both = torch.stack([probe.rho.log(), exact.clamp(-4.6, 4.6)])
    assert float(both.corrcoef()[0, 1]) > 0.7


def test_the_ratio_counts_after_the_warm_up_and_its_weights_average_to_one_at_every_level(
    ring_teacher: Denoiser, ring_work: Worlds
) -> None:
    method = UniInstruct(loss=UniLoss("pearson"), warmup=0.5, law=KarrasIndex(0.5, 0.5001))
    work = ring_work(batch=64, images=True)
    trainer = Trainer(method, ring_teacher, work, 4)
    with torch.no_grad():
        trainer.nets["head"].outs[0].weight.normal_()  # type: ignore[index,union-attr]
    seen = []
    levels: Any = trainer.nets["levels"]
    for _ in range(4):
        trainer.once()
        seen.append(float(levels.looks.sum()))
    assert seen == [0.0, 0.0, 1.0, 2.0]

    levels.looks.zero_()
    sample = clean(torch.randn(64, 2), torch.arange(64) % 4)
    probe = method.probe(trainer.nets, sample, draw_of(work))
    assert probe.rho is not None
    assert probe.usual is not None
    assert float(probe.rho.std()) > 0.1
    assert torch.isclose((method.loss.weight(probe.rho) / probe.usual).mean(), torch.tensor(1.0), rtol=1e-4)
    assert method.probe(trainer.nets, sample, draw_of(work, step=49)).rho is None


@pytest.mark.parametrize(
    "loss",
    [*(UniLoss(f) for f in get_args(Divergence)), FDistillLoss("forward_kl"), FDistillLoss("js")],
    ids=lambda loss: f"{type(loss).__name__}-{loss.f}",
)
def test_only_the_student_moves_and_scores_keep_no_gradient(
    loss: Any, ring_teacher: Denoiser, ring_work: Worlds
) -> None:
    work = ring_work(batch=16, images=True)
    method = UniInstruct(loss=loss, warmup=0.0)
    trainer = Trainer(method, ring_teacher, work, 2)
    turns = method.updates(trainer.nets, draw_of(work))
    roles, losses = next(turns)
    assert roles == ("fake", "head")
    assert set(losses) == {"denoising", "discriminator"}
    role, losses = next(turns)
    assert role == "student"
    mine = [p for p in trainer.nets["student"].parameters() if p.requires_grad]
    found = torch.autograd.grad(sum(losses.values()), mine, allow_unused=True)  # type: ignore[arg-type]
    assert all(torch.isfinite(g).all() for g in found if g is not None)
    assert any(g is not None and g.abs().sum() > 0 for g in found)


@pytest.mark.parametrize("f", ["forward_kl", "js"])
def test_it_learns_the_ring(f: Divergence, ring_teacher: Denoiser, ring_work: Worlds) -> None:
    method = UniInstruct(loss=UniLoss(f), lr=2e-3, critic_lr=4e-3, law=KarrasIndex(0.2, most=1.0))  # it is wide
    trainer = Trainer(method, ring_teacher, ring_work(batch=64, images=True), 100)
    net: Any = ring_teacher.net
    real, _ = net.draw(1000, torch.Generator().manual_seed(5))
    z, cond = torch.randn(1000, 2, generator=torch.Generator().manual_seed(6)), torch.arange(1000) % 4

    def made() -> Tensor:
        return method.generate(trainer.nets, z, cond, 1)

    before = energy(made(), real)
    trainer.go()
    x = made()
    assert energy(x, real) < 0.3 * before
    agreement = (net.labels[torch.cdist(x, net.means).argmin(1)] == cond).float().mean()
    assert float(agreement) > 0.7


def test_another_schedule_does(ring_work: Worlds) -> None:
    torch.manual_seed(0)
    teacher = Denoiser(PlaneNet(2, 4), RF(), "flow", classes=4)
    work = ring_work(batch=8, images=True)
    work = Work(work.shape, work.conditions, work.images, batch=8)
    trainer = Trainer(UniInstruct(warmup=0.0), copy.deepcopy(teacher), work, 3)
    trainer.go()
    assert all(torch.isfinite(p).all() for p in trainer.nets["student"].parameters())


def test_it_says_what_is_wrong(ring_teacher: Denoiser, ring_work: Worlds) -> None:
    with pytest.raises(AtollError, match="A hinge discriminator's logit says nothing about the density ratio"):
        UniInstruct(adversary=Adversary(kind="hinge"))
    with pytest.raises(AtollError, match="needs the density ratio"):
        Trainer(UniInstruct(adversary=None), ring_teacher, ring_work(images=True), 1)
    with pytest.raises(AtollError, match="trains on real images"):
        Trainer(UniInstruct(), ring_teacher, ring_work(), 1)
