"""Weak-to-strong diffusion: what a reflection adds, with which pairs, at which price, and the authors' toy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.adapters import lora
from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Work
from atoll.diffusion.exact import exact_mixture, ring
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.methods.w2sd import W2SD, guess_of
from atoll.diffusion.reflection import lora_scaled, reflect, reflected, reflections
from atoll.diffusion.schedules import EDM, RF, VP, NoiseSchedule, Trig, as_times, karras_grid
from atoll.diffusion.solvers import SOLVERS, Guess, Sampler, ddim
from atoll.diffusion.trainer import Trainer

SCHEDULES = [EDM(), RF(), VP(), Trig()]


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(schedule: NoiseSchedule) -> tuple[Guess, Guess, Denoiser]:
    """Two exact models in float64: three modes, of which the weak one knows two."""
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [-1.0, -1.5]], dtype=torch.float64)
    strong, weak = exact_mixture(means, 0.4, schedule=schedule), exact_mixture(means[:2], 0.5, schedule=schedule)

    def guess(model: Denoiser) -> Guess:
        # the bare network: a denoiser answers in float32
        return lambda x, t: model.net(x, t.expand(len(x)), torch.zeros(len(x), dtype=torch.int64))

    return guess(strong), guess(weak), strong


def point(schedule: NoiseSchedule, ratio: float, step: float) -> tuple[Tensor, Tensor, Tensor]:
    t, to = schedule.time(torch.tensor([ratio, ratio * (1 - step)], dtype=torch.float64))
    clean = torch.tensor([[2.0, 0.0], [-1.0, -1.5], [0.5, 0.5], [-1.0, 1.0]], dtype=torch.float64)
    return schedule.alpha(t) * clean + schedule.sigma(t) * gaussian(0, 4, 2).double(), t, to


# ---------------------------------------------------------------- one reflection


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@settings(max_examples=10, deadline=None)
@given(st.floats(0.3, 4.0))
def test_it_moves_by_the_difference_of_the_scores(schedule: NoiseSchedule, ratio: float) -> None:
    """sigma^2 dt (s_strong - s_weak) for EDM; in general alpha (r - r') / r (D_strong - D_weak)."""
    strong, weak, _ = pair(schedule)
    x, t, to = point(schedule, ratio, 1e-3)
    moved = reflected(schedule, strong, weak, x, t, to) - x
    r, r_to = schedule.ratio(t), schedule.ratio(to)
    scores = schedule.alpha(t) * (strong(x, t) - weak(x, t)) / schedule.sigma(t) ** 2
    wanted = schedule.alpha(t) ** 2 * r * (r - r_to) * scores
    assert (moved - wanted).norm() < 0.05 * wanted.norm()
    if schedule == EDM():
        assert torch.allclose(wanted, t * (t - to) * scores)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_equal_models_leave_a_point_where_it_is_to_second_order(schedule: NoiseSchedule) -> None:
    strong, _, _ = pair(schedule)
    errors = []
    for step in (0.02, 0.01, 0.005):
        x, t, to = point(schedule, 1.0, step)
        errors.append(float((reflected(schedule, strong, strong, x, t, to) - x).norm()))
    assert errors[0] > 0
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(SCHEDULES), st.floats(0.3, 4.0))
def test_the_reverse_pair_moves_the_other_way(schedule: NoiseSchedule, ratio: float) -> None:
    strong, weak, _ = pair(schedule)
    x, t, to = point(schedule, ratio, 1e-3)
    a, b = reflected(schedule, strong, weak, x, t, to) - x, reflected(schedule, weak, strong, x, t, to) - x
    assert float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) < -0.98


def test_the_weak_model_is_asked_at_the_noisier_time() -> None:
    asked: list[tuple[Tensor, float]] = []

    def weak(x: Tensor, t: Tensor) -> Tensor:
        asked.append((x, float(t)))
        return torch.ones_like(x)

    x = torch.tensor([[2.0, -1.0]])
    back = reflected(EDM(), lambda x, t: torch.zeros_like(x), weak, x, torch.tensor(4.0), torch.tensor(1.0))
    there = x / 4  # towards 0
    assert torch.equal(asked[0][0], there)
    assert asked[0][1] == 4.0
    assert torch.allclose(back, there + 3 * (there - 1) / 4)


# ---------------------------------------------------------------- within a solver


@pytest.mark.parametrize("name", list(SOLVERS))
def test_without_reflections_it_is_the_plain_solver(name: str, ring_teacher: Denoiser) -> None:
    z, cond = gaussian(0, 16, 2), torch.arange(16) % 4
    times = as_times(EDM(), karras_grid(6), z)
    strong, weak = guess_of(ring_teacher, Guidance(), cond), guess_of(ring_teacher, Guidance(0.0), cond)
    plain = SOLVERS[name](EDM(), strong, 40 * z, times)
    assert torch.equal(reflect(SOLVERS[name], weak, 0)(EDM(), strong, 40 * z, times), plain)
    assert torch.equal(reflect(SOLVERS[name], weak, gap=0.0)(EDM(), strong, 40 * z, times), plain)
    assert not torch.allclose(reflect(SOLVERS[name], weak, 2)(EDM(), strong, 40 * z, times), plain, atol=1e-3)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_equal_models_end_where_plain_sampling_ends_with_small_steps(name: str) -> None:
    strong, _, _ = pair(EDM())
    x = 40 * gaussian(0, 32, 2).double()
    far = []
    for steps in (40, 80, 120):
        times = karras_grid(steps)
        with_it = reflect(SOLVERS[name], strong)(EDM(), strong, x, times)
        far.append(float((with_it - SOLVERS[name](EDM(), strong, x, times)).norm(dim=1).mean()))
    assert far[2] < 0.1
    assert far[0] / far[2] > 2  # first order at least: N reflections, O(1 / N^2) each


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(list(SOLVERS)), st.integers(1, 9), st.one_of(st.none(), st.integers(0, 12)))
def test_three_calls_a_reflected_step(name: str, steps: int, first: int | None) -> None:
    """Strong, weak, strong: two more than the solver's own; the last step is never reflected."""
    count = {"strong": 0, "weak": 0}
    where: list[float] = []

    def counted(who: str) -> Guess:
        def guess(x: Tensor, t: Tensor) -> Tensor:
            count[who] += 1
            if who == "weak":
                where.append(float(t))
            return 0.5 * x

        return guess

    times = karras_grid(steps)
    reflect(SOLVERS[name], counted("weak"), first)(EDM(), counted("strong"), gaussian(0, 3, 2).double(), times)
    own = 2 * steps - 1 if name == "heun" else steps
    wanted = steps - 1 if first is None else min(first, steps - 1)
    assert count == {"strong": own + wanted, "weak": wanted}
    assert wanted == reflections(steps, first)
    assert where == [float(t) for t in times[:wanted]]  # the noisy end
    if name == "ddim":
        assert sum(count.values()) == 3 * wanted + (steps - wanted)


# ---------------------------------------------------------------- pairs


def test_calls_are_counted_with_guidance() -> None:
    """Guided strong (2 rows), plain weak (1 row): 2 + 1 + 2 a reflected step."""
    method = W2SD(Guidance(3.0), Guidance(1.0), sampler=Sampler(solver="ddim", steps=4))
    assert method.calls(4) == 3 * 5 + 2
    assert method.few == (7, 17)
    assert [method.steps(c) for c in (1, 2, 6, 7, 16, 17, 18)] == [1, 1, 1, 2, 3, 4, 4]
    assert W2SD(Guidance(), Guidance()).calls(4) == 10
    assert W2SD(Guidance(), Guidance(), first=1, sampler=Sampler(solver="heun")).calls(4) == 9


def modes_of(teacher: Denoiser, x: Tensor) -> Tensor:
    means: Tensor = teacher.net.means  # type: ignore[assignment]
    return torch.cdist(x, means).argmin(1)


def agreement(teacher: Denoiser, x: Tensor, cond: Tensor) -> float:
    labels: Tensor = teacher.net.labels  # type: ignore[assignment]
    return float((labels[modes_of(teacher, x)] == cond).float().mean())


def test_a_pair_of_guidances_follows_the_condition_more_than_either(ring_work: Callable[..., Work]) -> None:
    """Weakly guided models on a ring whose modes overlap; the reverse pair follows it less."""
    teacher = ring(std=0.6)
    z, cond = gaussian(1, 1500, 2), torch.arange(1500) % 4
    sampler = Sampler(solver="ddim", steps=20)
    strong, weak = Guidance(0.6), Guidance(0.2)

    def share(a: Guidance, b: Guidance) -> float:
        method = W2SD(a, b, sampler=sampler)
        return agreement(teacher, method.generate({"student": teacher}, z, cond, method.few[1]), cond)

    plain = [agreement(teacher, Sampler("ddim", 20, g)(teacher, z, cond), cond) for g in (weak, strong)]
    assert share(weak, strong) < plain[0] < plain[1] < share(strong, weak)


def test_guidances_a_and_b_make_guidance_2a_minus_b() -> None:
    """A reflected step of EDM is a step with the sum of both differences, to second order."""
    teacher = ring(std=0.6)
    x, cond = 2 * gaussian(0, 64, 2), torch.arange(64) % 4
    far = []
    for step in (0.1, 0.05):
        times = torch.tensor([1.5, 1.5 * (1 - step), 0.0])
        strong, weak = guess_of(teacher, Guidance(2.0), cond), guess_of(teacher, Guidance(0.5), cond)
        there = ddim(EDM(), strong, reflected(EDM(), strong, weak, x, times[0], times[1]), times[:2])
        wanted, plain = (ddim(EDM(), guess_of(teacher, Guidance(w), cond), x, times[:2]) for w in (3.5, 2.0))
        far.append(float((there - wanted).norm() / (plain - wanted).norm()))
    assert far[1] < 0.1
    assert far[1] < 0.6 * far[0]


def mixed(share: int, of: int) -> Denoiser:
    """Peaks at +4 and -4, of which the latter has ``share`` of ``of`` parts."""
    means = torch.tensor([[-4.0]] * share + [[4.0]] * (of - share))
    return exact_mixture(means, 0.7)


def minority(model: Denoiser, **more: Any) -> float:
    z, cond = gaussian(3, 4000, 1), torch.zeros(4000, dtype=torch.int64)
    if not more:
        x = Sampler(solver="ddim", steps=20)(model, z, cond)
    else:
        method = W2SD(Guidance(), Guidance(), sampler=Sampler(solver="ddim", steps=20), **more)
        x = method.generate({"student": model, "weak": method.weak_model}, z, cond, method.few[1])  # type: ignore[dict-item]
    return float((x < 0).float().mean())


def test_the_minority_comes_back() -> None:
    """The authors' toy: a strong model of 5000 and 2500 rows, a weak one of 5000 and 500. The minority's share grows
    from weak to strong to the pair, where it is near a half; the reverse pair makes it worse."""
    strong, weak = mixed(1, 3), mixed(1, 11)
    shares = minority(weak), minority(strong), minority(strong, weak_model=weak), minority(weak, weak_model=strong)
    assert shares[0] == pytest.approx(1 / 11, abs=0.02)
    assert shares[1] == pytest.approx(1 / 3, abs=0.02)
    assert shares[1] + 0.1 < shares[2] < 0.75
    assert shares[3] < shares[0]


def test_a_half_gap_moves_less() -> None:
    strong, weak = mixed(1, 3), mixed(1, 11)
    full, half = minority(strong, weak_model=weak), minority(strong, weak_model=weak, gap=0.5)
    assert minority(strong) + 0.02 < half < full - 0.02


def test_a_weak_model_of_another_schedule_is_the_same_pair() -> None:
    means = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    z, cond = gaussian(0, 64, 2), torch.zeros(64, dtype=torch.int64)
    strong = exact_mixture(means, 0.3)
    made = []
    for schedule in (EDM(), RF()):
        method = W2SD(Guidance(), Guidance(), exact_mixture(means[:1], 0.3, schedule=schedule))
        made.append(method.generate({"student": strong, "weak": method.weak_model}, z, cond, 22))  # type: ignore[dict-item]
    assert torch.allclose(made[0], made[1], atol=1e-3)


def with_lora(teacher: Denoiser) -> Denoiser:
    model = copy.deepcopy(teacher)
    lora.inject(model.net, ["middle.conv1", "middle.film"], {2: 2.0})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.2 * gaussian(1, *p.shape))
    return model.eval()


def test_a_pair_of_lora_scales(digit_teacher: Denoiser, digit_work: Work) -> None:
    model = with_lora(digit_teacher)
    z, cond = gaussian(0, 4, *digit_work.shape), torch.arange(4)
    x, t = 2 * z, torch.tensor(2.0)
    with torch.no_grad():
        with lora_scaled(model, 0.0):
            assert torch.allclose(model(x, t, cond), digit_teacher(x, t, cond), atol=1e-6)
        out, base = model(x, t, cond), digit_teacher(x, t, cond)
        assert not torch.allclose(out, base, atol=1e-3)
        with lora_scaled(model, -1.5):
            assert not torch.allclose(model(x, t, cond), out, atol=1e-3)
        assert torch.equal(model(x, t, cond), out)  # put back

    def made(**more: Any) -> Tensor:
        method = W2SD(Guidance(), Guidance(), sampler=Sampler("ddim", 3), **more)
        return method.generate({"student": model}, z, cond, method.few[1])

    assert torch.equal(made(lora=(1.0, 1.0)), made())
    assert torch.allclose(
        made(lora=(1.0, 0.0)),
        W2SD(Guidance(), Guidance(), digit_teacher, sampler=Sampler("ddim", 3)).generate(
            {"student": model, "weak": digit_teacher}, z, cond, 7
        ),
        atol=1e-5,
    )
    assert not torch.allclose(made(lora=(1.0, -1.5)), made(lora=(1.0, 0.0)), atol=1e-4)
    with pytest.raises(AtollError, match="has none"), lora_scaled(digit_teacher, 1.0):
        pass


def test_a_checkpoint_as_the_weak_model_through_the_trainer(digit_teacher: Denoiser, digit_work: Work) -> None:
    weak = copy.deepcopy(digit_teacher)
    with torch.no_grad():
        for p in weak.parameters():
            p.mul_(0.8)
    method = W2SD(Guidance(2.0), Guidance(2.0), weak)
    trainer = Trainer(method, digit_teacher, digit_work, 2)
    assert trainer.go().steps == 2
    assert trainer.nets["student"] is digit_teacher
    assert trainer.nets["weak"] is weak
    z, cond = gaussian(0, 4, *digit_work.shape), torch.arange(4)
    made = method.generate(trainer.nets, z, cond, method.few[1])
    assert made.isfinite().all()
    assert not torch.allclose(
        made,
        W2SD(Guidance(2.0), Guidance(2.0)).generate(trainer.nets | {"weak": digit_teacher}, z, cond, method.few[1]),
    )


def test_the_weak_model_has_one_source(ring_teacher: Denoiser) -> None:
    with pytest.raises(AtollError, match="not from both"):
        W2SD(weak_model=ring_teacher, lora=(1.0, 0.0))
