"""A table of noise levels as a schedule: the library's own numbers at its steps, smooth and invertible between them."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.core.errors import DataError
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.discrete_vp import DiscreteVP, UniformSteps
from atoll.diffusion.schedules import add_noise, step_between

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
LINEAR = DiscreteVP.of((1 - BETAS).cumprod(0))
COARSE = DiscreteVP((0.1, 0.3, 2.0, 9.0))
EITHER = st.sampled_from([LINEAR, COARSE])


def test_steps_are_those_of_the_library():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import DDPMScheduler
    theirs = DDPMScheduler(beta_start=1e-4, beta_end=0.02, num_train_timesteps=1000)
    x, eps, k = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 1, 500, 998, 999])
    ours = add_noise(LINEAR, x, eps, (k + 1) / 1000)
    assert torch.allclose(ours, theirs.add_noise(x, eps, k), rtol=1e-4, atol=1e-5)


@given(EITHER, st.integers(0, 10**5).map(lambda i: i / 1e5), st.integers(0, 10**5).map(lambda i: i / 1e5))
@settings(max_examples=60, deadline=None)
def test_the_ratio_grows_and_can_be_turned_around(schedule, a, b):
    t = torch.tensor([a, b], dtype=torch.float64)
    ratio = schedule.ratio(t)
    assert torch.allclose(schedule.time(ratio), t, atol=1e-9)
    assert (a < b) == bool(ratio[0] < ratio[1])
    assert torch.allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones(2).double())
    assert torch.allclose(schedule.sigma(t) / schedule.alpha(t), ratio)


@given(EITHER, st.floats(0.0, 0.999))
@settings(max_examples=60, deadline=None)
def test_slopes_are_the_derivatives(schedule, at):
    t = torch.tensor(at + 1e-4, dtype=torch.float64, requires_grad=True)
    for value, slope in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)):
        (grad,) = torch.autograd.grad(value(t), t)
        assert torch.allclose(grad, slope(t.detach()), rtol=1e-6, atol=1e-9)
    ratio = schedule.ratio(t.detach()).requires_grad_(True)
    (inverse,) = torch.autograd.grad(schedule.time(ratio), ratio)
    there = t.detach().requires_grad_(True)
    (forward,) = torch.autograd.grad(schedule.ratio(there), there)
    assert torch.allclose(inverse * forward, torch.ones(()).double(), rtol=1e-5)


def test_its_ends():
    zero, one = torch.zeros(()), torch.ones(())
    assert (COARSE.alpha(zero), COARSE.sigma(zero)) == (1, 0)
    assert COARSE.time(zero) == 0
    assert float(COARSE.ratio(one)) == pytest.approx(9.0)
    assert COARSE.time(torch.tensor(80.0)) == 1, "as noisy as it gets"
    assert float(COARSE.ratio(torch.tensor(0.125))) == pytest.approx(0.05), "half of the first step"
    assert float(COARSE.ratio(torch.tensor(0.875))) == pytest.approx(18**0.5), "half way in the logarithm"
    none_left = DiscreteVP.of([0.9, 0.5, 0.0])
    assert 1e4 < none_left.ratios[-1] < float("inf")
    a, b = step_between(LINEAR, torch.tensor(0.0), torch.tensor(0.7))
    assert torch.allclose(a, LINEAR.alpha(torch.tensor(0.7)))
    assert torch.allclose(b, LINEAR.sigma(torch.tensor(0.7)))


def test_it_is_a_value():
    again = DiscreteVP.of((1 - BETAS).cumprod(0))
    assert again == LINEAR
    assert hash(again) == hash(LINEAR)
    assert again != COARSE
    half = LINEAR.ratio(torch.tensor(0.5, dtype=torch.float32))
    assert half.dtype == torch.float32


def test_every_step_is_drawn_alike():
    drawn = UniformSteps(COARSE).draw(4000, torch.Generator().manual_seed(0))
    values, counts = drawn.unique(return_counts=True)
    assert torch.allclose(values, torch.tensor([0.1, 0.3, 2.0, 9.0]))
    assert int(counts.min()) > 900


@pytest.mark.parametrize("wrong", [(), (1.0,), (1.0, 1.0), (2.0, 1.0), (0.0, 1.0)])
def test_tables_that_are_none_are_refused(wrong):
    with pytest.raises(DataError, match="each larger"):
        DiscreteVP(wrong)


def test_a_network_of_noise_is_exact_for_gaussian_data():
    """Data N(0, s^2): the noise that is to be expected is known, and so is the clean sample."""
    s = 0.5

    class Exact(torch.nn.Module):
        def forward(self, x, t, cond):
            a, b = LINEAR.alpha(t / 1000)[:, None], LINEAR.sigma(t / 1000)[:, None]
            return x * b / (a**2 * s**2 + b**2)

    model = Denoiser(Exact(), LINEAR, "eps", time_scale=1000)
    x, t = torch.randn(6, 2), torch.tensor([0.001, 0.01, 0.2, 0.5, 0.8, 0.9])
    a, b = LINEAR.alpha(t)[:, None], LINEAR.sigma(t)[:, None]
    assert torch.allclose(model(x, t, torch.zeros(6).long()), x * a * s**2 / (a**2 * s**2 + b**2), atol=2e-3)
