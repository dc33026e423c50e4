"""2-Rectified Flow++: velocities of any model, one round of Reflow on kept pairs, two samplers, inversion."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Draw, Images, Role, Work
from atoll.diffusion.exact import exact_mixture, ring
from atoll.diffusion.methods.rfpp import RFpp, anchored, invert, straightness, velocity, velocity_loss
from atoll.diffusion.pairs import TeacherPairStore
from atoll.diffusion.perceptual import JudgeFeatures, RandomFeatures, perceptual_distance
from atoll.diffusion.rollouts import few_step_ratios
from atoll.diffusion.schedules import EDM, RF, VP, UniformTime, UShaped, as_times
from atoll.diffusion.solvers import Sampler, ddim
from atoll.diffusion.trainer import Trainer


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the velocity


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 0.98))
def test_the_velocity_of_an_edm_model_is_its_denoiser_rewritten(time: float) -> None:
    """Query at x_t / (1 - t) with sigma = t / (1 - t); v = (x_t - D) / t."""
    teacher, x, cond = ring(), 1.5 * gaussian(0, 6, 2), torch.tensor([0, 1, 2, 3, 0, 4])
    t = torch.full((6,), time)
    clean = teacher(x / (1 - time), t / (1 - t), cond)
    assert torch.allclose(x - time * velocity(teacher, x, t, cond), clean, atol=2e-5)


def test_models_of_other_schedules_have_the_same_velocity() -> None:
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.0]])
    x, t, cond = gaussian(0, 8, 2), torch.linspace(0.05, 0.95, 8), torch.zeros(8, dtype=torch.int64)
    said = [velocity(exact_mixture(means, 0.3, schedule=s), x, t, cond) for s in (EDM(), RF(), VP())]
    assert torch.allclose(said[0], said[1], atol=1e-5)
    assert torch.allclose(said[0], said[2], atol=1e-3)


def test_a_flow_model_says_its_velocity_itself() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return x * 3

    x = gaussian(0, 4, 2)
    assert torch.equal(velocity(Denoiser(Net(), RF(), "flow"), x, torch.zeros(4), torch.zeros(4)), 3 * x)


# ---------------------------------------------------------------- the time law


@settings(max_examples=8, deadline=None)
@given(st.floats(0.5, 8.0), st.integers(0, 1000))
def test_times_follow_the_u(a: float, seed: int) -> None:
    n, bins = 40_000, 10
    ratio = UShaped(a).draw(n, torch.Generator().manual_seed(seed))
    t = (ratio / (1 + ratio)).double()
    seen = torch.histc(t, bins, 0, 1) / n

    def below(u: float) -> float:  # the integral of e^(a t) + e^(a (1 - t))
        return (math.exp(a * u) - 1 + math.exp(a) - math.exp(a * (1 - u))) / (2 * (math.exp(a) - 1))

    wanted = torch.tensor([below((i + 1) / bins) - below(i / bins) for i in range(bins)])
    assert (seen - wanted).abs().max() < 5 * math.sqrt(0.25 / n)
    assert t.min() > 0
    assert t.max() < 1


# ---------------------------------------------------------------- the loss


def test_the_velocity_loss_by_hand() -> None:
    v, u, c = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), 0.00054 * 2
    assert velocity_loss(v, u).item() == pytest.approx((math.sqrt(25 + c**2) - c) / 2, rel=1e-6)
    assert velocity_loss(v, u, "l2").item() == pytest.approx(12.5)


class Fixed(torch.nn.Module):
    """Always says the same clean sample."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(value)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.value.expand_as(x)


def losses_of(method: RFpp, student: Denoiser, material: dict[str, Tensor], features: Any = None) -> dict[str, Tensor]:
    from atoll.diffusion.distiller import Conditions

    shape = tuple(material["x"].shape[1:])
    draw = Draw(Work(shape, Conditions.classes(2), batch=5), torch.Generator().manual_seed(0), 0, 1, material)
    nets = {"student": student} | ({"features": features} if features is not None else {})
    ((role, losses),) = list(method.updates(nets, draw))
    assert role == "student"
    return {name: value.detach() for name, value in losses.items()}


def test_a_student_that_knows_the_pair_has_no_loss_and_one_that_does_not_has() -> None:
    """One pair only: its clean end is known, so velocity and features agree with it at every time."""
    x, z = gaussian(1, 1, 1, 4, 4), gaussian(2, 1, 1, 4, 4)
    material = {"z": z, "x": x, "cond": torch.zeros(1, dtype=torch.int64)}
    method = RFpp(perceptual=RandomFeatures())
    work: Any = Work((1, 4, 4), None)  # type: ignore[arg-type]
    features = RandomFeatures().network(work)
    knows = losses_of(method, Denoiser(Fixed(x), EDM(), "x0", classes=2), material, features)
    assert all(abs(float(v)) < 1e-4 for v in knows.values())
    wrong = losses_of(method, Denoiser(Fixed(x + 3), EDM(), "x0", classes=2), material, features)
    assert wrong["velocity"] > 0.05
    assert wrong["perceptual"] > 0.1


def test_features_count_one_over_t_as_much() -> None:
    x, z = gaussian(1, 1, 1, 4, 4), gaussian(2, 1, 1, 4, 4)
    material = {"z": z, "x": x, "cond": torch.zeros(1, dtype=torch.int64)}
    student = Denoiser(Fixed(x + 0.5), EDM(), "x0", classes=2)
    features = RandomFeatures().network(Work((1, 4, 4), None))  # type: ignore[arg-type]

    class At(UniformTime):
        def draw(self, n: int, generator: torch.Generator) -> Tensor:
            return torch.full((n,), self.low / (1 - self.low))

    for time in (0.25, 0.5):
        said = losses_of(
            RFpp(law=At(time), perceptual=RandomFeatures(), perceptual_weight=2.0), student, material, features
        )
        far = perceptual_distance(features, x + 0.5, x)
        assert float(said["perceptual"]) == pytest.approx(2 * float(far) / time, rel=1e-3)
        alone = losses_of(RFpp(law=At(time)), student, material)
        wanted = float(velocity_loss(torch.full_like(x, -0.5 / time), torch.zeros_like(x)))  # v - (z - x) = (x - D) / t
        assert float(alone["velocity"]) == pytest.approx(wanted, rel=1e-3)
        assert float(said["velocity"]) == pytest.approx((1 - time) * wanted, rel=1e-3)


def test_levels_stop_where_sampling_starts() -> None:
    seen: list[Tensor] = []

    class Spy(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            seen.append(t)
            return x

    class Late(UniformTime):
        def draw(self, n: int, generator: torch.Generator) -> Tensor:
            return torch.full((n,), 1e4)

    material = {"z": gaussian(0, 4, 2), "x": gaussian(1, 4, 2), "cond": torch.zeros(4, dtype=torch.int64)}
    losses_of(RFpp(law=Late()), Denoiser(Spy(), EDM(), "x0"), material)
    assert torch.allclose(seen[0], torch.full_like(seen[0], 40.0), rtol=1e-4)


def test_the_distance_between_features(digit_work: Work) -> None:
    network = RandomFeatures(seed=1).network(digit_work)
    x = gaussian(0, 3, *digit_work.shape).requires_grad_()
    y = gaussian(1, 3, *digit_work.shape).requires_grad_()
    assert torch.allclose(perceptual_distance(network, x, x), torch.zeros(3), atol=1e-6)
    far = perceptual_distance(network, x, y)
    assert (far > 0.01).all()
    far.sum().backward()
    assert x.grad is not None
    assert y.grad is None
    assert not any(p.requires_grad for p in network.parameters())


def test_the_judge_needs_images_and_random_features_do_not(digit_work: Work) -> None:
    assert RFpp().needs == "teacher samples"
    assert RFpp(perceptual=RandomFeatures()).needs == "teacher samples"
    assert RFpp(perceptual=JudgeFeatures()).needs == "images"
    with pytest.raises(AtollError, match="random_features"):
        JudgeFeatures().network(dataclasses.replace(digit_work, images=None))
    with pytest.raises(AtollError, match="looks at images"):
        RandomFeatures().network(dataclasses.replace(digit_work, shape=(2,)))


@pytest.mark.parametrize("perceptual", [JudgeFeatures(), RandomFeatures()])
def test_a_step_with_features_on_digits(
    perceptual: Any, digit_teacher: Denoiser, digit_work: Work, digit_images: Images, tmp_path: Any, monkeypatch: Any
) -> None:
    from atoll.diffusion import perceptual as module
    from atoll.diffusion.evaluate import Judge

    monkeypatch.setattr(module, "make_judge", lambda images: Judge(images.data.info.shape, 10))  # untrained: faster
    method = RFpp(TeacherPairStore(16, Sampler(solver="ddim", steps=2)), perceptual=perceptual)
    trainer = Trainer(method, digit_teacher, digit_work, 2)
    trainer.prepare()
    said = trainer.once()
    assert said.keys() == {"student/velocity", "student/perceptual"}
    assert all(math.isfinite(v) for v in said.values())


# ---------------------------------------------------------------- samplers


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(0, 100))
def test_anchored_and_euler_agree_on_a_straight_flow(steps: int, seed: int) -> None:
    """Every z has its own clean end, wherever on the line one asks."""
    z, end = gaussian(seed, 5, 2), gaussian(seed + 1, 5, 2)
    times = as_times(RF(), few_step_ratios(steps, 1e5), z)
    assert torch.allclose(anchored(RF(), lambda x, t: end, z, times), end, atol=1e-5)
    assert torch.allclose(ddim(RF(), lambda x, t: end, z, times), end, atol=1e-5)


def test_they_differ_on_a_curved_one(ring_teacher: Denoiser) -> None:
    z, cond = gaussian(0, 64, 2), torch.arange(64) % 4
    nets = {"student": ring_teacher}
    euler, anchor = (RFpp(sampler=s).generate(nets, z, cond, 3) for s in ("euler", "anchored"))  # type: ignore[arg-type]
    assert (euler - anchor).abs().max() > 0.02
    assert torch.allclose(*(RFpp(sampler=s).generate(nets, z, cond, 1) for s in ("euler", "anchored")), atol=1e-5)  # type: ignore[arg-type]


def test_the_anchor_is_the_first_noise() -> None:
    """Two steps by hand: the second starts from half the first guess and half of z."""
    z, asked = gaussian(0, 4, 2), []

    def guess(x: Tensor, t: Tensor) -> Tensor:
        asked.append(x)
        return x.square()

    anchored(RF(), guess, z, torch.tensor([0.9, 0.5, 0.0]))
    assert torch.allclose(asked[1], 0.5 * (0.9 * z).square() + 0.5 * z)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 100))
def test_inversion_then_generation_gives_the_sample_back(seed: int) -> None:
    teacher = ring()
    x, cond = teacher.net.draw(32, torch.Generator().manual_seed(seed))  # type: ignore[operator]
    z = invert(teacher, x, cond, 200)
    assert 0.5 < float(z.std()) < 1.6
    back = RFpp().generate({"student": teacher}, z, cond, 200)
    assert (back - x).norm(dim=1).quantile(0.9) < 0.15  # first order: halves with twice the steps
    assert (z - gaussian(seed, 32, 2)).norm() > 1  # nothing but x went in


def test_a_straight_flow_is_measured_as_straight() -> None:
    """A point mass: every path is a line. A ring is not."""
    z, cond = gaussian(0, 32, 2), torch.zeros(32, dtype=torch.int64)
    point = exact_mixture(torch.zeros(1, 2), 1e-3)
    assert float(straightness(point, z, cond).max()) < 1e-4
    assert float(straightness(ring(), z, cond).mean()) > 0.1
    # by hand, on one Gaussian of standard deviation s: x_t = sqrt((1 - t)^2 s^2 + t^2) z
    wide = exact_mixture(torch.zeros(1, 2), 0.5)
    t = torch.linspace(0.0005, 0.9995, 1000)
    slope = (t - (1 - t) * 0.25) / ((1 - t) ** 2 * 0.25 + t**2).sqrt()
    wanted = (0.5 - slope).square().mean() * z.square().mean(1)
    said = straightness(wide, z, cond, steps=400, first=1e5)
    assert torch.allclose(said, wanted, rtol=0.02)


# ---------------------------------------------------------------- one round


def energy_distance(a: Tensor, b: Tensor) -> float:
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def test_one_round_straightens_the_ring(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    """Straighter than the teacher by several times, and one call is worth more than one of the teacher's."""
    method = RFpp(TeacherPairStore(4000, Sampler(steps=12)), lr=3e-3, warmup=20, ema=0.98)
    trainer = Trainer(method, ring_teacher, ring_work(batch=256), 500)
    trainer.go()
    student: Any = trainer.nets["student_ema"]
    z, cond = gaussian(5, 2000, 2), torch.arange(2000) % 4
    before = float(straightness(ring_teacher, z, cond).mean())
    after = float(straightness(student, z, cond).mean())
    real, kind = ring_teacher.net.draw(2000, torch.Generator().manual_seed(9))  # type: ignore[operator]
    own = energy_distance(method.generate(trainer.nets, z, cond, 1), real)
    theirs = energy_distance(method.generate({"student": ring_teacher}, z, cond, 1), real)
    assert after < before / 3
    assert own < theirs / 3
    some = kind[:200]
    back = method.generate(trainer.nets, invert(student, real[:200], some, 8), some, 8)
    assert (back - real[:200]).norm(dim=1).median() < 0.1


def test_the_student_starts_as_the_teacher(digit_teacher: Denoiser, digit_work: Work) -> None:
    roles: dict[str, Role] = RFpp().roles(digit_teacher, digit_work)
    x, t, cond = gaussian(0, 4, *digit_work.shape), torch.full((4,), 0.4), torch.arange(4)
    assert torch.equal(velocity(roles["student"].module, x, t, cond), velocity(digit_teacher, x, t, cond))  # type: ignore[arg-type]
