"""Solvers against the exact flow of a Gaussian, and against diffusers' schedulers at the same times."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from atoll.core.streams import stream
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.exact import PlaneNet, ring
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.rollouts import few_step_ratios, few_steps
from atoll.diffusion.schedules import EDM, RF, VP, NoiseSchedule, Trig, convert, flow_grid, karras_grid, shaped
from atoll.diffusion.solvers import Guess, Sampler, ddim, ddim_step, dpmpp, heun, renoising, start

MEAN, STD = 0.3, 0.5
SCHEDULES = [EDM(), RF(), Trig(), VP()]
Solver = Callable[[NoiseSchedule, Guess, Tensor, Tensor], Tensor]


def gaussian(schedule: NoiseSchedule) -> Guess:
    """E[x0 | x_t] for data N(0.3, 0.5^2)."""

    def guess(x: Tensor, t: Tensor) -> Tensor:
        a, s = schedule.alpha(t), schedule.sigma(t)
        return MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)

    return guess


def flow_of(schedule: NoiseSchedule, x: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """Where the probability flow takes x: it keeps the number of standard deviations from the mean."""

    def moments(u: Tensor) -> tuple[Tensor, Tensor]:
        a, s = schedule.alpha(u), schedule.sigma(u)
        return a * MEAN, (a**2 * STD**2 + s**2).sqrt()

    (m, d), (m2, d2) = moments(t), moments(to)
    return m2 + d2 / d * (x - m)


def grid(schedule: NoiseSchedule, steps: int) -> Tensor:
    return schedule.time(karras_grid(steps + 1, 0.05, 20.0)[:-1])  # float64; stops above 0, where orders show


def points(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    z = torch.randn(32, 1, generator=stream(0, "points"), dtype=torch.float64)
    return schedule.alpha(t) * MEAN + (schedule.alpha(t) ** 2 * STD**2 + schedule.sigma(t) ** 2).sqrt() * z


def order(error: Callable[[int], float]) -> float:
    """Slope of the error in log-log between 40 and 160 steps."""
    return math.log(error(40) / error(160)) / math.log(4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(("solver", "expected"), [(ddim, 1), (heun, 2), (dpmpp, 2)])
def test_each_converges_to_the_exact_map_with_its_order(schedule: NoiseSchedule, solver: Solver, expected: int) -> None:
    def error(steps: int) -> float:
        times = grid(schedule, steps)
        x = points(schedule, times[0])
        found = solver(schedule, gaussian(schedule), x, times)
        return float((found - flow_of(schedule, x, times[0], times[-1])).abs().max())

    assert order(error) == pytest.approx(expected, abs=0.25)
    assert error(160) < (0.02 if expected == 1 else 2e-3)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("solver", [ddim, heun, dpmpp])
def test_one_step_to_the_end_is_the_guess(schedule: NoiseSchedule, solver: Solver) -> None:
    times = schedule.time(torch.tensor([5.0, 0.0], dtype=torch.float64))
    x = points(schedule, times[0])
    found = solver(schedule, gaussian(schedule), x, times)
    assert torch.allclose(found, gaussian(schedule)(x, times[0]), atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_down_and_up_again_comes_back_to_second_order(schedule: NoiseSchedule) -> None:
    """A step and its inversion differ by O(h^2); both directions have the same first-order error."""

    def one(h: float) -> float:
        t, to = schedule.time(torch.tensor([1.0, math.exp(-h)], dtype=torch.float64))
        x, guess = points(schedule, t), gaussian(schedule)
        down = ddim(schedule, guess, x, torch.stack([t, to]))
        return float((ddim(schedule, guess, down, torch.stack([to, t])) - x).abs().max())

    assert math.log(one(0.1) / one(0.025)) / math.log(4) == pytest.approx(2, abs=0.15)
    times = grid(schedule, 100)
    x = points(schedule, times[0])
    there = ddim(schedule, gaussian(schedule), x, times)
    back = ddim(schedule, gaussian(schedule), there, times.flip(0))
    assert float((back - x).abs().max()) < 0.15 * float(x.abs().max())


def test_a_ddim_step_is_eulers_in_edms_time() -> None:
    x, x0, t, to = torch.randn(4, 3), torch.randn(4, 3), torch.tensor(2.0), torch.tensor(1.4)
    euler = x + (to - t) * (x - x0) / t
    assert torch.allclose(ddim_step(EDM(), x, x0, t, to), euler, atol=1e-6)
    times = torch.tensor([[2.0, 1.0, 0.5, 3.0], [1.4, 0.2, 0.0, 2.9]])  # every row at its own time
    rows = torch.cat([ddim_step(EDM(), x[i : i + 1], x0[i : i + 1], times[0, i], times[1, i]) for i in range(4)])
    assert torch.allclose(ddim_step(EDM(), x, x0, times[0], times[1]), rows, atol=1e-6)


# ------------------------------------------------------------------------------------------- diffusers


def network() -> tuple[Denoiser, Tensor, Tensor]:
    """A preconditioned network with random weights, a start and classes."""
    torch.manual_seed(0)
    made = Denoiser(PlaneNet(width=32), EDM(), "edm", classes=4, sigma_data=0.5).requires_grad_(False)
    return made, torch.randn(6, 2, generator=stream(1, "x")), torch.arange(6) % 4


@pytest.mark.parametrize(("name", "solver"), [("EDMEulerScheduler", ddim), ("EDMDPMSolverMultistepScheduler", dpmpp)])
def test_edm_schedulers_give_the_same_points(name: str, solver: Solver) -> None:
    diffusers = pytest.importorskip("diffusers")
    made, z, cond = network()
    theirs = getattr(diffusers, name)(sigma_min=0.02, sigma_max=40.0, sigma_data=0.5)
    theirs.set_timesteps(8)
    sigmas = torch.cat([theirs.sigmas[:8], torch.zeros(1)])
    assert torch.allclose(sigmas, karras_grid(8, 0.02, 40.0).float(), rtol=1e-5)
    x = start_theirs = 40.0 * z
    for i, t in enumerate(theirs.timesteps):
        scaled = theirs.scale_model_input(x, t)
        time = theirs.precondition_noise(sigmas[i])
        said = made.net(scaled, torch.full((6,), float(time)), cond)
        x = theirs.step(said, t, x).prev_sample
    found = solver(EDM(), lambda x, t: made(x, t, cond), start_theirs, sigmas)
    assert torch.allclose(found, x, atol=2e-4)


def vp_world(steps: int, scheduler: Any) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Our times for a variance-preserving scheduler's, and a guess of the clean sample."""
    scheduler.set_timesteps(steps)
    kept = scheduler.alphas_cumprod[scheduler.timesteps].double()
    times = VP().time(torch.cat([((1 - kept) / kept).sqrt(), torch.zeros(1, dtype=torch.float64)]))
    return times, torch.randn(6, 2, generator=stream(2, "x"), dtype=torch.float64), gaussian(VP())


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_ddim_gives_the_same_points(kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        clip_sample=False, prediction_type=kind, timestep_spacing="trailing", set_alpha_to_one=True
    )
    times, x, guess = vp_world(8, theirs)
    ours = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}[kind]
    y = x
    for t, own in zip(theirs.timesteps, times, strict=False):
        y = theirs.step(convert(VP(), guess(y, own), "x0", ours, y, own), t, y).prev_sample
    assert torch.allclose(ddim(VP(), guess, x, times), y, atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers with NumPy 2
def test_dpm_solver_gives_the_same_points() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        prediction_type="sample", algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing",
        final_sigmas_type="zero",
    )  # fmt: skip
    times, x, guess = vp_world(9, theirs)
    y = x
    for t, own in zip(theirs.timesteps, times, strict=False):
        y = theirs.step(guess(y, own), t, y).prev_sample
    assert torch.allclose(dpmpp(VP(), guess, x, times), y, atol=1e-4)


def test_flow_euler_gives_the_same_points() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=[0.9, 0.6, 0.3])
    sigmas = theirs.sigmas
    high = flow_grid(3, 3.0, 0.9)
    assert torch.allclose(RF().time(high).float(), sigmas.float(), atol=1e-6)  # the same shift, too
    guess, x = gaussian(RF()), torch.randn(6, 2, generator=stream(3, "x"))
    y = x
    for i, t in enumerate(theirs.timesteps):
        y = theirs.step(convert(RF(), guess(y, sigmas[i]), "x0", "flow", y, sigmas[i]), t, y).prev_sample
    assert torch.allclose(ddim(RF(), guess, x, sigmas), y, atol=1e-5)


def test_flow_heun_gives_the_same_points() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchHeunDiscreteScheduler()
    theirs.set_timesteps(5)
    guess, x = gaussian(RF()), torch.randn(6, 2, generator=stream(3, "x"))
    own = torch.cat([theirs.sigmas[:1], theirs.sigmas[1::2]]).clamp(max=1 - 1e-5)
    y = x
    for i, t in enumerate(theirs.timesteps):
        level = theirs.sigmas[i].clamp(max=1 - 1e-5)
        y = theirs.step(convert(RF(), guess(y, level), "x0", "flow", y, level), t, y).prev_sample
    assert torch.allclose(heun(RF(), guess, x, own), y, atol=1e-3)


def test_renoising_is_lcms_sampler() -> None:
    """With LCM's boundary skip pushed out of the way (a consistency model's own network has it)."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.LCMScheduler(prediction_type="sample", clip_sample=False, timestep_scaling=1e6)
    theirs.set_timesteps(4, original_inference_steps=50)
    kept = theirs.alphas_cumprod[theirs.timesteps].double()
    times = VP().time(torch.cat([((1 - kept) / kept).sqrt(), torch.zeros(1, dtype=torch.float64)])).float()
    guess, x = gaussian(VP()), torch.randn(6, 2, generator=stream(4, "x"))
    y, g = x, stream(5, "noise")
    for t, own in zip(theirs.timesteps, times, strict=False):
        y, clean = theirs.step(guess(y, own), t, y, generator=g, return_dict=False)
    assert torch.allclose(y, clean, atol=1e-4)
    assert torch.allclose(renoising(VP(), guess, x, times, stream(5, "noise")), y, atol=1e-4)


# ------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_sampler_calls_as_often_as_it_says(solver: Any, guidance: float, steps: int) -> None:
    made, z, cond = network()
    rows = 0

    def count(_: Any, args: Any) -> None:
        nonlocal rows
        rows += len(args[0])

    made.net.register_forward_pre_hook(count)
    sampler = Sampler(solver, steps, Guidance(guidance))
    x = sampler(made, z, cond)
    assert rows == 6 * sampler.calls
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_within_calls_never_spends_more(solver: Any, guidance: float) -> None:
    base = Sampler(solver, 18, Guidance(guidance))
    found = [base.within(calls).calls for calls in range(1, 40)]
    assert all(f <= max(c, base.guidance.calls) for c, f in enumerate(found, 1))
    assert found == sorted(found)
    assert all(c - f < 2 * base.guidance.calls for c, f in enumerate(found, 1))
    assert [Sampler().within(c).calls for c in (1, 2, 4, 9, 19, 35)] == [1, 2, 4, 9, 19, 35]


def test_it_starts_at_the_grids_first_ratio() -> None:
    assert float(Sampler(steps=5, high=20.0).ratios()[0]) == pytest.approx(20.0)
    assert float(Sampler(steps=5, grid="flow", high=20.0).ratios()[0]) == pytest.approx(20.0)
    z = torch.randn(3, 2)
    for schedule in SCHEDULES:
        t = schedule.time(torch.tensor(20.0))
        assert torch.allclose(start(schedule, z, t), shaped(schedule.alpha(t), z) * 20.0 * z, rtol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_ring_comes_out_whole_under_every_schedule(schedule: NoiseSchedule) -> None:
    teacher = ring()
    mixture: Any = teacher.net
    from atoll.diffusion.exact import exact_mixture

    made = exact_mixture(mixture.means, 0.15, mixture.labels, schedule)
    z, cond = torch.randn(800, 2, generator=stream(6, "z")), torch.arange(800) % 4
    for sampler in (Sampler("heun", 12), Sampler("dpmpp", 20), Sampler("ddim", 40, grid="flow")):
        x = sampler(made, z, cond)
        near = torch.cdist(x, mixture.means)
        assert float((near.min(1).values < 0.6).float().mean()) > 0.97
        assert torch.equal(mixture.labels[near.argmin(1)], cond)
        assert (torch.bincount(near.argmin(1), minlength=8) > 60).all()  # of 100


def test_few_steps_follow_their_grid_and_their_noise() -> None:
    ratios = few_step_ratios(4, 2.5)
    assert float(ratios[0]) == pytest.approx(2.5)
    assert torch.allclose(RF().time(ratios).diff(), torch.full((4,), -2.5 / 3.5 / 4, dtype=torch.float64))
    made, z, cond = network()
    first = few_steps(made, z, cond, ratios, stream(0, "n"))
    assert torch.equal(first, few_steps(made, z, cond, ratios, stream(0, "n")))
    assert not torch.equal(first, few_steps(made, z, cond, ratios, stream(1, "n")))
    one = few_steps(made, z, cond, few_step_ratios(1, 2.5), stream(0, "n"))
    assert torch.allclose(one, made(2.5 * z, torch.tensor(2.5), cond), atol=1e-6)
    assert not first.requires_grad
