"""Few-step SiD: one generator, all of its steps matched at once, guidance set role by role."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.core.errors import AtollError
from atoll.core.tree import clone, equal, named_tensors
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Draw, Work
from atoll.diffusion.exact import ring
from atoll.diffusion.gan_heads import Adversary
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.losses import CriticLoss, Denoising, GeneratorLoss, Noisy, Probe, SiDLoss, SIMLoss
from atoll.diffusion.methods.sid_fewstep import SidFewstep
from atoll.diffusion.rollouts import OneStep, RandomExit, Sample, clean
from atoll.diffusion.schedules import UniformTime
from atoll.diffusion.score_distillation import ScoreDistillation
from atoll.diffusion.trainer import Trainer

SMALL = {"lr": 1e-2, "critic_lr": 5e-2, "ema": 0.95, "critic_steps": 2}


# ------------------------------------------------------------------------------------------- the loss


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 4), size=st.integers(1, 6), seed=st.integers(0, 10**6), alpha=st.floats(0.2, 1.5))
def test_sid_is_sim_with_the_squared_distance(rows: int, size: int, seed: int, alpha: float) -> None:
    """At alpha = 1; and by hand at any: w <d, (real - x) - alpha d> with d = real - fake and w a constant."""
    g = torch.Generator().manual_seed(seed)
    x, a, b = (torch.randn(rows, size, generator=g).requires_grad_() for _ in range(3))
    zero = torch.zeros(rows)

    def gradients(loss: GeneratorLoss) -> tuple[Tensor, ...]:
        value = loss(clean(x, zero.long()), Probe(x, zero, zero, a * x, b * x))
        return value, *torch.autograd.grad(value, [x, a, b])

    for ours, theirs in zip(gradients(SiDLoss(1.0)), gradients(SIMLoss("l2")), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    at, real, fake = x.tolist(), (a * x).tolist(), (b * x).tolist()
    total = 0.0
    for i in range(rows):
        w = 1 / max(1e-5, sum(abs(at[i][j] - real[i][j]) for j in range(size)) / size)
        for j in range(size):
            d = real[i][j] - fake[i][j]
            total += w * d * ((real[i][j] - at[i][j]) - alpha * d) / size / rows
    assert float(SiDLoss(alpha)(clean(x, zero.long()), Probe(x, zero, zero, a * x, b * x)).detach()) == pytest.approx(
        total, rel=1e-3, abs=1e-4
    )


def test_the_weight_of_a_sample_carries_no_gradient() -> None:
    x, real = torch.tensor([[2.0]], requires_grad=True), torch.tensor([[1.0]])
    fake, zero = torch.tensor([[0.5]]), torch.zeros(1)
    (slope,) = torch.autograd.grad(SiDLoss()(clean(x, zero.long()), Probe(x, zero, zero, real, fake)), x)
    assert slope.item() == pytest.approx(-0.5)  # <d, real - x - d> / |x - real| with d = 1/2; through w it would be 0


# ------------------------------------------------------------------------------------------- who learns


def test_networks_that_judge_get_no_gradient_and_stay(gauss_teacher: Denoiser, gauss_work: Work) -> None:
    trainer = Trainer(SidFewstep(), gauss_teacher, gauss_work, 2)
    draw = Draw(gauss_work, torch.Generator().manual_seed(0), 0, 2)
    turns = trainer.method.updates(trainer.nets, draw)
    roles, losses = next(turns)
    assert roles == "fake"
    before = clone(named_tensors(trainer.nets["student"]))
    trainer._descend(("fake",), losses)
    assert equal(before, named_tensors(trainer.nets["student"]))
    roles, losses = next(turns)
    assert roles == "student"
    assert losses["scores"].requires_grad
    before = clone(named_tensors(trainer.nets["fake"]))
    trainer._descend(("student",), losses)
    assert equal(before, named_tensors(trainer.nets["fake"]))
    for name in ("teacher", "fake"):
        assert all(p.grad is None for p in trainer.nets[name].parameters()), name
    assert next(turns, None) is None


def test_the_gradient_flows_through_both_scores(gauss_teacher: Denoiser, gauss_work: Work) -> None:
    """Without the graph through x_t this would be a biased DMD."""
    trainer = Trainer(SidFewstep(), gauss_teacher, gauss_work, 2)
    with torch.no_grad():
        trainer.nets["fake"].net.mean.add_(0.3)  # type: ignore[union-attr, operator]
    draw = Draw(gauss_work, torch.Generator().manual_seed(0), 0, 2)
    sample = trainer.method.rollout(trainer.nets["student"], draw)  # type: ignore[attr-defined]
    probe = trainer.method.probe(trainer.nets, sample, draw)  # type: ignore[attr-defined]
    for said in (probe.real, probe.fake):
        (slope,) = torch.autograd.grad(said.sum(), sample.x, retain_graph=True)
        assert (slope.abs() > 1e-6).all()


def test_with_one_step_it_is_sid(gauss_teacher: Denoiser, gauss_work: Work) -> None:
    ends = []
    for method in (SidFewstep(rollout=RandomExit(1)), ScoreDistillation(loss=SiDLoss(), rollout=OneStep())):
        trainer = Trainer(method, gauss_teacher, gauss_work, 3)
        trainer.go()
        ends.append(clone(named_tensors(trainer.nets["student_ema"])))
    assert equal(*ends)


# ------------------------------------------------------------------------------------------- guidance by role


@dataclass(frozen=True)
class Watched(GeneratorLoss):
    """Keeps what the scores said."""

    through_scores: ClassVar[bool] = True
    seen: ClassVar[list[tuple[Sample, Probe]]] = []

    def __call__(self, sample: Sample, probe: Probe) -> Tensor:
        self.seen.append((sample, probe))
        return (probe.real - probe.fake).square().mean()


@dataclass(frozen=True)
class WatchedCritic(CriticLoss):
    seen: ClassVar[list[tuple[Tensor, Sample, Noisy]]] = []

    def __call__(self, guess: Tensor, sample: Sample, probe: Noisy) -> Tensor:
        self.seen.append((guess.detach(), sample, probe))
        return (guess - sample.x).square().mean()


def at_scale(denoiser: Any, x: Tensor, t: Tensor, cond: Tensor, w: float) -> Tensor:
    with torch.no_grad():
        null = denoiser(x, t, denoiser.null(cond))
        out: Tensor = null + w * (denoiser(x, t, cond) - null)
        return out


@pytest.mark.parametrize(
    ("mode", "scale", "learns", "judges", "teacher"),
    [
        ("none", None, 1, 1, 1), ("cfg", None, 1, 1, 2), ("cfg", 3.0, 1, 1, 3), ("lsg", 1.5, 1.5, 1.5, 1.5),
        ("zero", None, 0, 0, 1), ("anti", None, 1, -1, 1), ("anti", 0.5, 1, -0.5, 1),
    ],
)  # fmt: skip
def test_modes_set_three_scales(
    mode: Any, scale: float | None, learns: float, judges: float, teacher: float, ring_teacher: Denoiser,
    ring_work: Callable[..., Work],
) -> None:  # fmt: skip
    Watched.seen.clear(), WatchedCritic.seen.clear()
    work = ring_work(batch=400)
    method = SidFewstep(loss=Watched(), critic=WatchedCritic(), mode=mode, scale=scale)
    trainer = Trainer(method, ring_teacher, work, 1)
    nets = trainer.nets
    turns = method.updates(nets, Draw(work, torch.Generator().manual_seed(0), 0, 1))
    assert [who for who, _ in turns] == ["fake", "student"]  # no step is taken in between
    guess, sample, noisy = WatchedCritic.seen[0]
    expected = at_scale(nets["fake"], noisy.x_t, noisy.t, sample.cond, learns)
    kept = (guess - expected).abs().flatten(1).amax(1) < 1e-4
    if mode == "anti":  # a tenth learns without its condition
        hidden = at_scale(nets["fake"], noisy.x_t, noisy.t, sample.cond, 0)
        assert ((guess - hidden).abs().flatten(1).amax(1) < 1e-4)[~kept].all()
        assert 0.04 < (~kept).float().mean() < 0.18
    else:
        assert kept.all()
    sample, probe = Watched.seen[0]
    fake = at_scale(nets["fake"], probe.x_t, probe.t, sample.cond, judges)
    real = at_scale(nets["teacher"], probe.x_t, probe.t, sample.cond, teacher)
    assert torch.allclose(probe.fake, fake, atol=1e-4)
    assert torch.allclose(probe.real, real, atol=1e-3)


def test_zero_cfg_never_shows_the_fake_score_a_label(
    ring_teacher: Denoiser, ring_work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So whatever the label, what it says is the same."""
    work = ring_work(batch=64)
    trainer = Trainer(SidFewstep(mode="zero"), ring_teacher, work, 2)
    seen: dict[str, set[int]] = {"teacher": set(), "student": set(), "fake": set()}
    names = {id(trainer.nets[n]): n for n in seen}
    plain = Denoiser.forward

    def watched(self: Denoiser, x_t: Tensor, t: Tensor, cond: Tensor, **more: Any) -> Tensor:
        seen[names[id(self)]] |= set(cond.tolist())
        return plain(self, x_t, t, cond, **more)

    monkeypatch.setattr(Denoiser, "forward", watched)
    trainer.go()
    assert seen == {"teacher": {0, 1, 2, 3}, "student": {0, 1, 2, 3}, "fake": {4}}


def test_a_mode_and_scales_by_hand_exclude_each_other() -> None:
    by_hand = SidFewstep(guidance=Guidance(3.0))
    assert by_hand.spelt_out() is by_hand
    with pytest.raises(AtollError, match="`mode: anti` sets the guidance of all roles"):
        SidFewstep(mode="anti", guidance=Guidance(3.0))
    with pytest.raises(AtollError, match="`mode: zero` takes no `scale`"):
        SidFewstep(mode="zero", scale=2.0)
    again = replace(SidFewstep(mode="anti"), mode="zero")
    assert again.spelt_out().fake_condition == Guidance(0.0)


# ------------------------------------------------------------------------------------------- with real rows


def test_a_discriminator_without_weights_of_its_own(digit_teacher: Denoiser, digit_work: Work) -> None:
    method = SidFewstep(adversary=Adversary(learned=False, weight=1e-4))
    assert method.needs == "images"
    trainer = Trainer(method, digit_teacher, digit_work, 1)
    assert trainer.roles.keys() == {"teacher", "student", "fake"}
    said = trainer.once()
    assert said.keys() == {"fake/denoising", "fake/discriminator", "student/scores", "student/adversary"}
    # The fake score learns to tell: its features, not a head's, move apart.
    draw = Draw(digit_work, torch.Generator().manual_seed(0), 0, 1)
    sample = method.rollout(trainer.nets["student"], draw)  # type: ignore[arg-type]
    assert method.adversary is not None
    loss = method.adversary.critic_loss(trainer.nets, sample, draw)
    slopes = torch.autograd.grad(loss, list(trainer.nets["fake"].parameters()), allow_unused=True)
    assert any(s is not None and s.abs().sum() > 0 for s in slopes)


# ------------------------------------------------------------------------------------------- does it learn


def test_it_learns_a_gaussian_in_four_steps(gauss_teacher: Denoiser, gauss_work: Work) -> None:
    """A copy of the teacher is too narrow: every guess is a mean."""
    method = SidFewstep(critic=Denoising(0.3), **SMALL)  # type: ignore[arg-type]
    trainer = Trainer(method, gauss_teacher, gauss_work, 120)
    z, cond = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)), torch.zeros(4000).long()

    def made() -> Tensor:
        return method.generate(trainer.nets, z, cond, 4, torch.Generator().manual_seed(1))

    assert made().std() < 0.18
    trainer.go()
    assert made().mean() == pytest.approx(0.5, abs=0.05)
    assert made().std() == pytest.approx(0.25, abs=0.055)


def test_it_learns_the_ring_under_another_schedule() -> None:
    """Few steps, from a random start: nearer to the data and to the classes that are asked for than it began."""
    from atoll.diffusion.exact import PlaneNet, exact_mixture
    from atoll.diffusion.schedules import RF

    net: Any = ring().net
    teacher = exact_mixture(net.means, net.std, net.labels, RF())

    def build() -> Denoiser:
        return Denoiser(PlaneNet(2, 4), RF(), "edm", classes=4, sigma_data=1.4)

    work = Work((2,), Conditions.classes(4), batch=64, build=build)
    method = SidFewstep(
        rollout=RandomExit(2),
        critic=Denoising(1.4),
        lr=2e-3,
        critic_lr=4e-3,
        ema=0.9,
        critic_law=UniformTime(0.02, 0.97),
    )
    trainer = Trainer(method, teacher, work, 80)
    trainer.go()
    z, cond = torch.randn(800, 2, generator=torch.Generator().manual_seed(0)), torch.arange(800) % 4
    x = method.generate(trainer.nets, z, cond, 2, torch.Generator().manual_seed(1))
    nearest = torch.cdist(x, net.means).argmin(1)
    assert (net.labels[nearest] == cond).float().mean() > 0.85
    assert (x.norm(dim=1) - 2).abs().mean() < 0.75
    assert (nearest.bincount(minlength=8) > 20).sum() >= 5
