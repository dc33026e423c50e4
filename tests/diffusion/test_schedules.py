"""Noise schedules, conversions between predictions, laws of noise levels and grids."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.core.streams import stream
from atoll.diffusion.schedules import (
    EDM,
    KINDS,
    RF,
    VP,
    KarrasIndex,
    LogitNormal,
    LogNormal,
    NoiseSchedule,
    TimeLaw,
    Trig,
    UniformTime,
    add_noise,
    as_times,
    convert,
    flow_grid,
    karras_grid,
    renoise,
    shaped,
    step_between,
)

SCHEDULES = [EDM(), RF(), Trig(), Trig(1.4), VP(), VP(0.5, 0.5)]
EACH = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
RATIOS = torch.logspace(-2.5, 1.6, 40)  # 0.003 to 40
LEVELS = st.floats(0.01, 40.0)


def times(schedule: NoiseSchedule) -> Tensor:
    return schedule.time(RATIOS)


@EACH
def test_time_and_ratio_are_inverse_and_rise(schedule: NoiseSchedule) -> None:
    t = times(schedule)
    assert (t.diff() > 0).all()
    assert torch.allclose(schedule.ratio(t), RATIOS, rtol=1e-4)
    assert torch.allclose(schedule.time(schedule.ratio(t)), t, rtol=1e-5)
    assert float(schedule.time(torch.tensor(0.0))) == 0.0
    assert float(schedule.alpha(torch.tensor(0.0))) == 1.0
    assert float(schedule.sigma(torch.tensor(0.0))) == 0.0


@EACH
def test_slopes_are_the_derivatives(schedule: NoiseSchedule) -> None:
    t = times(schedule).double()
    h = 1e-5 * t
    for value, slope in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)):
        finite = (value(t + h) - value(t - h)) / (2 * h)
        assert torch.allclose(slope(t), finite, rtol=1e-5, atol=1e-7)


def test_each_schedule_is_its_papers() -> None:
    t = torch.tensor([0.25, 0.5])
    assert torch.equal(EDM().sigma(t), t)
    assert torch.equal(RF().alpha(t) + RF().sigma(t), torch.ones(2))
    trig, vp = Trig(0.5), VP()
    assert torch.allclose(trig.alpha(t) ** 2 + (trig.sigma(t) / 0.5) ** 2, torch.ones(2))
    assert torch.allclose(vp.alpha(t) ** 2 + vp.sigma(t) ** 2, torch.ones(2))
    grid = torch.linspace(0, 0.5, 100_001, dtype=torch.float64)
    integral = torch.trapezoid(0.1 + grid * 19.9, grid)  # of beta
    assert float(vp.alpha(t[1])) == pytest.approx(math.exp(-0.5 * float(integral)), rel=1e-5)


def test_a_flow_never_reaches_pure_noise() -> None:
    """Its ratio is infinite at 1; Karras's 80 is 1 - 1/81, well below."""
    assert float(RF().time(torch.tensor(math.inf).nan_to_num(posinf=1e30))) == pytest.approx(1 - 1e-5)
    assert float(RF().time(torch.tensor(80.0))) == pytest.approx(80 / 81)


# ------------------------------------------------------------------------------------------- noising


@EACH
@given(low=LEVELS, factor=st.floats(1.0, 50.0))
@settings(max_examples=15, deadline=None)
def test_a_step_between_two_times_composes(schedule: NoiseSchedule, low: float, factor: float) -> None:
    """Noising to s and then to t has the marginal of noising to t: the same signal, the same variance."""
    s, t = (schedule.time(torch.tensor(r, dtype=torch.float64)) for r in (low, low * factor))
    a, b = step_between(schedule, s, t)
    assert float(a * schedule.alpha(s)) == pytest.approx(float(schedule.alpha(t)), rel=1e-5)
    variance = (a * schedule.sigma(s)) ** 2 + b**2
    assert float(variance) == pytest.approx(float(schedule.sigma(t) ** 2), rel=1e-5)


@EACH
def test_renoised_samples_have_the_law_of_noised_ones(schedule: NoiseSchedule) -> None:
    g, n = stream(0, "renoise"), 40_000
    x0 = 0.7 + 0.3 * torch.randn(n, 1, generator=g)
    s, t = schedule.time(torch.full((n,), 0.4)), schedule.time(torch.full((n,), 1.5))
    x_s = add_noise(schedule, x0, torch.randn(n, 1, generator=g), s)
    x_t = renoise(schedule, x_s, s, t, torch.randn(n, 1, generator=g))
    alpha, sigma = float(schedule.alpha(t[0])), float(schedule.sigma(t[0]))
    std = math.hypot(alpha * 0.3, sigma)
    assert float(x_t.mean()) == pytest.approx(0.7 * alpha, abs=4 * std / n**0.5)
    assert float(x_t.std()) == pytest.approx(std, rel=0.02)
    assert float((x_t * x0).mean() - x_t.mean() * x0.mean()) == pytest.approx(alpha * 0.09, abs=0.02)


@EACH
def test_noise_on_a_clean_sample_is_plain_noise(schedule: NoiseSchedule) -> None:
    g = stream(1, "renoise")
    x0, eps, t = torch.randn(5, 3, generator=g), torch.randn(5, 3, generator=g), times(schedule)[:5]
    assert torch.allclose(renoise(schedule, x0, torch.zeros(5), t, eps), add_noise(schedule, x0, eps, t), atol=1e-6)


# ------------------------------------------------------------------------------------------- predictions


@EACH
@pytest.mark.parametrize("frm", KINDS)
@pytest.mark.parametrize("to", KINDS)
def test_conversions_say_what_is_true_and_come_back(schedule: NoiseSchedule, frm: str, to: str) -> None:
    g = stream(2, "convert")
    ratio = torch.tensor([0.05, 0.3, 1.0, 2.5, 10.0])
    x0, eps, t = torch.randn(5, 2, 3, generator=g), torch.randn(5, 2, 3, generator=g), schedule.time(ratio)
    a, s, da, ds = (
        shaped(f(t), x0) for f in (schedule.alpha, schedule.sigma, schedule.d_alpha, schedule.d_sigma)
    )  # fmt: skip
    x_t = a * x0 + s * eps
    truth = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": da * x0 + ds * eps}
    there = convert(schedule, truth[frm], frm, to, x_t, t)
    assert torch.allclose(there, truth[to], atol=2e-4)  # eps from x0 at little noise loses digits
    guess = truth[frm] + torch.randn(5, 2, 3, generator=g)  # wrong predictions must come back too
    back = convert(schedule, convert(schedule, guess, frm, to, x_t, t), to, frm, x_t, t)
    assert torch.allclose(back, guess, atol=1e-5, rtol=2e-5)


@EACH
def test_velocity_is_the_derivative_of_the_path(schedule: NoiseSchedule) -> None:
    g = stream(3, "convert")
    x0, eps = torch.randn(40, 2, generator=g).double(), torch.randn(40, 2, generator=g).double()
    t = times(schedule).double()
    h = 1e-5 * t
    x_t = add_noise(schedule, x0, eps, t)
    finite = (add_noise(schedule, x0, eps, t + h) - add_noise(schedule, x0, eps, t - h)) / (2 * h[:, None])
    assert torch.allclose(convert(schedule, eps, "eps", "flow", x_t, t), finite, rtol=1e-4, atol=1e-6)


def test_unknown_predictions_are_refused() -> None:
    x, t = torch.zeros(1, 2), torch.ones(1)
    with pytest.raises(ValueError, match=r"one of x0, eps, v, flow, not 'score'"):
        convert(EDM(), x, "score", "x0", x, t)


# ------------------------------------------------------------------------------------------- laws and grids


def test_laws_draw_what_they_say() -> None:
    n = 20_000
    log = LogNormal(-1.2, 1.2).draw(n, stream(0, "law")).log()
    assert float(log.mean()) == pytest.approx(-1.2, abs=0.05)
    assert float(log.std()) == pytest.approx(1.2, abs=0.05)
    t = RF().time(LogitNormal(0.5, 1.0).draw(n, stream(1, "law")))
    assert float(t.logit().mean()) == pytest.approx(0.5, abs=0.05)
    t = RF().time(UniformTime(0.2, 0.6).draw(n, stream(2, "law")))
    assert (float(t.min()), float(t.max())) == pytest.approx((0.2, 0.6), abs=1e-3)
    assert float(t.mean()) == pytest.approx(0.4, abs=0.01)
    index = KarrasIndex(0.02, 40.0, 7.0, 0.8).draw(n, stream(3, "law")) ** (1 / 7)
    u = (index - 0.02 ** (1 / 7)) / (40 ** (1 / 7) - 0.02 ** (1 / 7))
    assert (float(u.min()), float(u.max())) == pytest.approx((0.0, 0.8), abs=1e-3)
    assert float(u.mean()) == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("law", [LogNormal(), LogitNormal(), UniformTime(), KarrasIndex()], ids=repr)
def test_laws_belong_to_their_generator(law: TimeLaw) -> None:
    before = torch.get_rng_state()
    assert torch.equal(law.draw(7, stream(0, "a")), law.draw(7, stream(0, "a")))
    assert torch.equal(before, torch.get_rng_state())


def test_karras_grid_is_the_papers() -> None:
    grid = karras_grid(5, 0.02, 40.0, 7.0)
    by_hand = [(40 ** (1 / 7) + i / 4 * (0.02 ** (1 / 7) - 40 ** (1 / 7))) ** 7 for i in range(5)]
    assert grid.tolist() == pytest.approx([*by_hand, 0.0])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 18])
def test_grids_fall_from_the_top_to_nothing(steps: int) -> None:
    for grid in (karras_grid(steps, 0.02, 40.0), flow_grid(steps, high=40 / 41), flow_grid(steps, 3.0, 40 / 41)):
        assert len(grid) == steps + 1
        assert (grid.diff() < 0).all()
        assert float(grid[-1]) == 0.0
        assert grid.dtype == torch.float64
    assert float(karras_grid(steps, 0.02, 40.0)[0]) == pytest.approx(40.0)
    assert float(flow_grid(steps, high=40 / 41)[0]) == pytest.approx(40.0)


def test_two_karras_steps_are_not_wasted_on_the_clean_end() -> None:
    assert 0.5 < float(karras_grid(2)[1]) < 10


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_shift_multiplies_every_ratio(shift: float) -> None:
    """t -> shift t / (1 + (shift - 1) t) in rectified-flow time is a factor on sigma / alpha."""
    assert torch.allclose(flow_grid(6, shift, 0.9), shift * flow_grid(6, 1.0, 0.9))


@EACH
def test_grids_become_times_of_any_schedule(schedule: NoiseSchedule) -> None:
    found = as_times(schedule, karras_grid(6), torch.zeros(1))
    assert found.dtype == torch.float32
    assert torch.allclose(schedule.ratio(found), karras_grid(6).float(), rtol=1e-4)
