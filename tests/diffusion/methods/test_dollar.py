"""DOLLAR: without its additions it is DMD; with them, each acts as it should and no further."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atoll.core.tree import clone, equal, named_tensors
from atoll.data.sources.moving_images import MovingImages
from atoll.diffusion.consistency import Gaps
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Draw, Images, Work, best
from atoll.diffusion.exact import exact_mixture
from atoll.diffusion.latent_reward import LatentReward
from atoll.diffusion.methods.cd_ct import CdCt
from atoll.diffusion.methods.dmd import DMD
from atoll.diffusion.methods.dollar import Dollar
from atoll.diffusion.pairs import TeacherPairStore
from atoll.diffusion.rewards import PngSize
from atoll.diffusion.rollouts import RandomExit
from atoll.diffusion.rows import Rows
from atoll.diffusion.schedules import EDM, RF
from atoll.diffusion.solvers import Sampler
from atoll.diffusion.teacher import make_denoiser
from atoll.diffusion.trainer import Trainer
from atoll.models.unet import UNet

TWO = RandomExit(steps=2)


def trained(method: Any, teacher: Denoiser, work: Work, steps: int) -> Trainer:
    trainer = Trainer(method, copy.deepcopy(teacher), work, steps)
    trainer.go()
    return trainer


def same_student(a: Trainer, b: Trainer) -> bool:
    return all(
        equal(named_tensors(a.nets[role]), named_tensors(b.nets[role])) for role in ("student", "student_ema", "fake")
    )


def right(x: Tensor, cond: Tensor) -> Tensor:
    """How many quarters to the right: flat almost everywhere."""
    return (4 * x[:, 0]).round()


# ------------------------------------------------------------------------------------------- limits


def test_without_its_additions_it_is_dmd_bit_for_bit(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    work = ring_work(batch=32)
    plain = trained(DMD(rollout=TWO), ring_teacher, work, 6)
    bare = Dollar(rollout=TWO, consistency=0.0)
    assert bare.needs == "nothing"
    assert same_student(plain, trained(bare, ring_teacher, work, 6))
    off = replace(bare, taste=LatentReward(right, share=0.0))  # type: ignore[arg-type]
    assert same_student(plain, trained(off, ring_teacher, work, 6))
    more = trained(replace(bare, consistency=0.1), ring_teacher, ring_work(batch=32, images=True), 6)
    assert not same_student(plain, more)


def test_a_reward_turned_off_or_not_believed_leaves_the_first_stage_as_it_is(
    ring_teacher: Denoiser, ring_work: Callable[..., Work]
) -> None:
    work = ring_work(batch=32, images=True)
    first = trained(Dollar(rollout=TWO), ring_teacher, work, 8)
    off = Dollar(rollout=TWO, taste=LatentReward(right, share=0.0))  # type: ignore[arg-type]
    assert same_student(first, trained(off, ring_teacher, work, 8))
    # Nobody can learn this one, so it never counts, however long the run.
    noise = torch.Generator().manual_seed(0)
    reward: Any = lambda x, cond: torch.randn(len(x), generator=noise)  # noqa: E731
    doubted = trained(Dollar(rollout=TWO, taste=LatentReward(reward, ramp=0.0)), ring_teacher, work, 8)
    assert float(doubted.nets["reward"].trust) < 0.5  # type: ignore[arg-type]
    assert same_student(first, doubted)


# ------------------------------------------------------------------------------------------- consistency


class Exact(nn.Module):
    """Where the trajectory of a Gaussian ends: x s / sqrt(s^2 + t^2)."""

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return x * 0.5 / (0.25 + t[:, None] ** 2).sqrt()


@pytest.mark.parametrize("schedule", [EDM(), RF()])
def test_consistency_vanishes_for_the_exact_end_of_the_teachers_trajectory(schedule: Any) -> None:
    teacher = exact_mixture(torch.zeros(1, 1), 0.5, schedule=schedule)
    work = Work((1,), Conditions.classes(1), images=None, batch=512)
    x = 0.5 * torch.randn(512, 1, generator=torch.Generator().manual_seed(0))
    draw = Draw(work, torch.Generator().manual_seed(1), 0, 1, {"x": x, "cond": torch.zeros(512, dtype=torch.int64)})
    method = Dollar(rows=Rows(TeacherPairStore(count=512)), gaps=Gaps(first=400, last=400))
    # The student is in EDM's coordinates whatever the teacher's are.
    exact = Denoiser(Exact(), EDM(), "x0", classes=1)
    right = float(method.consistency_loss({"teacher": teacher, "student": exact}, draw))
    draw = replace(draw, generator=torch.Generator().manual_seed(1))
    wrong = float(method.consistency_loss({"teacher": teacher, "student": exact_mixture(torch.zeros(1, 1), 0.5)}, draw))
    assert right < 0.1 * wrong


def test_consistency_is_consistency_distillation_with_all_gaps_alike(digit_teacher: Denoiser, digit_work: Work) -> None:
    """The same draws, against cd_ct's own loss with its weight for the gap taken off."""
    gaps = Gaps(first=1, last=1, low=0.5, high=2.0)  # one gap, so that the weight is one number
    nets = {"teacher": digit_teacher, "student": copy.deepcopy(digit_teacher)}
    with torch.no_grad():
        for p in nets["student"].parameters():
            p.mul_(1.1)
    other = CdCt(solver="ddim", gaps=gaps)
    _, losses = next(other.updates(nets, Draw(digit_work, torch.Generator().manual_seed(2), 0, 1)))
    ours = Dollar(gaps=gaps, consistency_law=other.law)
    found = ours.consistency_loss(nets, Draw(digit_work, torch.Generator().manual_seed(2), 0, 1))
    assert found.item() == pytest.approx(losses["consistency"].item() * 1.5 / 8, rel=1e-5)
    found.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in digit_teacher.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in nets["student"].parameters())


def test_it_needs_images_only_where_it_noises_them() -> None:
    assert Dollar().needs == "images"
    assert Dollar(rows=Rows(TeacherPairStore())).needs == "teacher samples"
    assert Dollar(consistency=0.0).needs == "nothing"


# ------------------------------------------------------------------------------------------- the reward


def test_the_reward_is_called_without_a_graph_and_reaches_the_student_through_its_model_alone(
    ring_teacher: Denoiser, ring_work: Callable[..., Work]
) -> None:
    asked = 0

    def reward(x: Tensor, cond: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        assert not torch.is_grad_enabled()
        assert not x.requires_grad
        assert x.grad_fn is None
        return right(x, cond)

    method = Dollar(rollout=TWO, consistency=0.0, taste=LatentReward(reward, every=2, steps=3))  # type: ignore[arg-type]
    trainer = Trainer(method, ring_teacher, ring_work(batch=32), 6)
    seen = []
    for _ in range(6):
        before = clone(named_tensors(trainer.nets["reward"]))
        said = trainer.once()
        seen.append(not equal(before, named_tensors(trainer.nets["reward"])))
        assert ("reward/regression" in said) == seen[-1]
    assert asked == 3
    assert seen == [True, False, True, False, True, False]
    assert trainer.updates_done["reward"] == 9

    # The student's gradient, against the chain rule written out.
    net: Any = trainer.nets["reward"]
    net.trust.fill_(0.9)
    net.ramp.fill_(0.5)
    draw = Draw(trainer.work, torch.Generator().manual_seed(0), 0, 1)
    sample = method.rollout(trainer.nets["student"], draw)  # type: ignore[arg-type]
    losses = method.generator_losses(trainer.nets, sample, draw)
    params = list(trainer.nets["student"].parameters())
    found = torch.autograd.grad(losses["reward"], params, retain_graph=True)
    x = sample.x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(net(x, sample.cond).sum(), x)
    (main,) = torch.autograd.grad(losses["scores"], sample.x, retain_graph=True)
    pull = -0.1 * 0.5 * main.norm() * slope / slope.norm()
    expected = torch.autograd.grad(sample.x, params, pull)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def ring_samples(trainer: Trainer, n: int = 1000) -> tuple[Tensor, Tensor]:
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(9))
    cond = torch.arange(n) % 4
    return trainer.method.generate(trainer.nets, z, cond, 2, torch.Generator().manual_seed(8)), cond


def energy_distance(a: Tensor, b: Tensor) -> float:
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def test_on_the_ring_it_covers_all_modes_and_a_reward_moves_it_a_little(
    ring_teacher: Denoiser, ring_work: Callable[..., Work]
) -> None:
    work = ring_work(batch=64, images=True)
    first = Dollar(rollout=TWO, lr=2e-3, critic_lr=4e-3)
    real = ring_teacher.net.draw(1000, torch.Generator().manual_seed(5))[0]  # type: ignore[operator]
    start, plain = trained(first, ring_teacher, work, 0), trained(first, ring_teacher, work, 160)
    x, cond = ring_samples(plain)
    assert energy_distance(ring_samples(start)[0], real) > 0.3
    assert energy_distance(x, real) < 0.08
    nearest = torch.cdist(x, ring_teacher.net.means).argmin(1)  # type: ignore[arg-type]
    assert int((nearest.bincount(minlength=8) > 25).sum()) == 8
    assert float((ring_teacher.net.labels[nearest] == cond).float().mean()) > 0.8  # type: ignore[index]

    liked = trained(replace(first, taste=LatentReward(right, lr=3e-3)), ring_teacher, work, 160)  # type: ignore[arg-type]
    net: Any = liked.nets["reward"]
    assert float(net.trust) > 0.8
    assert float(net.ramp) == 1.0
    y, _ = ring_samples(liked)
    assert float(right(y, cond).mean()) > float(right(x, cond).mean()) + 0.2
    assert energy_distance(y, real) < 0.1  # the scores keep it near the data


# ------------------------------------------------------------------------------------------- clips


def test_it_works_on_clips() -> None:
    data = MovingImages().load().train
    images = Images(data.select(range(200)))
    teacher = make_denoiser(UNet(width=8), data.info, seed=0)
    work = Work(data.info.shape, Conditions.classes(10), images, batch=8)
    method = Dollar(rollout=TWO, taste=LatentReward(PngSize(), keep=32))
    trainer = trained(method, teacher, work, 3)
    z = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    made = method.generate(trainer.nets, z, torch.arange(4), 2, torch.Generator().manual_seed(0))
    assert made.shape == (4, 8, 16, 16)
    assert torch.isfinite(made).all()
    assert int(trainer.nets["reward"].seen) == 24  # type: ignore[arg-type]
    assert Sampler(steps=2)(best(trainer.nets), z, torch.arange(4)).shape == z.shape
