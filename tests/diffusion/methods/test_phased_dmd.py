"""Phased DMD: experts for noise levels, unbiased targets from noisy anchors, one phase after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.core.tree import clone, equal, named_tensors
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Draw, Work
from atoll.diffusion.exact import exact_mixture
from atoll.diffusion.losses import Denoising, Noisy, SubInterval, sub_interval_target
from atoll.diffusion.methods.phased_dmd import PhasedDMD
from atoll.diffusion.rollouts import PhasePrefix, Sample, clean
from atoll.diffusion.schedules import EDM, RF, VP, Trig, add_noise, shaped, step_between
from atoll.diffusion.time_router import TimeRouter
from atoll.diffusion.trainer import Trainer

SCHEDULES = [EDM(), RF(), VP(), Trig()]


def from_anchor(schedule: Any, x0: Tensor, s: float, t: float, g: torch.Generator) -> tuple[Tensor, Noisy]:
    """Samples at s, and the same noised to t."""
    low, high = torch.full((len(x0),), s), torch.full((len(x0),), t)
    anchor = add_noise(schedule, x0, torch.randn(x0.shape, generator=g), low)
    a, b = step_between(schedule, low, high)
    eps = torch.randn(x0.shape, generator=g)
    x_t = shaped(a, x0) * anchor + shaped(b, x0) * eps
    return anchor, Noisy(x_t, high, schedule.ratio(high), eps, a, b, schedule.alpha(high), schedule.ratio(low))


# ------------------------------------------------------------------------------------------- the critic's target


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(("s", "t"), [(0.3, 0.6), (0.5, 0.9), (0.1, 0.2)])
def test_the_target_has_the_mean_of_the_whole_process(schedule: Any, s: float, t: float) -> None:
    """Two atoms with some width: what is left after E[x0 | x_t] is unrelated to any function of x_t. The anchor, taken
    for a clean sample, fails this."""
    g = torch.Generator().manual_seed(0)
    teacher = exact_mixture(torch.tensor([[-1.0], [0.8]]), 0.1, schedule=schedule)
    net: Any = teacher.net
    x0, _ = net.draw(150_000, g)
    anchor, noisy = from_anchor(schedule, x0, s, t, g)
    exact = teacher(noisy.x_t, noisy.t, torch.zeros(len(x0)).long())

    def unrelated(target: Tensor) -> float:
        rest = target - exact
        probes = [torch.ones_like(rest), noisy.x_t / noisy.x_t.std(), (3 * noisy.x_t / noisy.x_t.std()).tanh()]
        return max(abs(float((rest * p).mean() / (rest * p).std() * len(rest) ** 0.5)) for p in probes)

    assert unrelated(sub_interval_target(anchor, noisy)) < 4, "standard errors"
    assert unrelated(anchor / schedule.alpha(torch.tensor(s))) > 10


def test_it_is_the_papers_flow_target() -> None:
    """``(alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 b) eps - x_s / alpha_s`` minus the x0 target is the noise
    that a flow's clean guess implies; by hand for rectified flow."""
    g = torch.Generator().manual_seed(1)
    s, t = 0.3, 0.7
    anchor, noisy = from_anchor(RF(), torch.randn(50, 3, generator=g), s, t, g)
    b = float(noisy.b[0])
    flow = ((0.7**2 * t + 0.3 * s**2) / (0.7**2 * b)) * noisy.eps - anchor / 0.7
    from_flow = noisy.x_t - t * flow  # x_t = (1 - t) x0 + t eps and flow = eps - x0
    assert torch.allclose(sub_interval_target(anchor, noisy), from_flow, atol=1e-4)
    by_hand = anchor / 0.7 - 0.3 * s**2 / (0.7**2 * b) * noisy.eps
    assert torch.allclose(sub_interval_target(anchor, noisy), by_hand, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_from_clean_anchors_it_is_plain_denoising(schedule: Any) -> None:
    g = torch.Generator().manual_seed(2)
    x0 = torch.randn(40, 3, generator=g)
    anchor, noisy = from_anchor(schedule, x0, 0.0, 0.9, g)
    assert torch.allclose(sub_interval_target(anchor, noisy), x0, atol=1e-5)
    guess, sample = x0 + torch.randn(40, 3, generator=g), clean(x0, torch.zeros(40).long())
    damped = min(1.0, 10 * float(noisy.ratio[0] / (1 + noisy.ratio[0])) ** 2)
    assert float(SubInterval()(guess, sample, noisy)) == pytest.approx(
        damped * float(Denoising()(guess, sample, noisy)), rel=1e-4
    )


@settings(deadline=None, max_examples=40)
@given(s=st.floats(0.05, 0.9), gap=st.floats(1e-3, 0.09))
def test_its_weight_falls_as_fast_as_its_variance_grows(s: float, gap: float) -> None:
    """At t near s: the target's variance is r_s^4 / (r_t^2 - r_s^2), and the loss of the right guess stays bounded."""
    g = torch.Generator().manual_seed(3)
    anchor, noisy = from_anchor(RF(), 0.5 * torch.randn(4000, 1, generator=g), s, s + gap, g)
    sample = Sample(anchor, anchor, noisy.t, noisy.t.long(), noisy.t.long())
    guess = (noisy.x_t / (1 - s - gap)) * 0.25 / (0.25 + noisy.ratio[:, None] ** 2)
    loss = float(SubInterval()(guess, sample, noisy))
    r = s / (1 - s)
    assert loss < 10 * r**4 * (1 / r**2 + 4) + 8


# ------------------------------------------------------------------------------------------- experts and phases


def test_a_row_goes_through_the_expert_of_its_level_alone() -> None:
    class Says(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.tensor(value))

        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return x * 0 + self.value

    for schedule in SCHEDULES:
        experts = [Denoiser(Says(v), schedule, "x0", classes=1) for v in (1.0, 2.0, 3.0)]
        router = TimeRouter(experts, torch.tensor([4.0, 1.0]))
        t = schedule.time(torch.tensor([40.0, 4.01, 4.0, 1.5, 1.0, 0.2]))
        out = router(torch.zeros(6, 2), t, torch.zeros(6).long())
        assert out[:, 0].tolist() == [1, 1, 2, 2, 3, 3], schedule
        slopes = torch.autograd.grad(out[2:4].sum(), list(router.parameters()), allow_unused=True)
        assert [None if s is None else s.item() for s in slopes] == [0, 4, 0]
        assert router.null(torch.zeros(2).long()).tolist() == [1, 1]
        assert router.has_null


def snapshots(method: PhasedDMD, teacher: Denoiser, work: Work, steps: int) -> list[dict[str, Any]]:
    """Weights of every expert and of the fake score after each step."""
    trainer = Trainer(method, teacher, work, steps)
    found = []
    for _ in range(steps):
        trainer.once()
        student: Any = trainer.nets["student"]
        found.append({
            "experts": [clone(named_tensors(e)) for e in student.experts], "fake": clone(named_tensors(trainer.nets["fake"])),
            "updates": len(trainer.optimisers["fake"].state),
            "times": max([int(s["step"]) for s in trainer.optimisers["fake"].state.values()], default=0),
            "student times": max([int(s["step"]) for s in trainer.optimisers["student"].state.values()], default=0),
            "average": clone(named_tensors(trainer.nets["student_ema"])),
        })  # fmt: skip
    return found


def test_only_the_expert_of_the_phase_learns(gauss_teacher: Denoiser, gauss_work: Work) -> None:
    method = PhasedDMD(rollout=PhasePrefix(6, 3), lr=1e-2)
    start = clone(named_tensors(gauss_teacher))
    found = snapshots(method, gauss_teacher, gauss_work, 9)
    assert equal(start, named_tensors(gauss_teacher))
    for i, now in enumerate(found):
        for k, expert in enumerate(now["experts"]):
            began = i >= 3 * k
            assert equal(start, expert) is not began, (i, k)
            if i >= 3 * (k + 1):
                assert equal(expert, found[3 * (k + 1)]["experts"][k]), "a frozen expert has moved"


def test_a_finished_expert_is_its_average(gauss_teacher: Denoiser, gauss_work: Work) -> None:
    """What later phases see in training is what is sampled in the end."""
    found = snapshots(PhasedDMD(lr=1e-2, ema=0.9), gauss_teacher, gauss_work, 6)
    average = {k: v for k, v in found[2]["average"].items() if k.startswith("experts.0.")}
    now = {f"experts.0.{k}": v for k, v in found[3]["experts"][0].items()}
    assert equal(average, now)
    assert not equal(found[2]["experts"][0], found[3]["experts"][0])
    assert equal({k: v for k, v in found[5]["average"].items() if k.startswith("experts.0.")}, average)


@pytest.mark.parametrize("fresh", [False, True], ids=["a copy of the teacher", "a network of its own"])
def test_the_fake_score_starts_again_in_every_phase(fresh: bool, gauss_teacher: Denoiser, gauss_work: Work) -> None:
    """From the teacher, or from what stood in for its copy; so does its optimiser."""
    made = Denoiser(type(gauss_teacher.net)(), EDM(), "x0", classes=1, sigma_data=0.3)
    with torch.no_grad():
        made.net.mean.add_(0.25)  # type: ignore[union-attr, operator]
    work = Work((1,), gauss_work.conditions, batch=32, build=(lambda: copy.deepcopy(made)) if fresh else None)
    start = clone(named_tensors(made if fresh else gauss_teacher))
    method = PhasedDMD(critic_lr=1e-2)
    trainer = Trainer(method, gauss_teacher, work, 6)
    for i in range(6):
        before = clone(named_tensors(trainer.nets["fake"]))
        again = list(method.begin(trainer.nets, i, 6))
        assert again == (["student", "fake"] if i == 3 else [])
        fake = named_tensors(trainer.nets["fake"])
        assert equal(start, fake) is (i in (0, 3))
        assert equal(before, fake) is (i != 3)
        trainer.once()
        assert not equal(start, named_tensors(trainer.nets["fake"]))
        for role in ("student", "fake"):
            times = [int(s["step"]) for s in trainer.optimisers[role].state.values()]
            assert max(times) == i % 3 + 1, role


def test_anchors_stay_noisy_and_levels_reach_to_the_top(gauss_teacher: Denoiser, gauss_work: Work) -> None:
    work = Work((1,), gauss_work.conditions, batch=4000)
    method = PhasedDMD()
    trainer = Trainer(method, gauss_teacher, work, 2)
    for step, s, highest in ((0, 4.0, 40.0), (1, 0.0, 40.0)):
        draw = Draw(work, torch.Generator().manual_seed(0), step, 2)
        sample = method.rollout(trainer.nets["student"], draw)  # type: ignore[arg-type]
        noisy = method.noisy(gauss_teacher, sample, draw, method.law)
        assert sample.s.tolist() == pytest.approx([s] * 4000)
        assert (noisy.t > sample.s).all()
        assert noisy.t.max() == pytest.approx(highest, rel=0.05), "nested: up to T, not to where the phase began"
        flow = noisy.ratio / (1 + noisy.ratio)
        floor = s / (1 + s) + 0.02
        assert flow.mean() == pytest.approx((floor + 40 / 41) / 2, abs=0.02), "uniform in between"
        assert torch.allclose(noisy.floor, sample.s)


def test_the_direction_moves_the_noisy_anchor(gauss_teacher: Denoiser, gauss_work: Work) -> None:
    method = PhasedDMD()
    trainer = Trainer(method, gauss_teacher, gauss_work, 2)
    with torch.no_grad():
        trainer.nets["fake"].net.mean.add_(0.3)  # type: ignore[union-attr, operator]
    draw = Draw(gauss_work, torch.Generator().manual_seed(0), 0, 2)
    sample = method.rollout(trainer.nets["student"], draw)  # type: ignore[arg-type]
    probe = method.probe(trainer.nets, sample, draw)
    (slope,) = torch.autograd.grad(method.loss(sample, probe), sample.anchor)
    weight = 1 / (sample.x.detach() - probe.real).abs().clamp(min=1e-5)
    assert torch.allclose(slope, weight * (probe.fake - probe.real) / len(slope), rtol=1e-4)
    assert not torch.equal(sample.anchor, sample.x)


def test_sampling_asks_the_experts_in_turn(
    gauss_teacher: Denoiser, gauss_work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = PhasedDMD()
    trainer = Trainer(method, gauss_teacher, gauss_work, 2)
    average: Any = trainer.nets["student_ema"]
    asked: list[int] = []
    plain = Denoiser.forward

    def watched(self: Denoiser, *args: Any, **more: Any) -> Tensor:
        asked.append([id(e) for e in average.experts].index(id(self)))
        return plain(self, *args, **more)

    monkeypatch.setattr(Denoiser, "forward", watched)
    method.generate(trainer.nets, torch.randn(3, 1), torch.zeros(3).long(), 4)
    assert asked == [0, 0, 1, 1]


# ------------------------------------------------------------------------------------------- does it learn


def test_it_learns_a_gaussian_in_two_phases(gauss_teacher: Denoiser, gauss_work: Work) -> None:
    method = PhasedDMD(
        rollout=PhasePrefix(ratio=3.0, shift=2.0), critic=SubInterval(sigma_data=0.3), lr=1e-2, critic_lr=5e-2, ema=0.95,
        critic_steps=2,
    )  # fmt: skip
    trainer = Trainer(method, gauss_teacher, gauss_work, 160)
    z, cond = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)), torch.zeros(4000).long()
    assert method.generate(trainer.nets, z, cond, 4).std() < 0.19
    trainer.go()
    x = method.generate(trainer.nets, z, cond, 4)
    assert x.std() == pytest.approx(0.26, abs=0.04)
    assert x.mean() == pytest.approx(0.5, abs=0.05)


def test_it_learns_the_ring(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    """From a random start, with all eight modes."""
    method = PhasedDMD(critic=SubInterval(sigma_data=1.4), lr=2e-3, critic_lr=4e-3, ema=0.9)
    trainer = Trainer(method, ring_teacher, ring_work(batch=64), 120)
    trainer.go()
    z, cond = torch.randn(800, 2, generator=torch.Generator().manual_seed(0)), torch.arange(800) % 4
    x = method.generate(trainer.nets, z, cond, 4)
    net: Any = ring_teacher.net
    nearest = torch.cdist(x, net.means).argmin(1)
    assert (net.labels[nearest] == cond).float().mean() > 0.75
    assert (x.norm(dim=1) - 2).abs().mean() < 0.9
    assert (nearest.bincount(minlength=8) > 20).all()
