"""Losses of f-divergences against integrals of Gaussians, where every quantity is known in closed form.

Expectations over noise are Gauss-Hermite sums, so "within Monte-Carlo error" is six digits here.
"""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atoll.diffusion.f_divergences import WEIGHTS, Divergence, LevelMean, Weight, slope, weight_of, weights
from atoll.diffusion.losses import (
    DMDLoss,
    FDistillLoss,
    Probe,
    SiDLoss,
    SIMLoss,
    UniLoss,
    f_divergence_loss,
)
from atoll.diffusion.rollouts import clean
from atoll.diffusion.schedules import EDM, RF, VP, NoiseSchedule

NAMES = get_args(Divergence)
GENERATORS: dict[str, Weight] = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "pearson": lambda r: (r - 1) ** 2,
    "js": lambda r: 0.5 * (r * r.log() - (1 + r) * ((1 + r) / 2).log()),
}
RATIO = 0.8
DATA = (0.3, 0.5)  # mean and standard deviation of the data's Gaussian


def normal(x: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    variance = torch.as_tensor(variance, dtype=torch.float64)
    return torch.exp(-0.5 * (x - mean) ** 2 / variance) / (2 * math.pi * variance).sqrt()


def theta() -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the student's Gaussian: a wide one, so that no power of rho diverges."""
    return (
        torch.tensor(-0.1, dtype=torch.float64, requires_grad=True),
        torch.tensor(0.9, dtype=torch.float64, requires_grad=True),
    )


def divergence(f: Weight, m: Tensor, s: Tensor, ratio: float) -> Tensor:
    """D_f(data || student) of the laws at one noise level, by integration."""
    x = torch.linspace(-14, 14, 20001, dtype=torch.float64)
    q = normal(x, m, s**2 + ratio**2)
    rho = normal(x, DATA[0], DATA[1] ** 2 + ratio**2) / q
    return (q * f(rho)).sum() * (x[1] - x[0])


def fisher(h: Weight, m: Tensor, s: Tensor, ratio: float) -> Tensor:
    """E_student[H(rho) |D_r - D_f|^2] by integration; its gradient is the true one, through everything."""
    x = torch.linspace(-14, 14, 20001, dtype=torch.float64)
    p_variance, q_variance = DATA[1] ** 2 + ratio**2, s**2 + ratio**2
    q = normal(x, m, q_variance)
    rho = normal(x, DATA[0], p_variance) / q
    real = DATA[0] + DATA[1] ** 2 / p_variance * (x - DATA[0])
    fake = m + s**2 / q_variance * (x - m)
    return (q * h(rho) * (real - fake) ** 2).sum() * (x[1] - x[0])


def sampled(m: Tensor, s: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Probe, Tensor]:
    """All pairs of Gauss-Hermite nodes: student samples ``[B, 1]``, what frozen exact networks say of them at a time of
    the schedule, and the weights ``[B]``."""
    nodes, masses = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(60))
    masses = masses / masses.sum()
    z, eps = torch.cartesian_prod(nodes, nodes).unbind(1)
    x = (m + s * z)[:, None]
    t = schedule.time(torch.tensor(RATIO, dtype=torch.float64)).expand(len(z))
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    x_t = alpha * x + sigma * eps[:, None]

    def network(mean: Tensor | float, std: Tensor | float) -> Tensor:
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x_t - alpha * mean)

    m0, s0 = m.detach(), s.detach()
    y = (x_t / alpha)[:, 0].detach()
    rho = normal(y, DATA[0], DATA[1] ** 2 + RATIO**2) / normal(y, m0, s0**2 + RATIO**2)
    ratio = torch.full_like(rho, RATIO)
    return x, Probe(x_t, t, ratio, network(*DATA), network(m0, s0), rho), torch.outer(masses, masses).flatten()


def gradient(value: Tensor, *parameters: Tensor) -> Tensor:
    return torch.stack(torch.autograd.grad(value, parameters, retain_graph=True))


# ------------------------------------------------------------------------------------------- H


@pytest.mark.parametrize("name", NAMES)
def test_h_is_that_of_the_divergence(name: str) -> None:
    """From f by differentiation, and from the change of the divergence itself along noise levels."""
    rho = torch.logspace(-1, 1, 9, dtype=torch.float64)
    assert torch.allclose(WEIGHTS[name](rho), weight_of(GENERATORS[name])(rho))

    m, s = theta()
    step = 1e-3
    later, sooner = (divergence(GENERATORS[name], m, s, RATIO + d) for d in (step, -step))
    change = (later - sooner) / (2 * step)
    rate = -RATIO * fisher(WEIGHTS[name], m, s, RATIO) / RATIO**4  # half of d(sigma^2), and scores for clean guesses
    assert torch.allclose(change, rate, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_table(name: str) -> None:
    rho = torch.tensor([0.2, 1.0, 4.0], dtype=torch.float64)
    c = {
        "reverse_kl": 1 + 0 * rho, "forward_kl": 0 * rho, "jeffreys": 1 + 0 * rho, "pearson": -2 * rho**2,
        "js": rho**2 / (2 * (1 + rho) ** 2),
    }[name]  # fmt: skip
    found = weights(WEIGHTS[name], rho)
    assert torch.allclose(found.c, c)
    near = 1e-6 * rho
    both = weights(WEIGHTS[name], rho + near), weights(WEIGHTS[name], rho - near)
    assert torch.allclose(found.dh, (both[0].h - both[1].h) / (2e-6), atol=1e-6)
    assert torch.allclose(found.dc, (both[0].c - both[1].c) / (2e-6), atol=1e-6)


def test_f_distills_weight_is_h() -> None:
    """The closed forms of its paper's table, with twice the Jensen-Shannon divergence there."""
    rho = torch.linspace(0.2, 5, 7)
    theirs = {"reverse_kl": rho**0, "forward_kl": rho, "jeffreys": rho + 1, "js": rho / (1 + rho) / 2}
    for name, h in theirs.items():
        assert torch.allclose(FDistillLoss(name).weight(rho), h)  # type: ignore[arg-type]
        assert torch.equal(FDistillLoss(name).weight(rho), UniLoss(name).weight(rho))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("schedule", [EDM(), RF(), VP()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_the_true_objective(name: str, schedule: NoiseSchedule) -> None:
    m, s = theta()
    x, probe, mass = sampled(m, s, schedule)
    assert probe.rho is not None
    loss = (mass * f_divergence_loss(WEIGHTS[name], x, probe, probe.rho)).sum()
    true = gradient(fisher(WEIGHTS[name], m, s, RATIO), m, s)
    assert torch.allclose(gradient(loss, m, s), true, rtol=1e-5)

    m, s = theta()
    x, probe, mass = sampled(m, s, schedule)
    without = (mass * f_divergence_loss(WEIGHTS[name], x, probe, probe.rho, 0 * mass)).sum()  # type: ignore[arg-type]
    right = torch.allclose(gradient(without, m, s), true, rtol=1e-2)
    assert right == (name == "reverse_kl")  # the others' weights move with the student


def test_any_divergence_given_by_its_generator() -> None:
    """Squared Hellinger, which the list does not have, through the loss itself."""

    class Hellinger(UniLoss):
        def h(self, rho: Tensor) -> Tensor:
            return weight_of(lambda r: 2 * (1 - r.sqrt()))(rho)

    m, s = theta()
    x, probe, mass = sampled(m, s, EDM())
    probe = dataclasses.replace(probe, real=probe.real, usual=1 / (len(mass) * mass))  # quadrature for the mean
    even = 1 / (x - probe.real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    probe = dataclasses.replace(probe, usual=probe.usual * even)  # type: ignore[operator]  # and no weights of SiD
    loss = Hellinger(clip=1e9, correction=math.inf)(clean(x, torch.zeros(len(x))), probe)
    h = weight_of(lambda r: 2 * (1 - r.sqrt()))
    assert torch.allclose(h(torch.tensor(4.0)), torch.tensor(1.0))  # sqrt(rho) / 2
    assert torch.allclose(gradient(loss, m, s), gradient(fisher(h, m, s, RATIO), m, s), rtol=1e-5)


def test_more_numbers_than_one_are_summed_in_the_ratio() -> None:
    """Two independent coordinates: the density ratio is of both together, so inner products are sums."""
    h = WEIGHTS["jeffreys"]
    nodes, masses = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(20))
    masses = masses / masses.sum()
    z1, z2, e1, e2 = torch.cartesian_prod(nodes, nodes, nodes, nodes).unbind(1)
    mass = torch.cartesian_prod(masses, masses, masses, masses).prod(1)
    m = torch.tensor([0.0, -0.2], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([0.8, 0.7], dtype=torch.float64, requires_grad=True)
    mean = torch.tensor(DATA[0], dtype=torch.float64)
    p, q0 = DATA[1] ** 2 + RATIO**2, (s**2 + RATIO**2).detach()

    x = m + s * torch.stack([z1, z2], 1)
    x_t = x + RATIO * torch.stack([e1, e2], 1)
    real, fake = mean + DATA[1] ** 2 / p * (x_t - mean), m.detach() + s.detach() ** 2 / q0 * (x_t - m.detach())
    y = x_t.detach()
    rho = (normal(y, mean, p) / normal(y, m.detach(), q0)).prod(1)
    ratio = torch.full_like(rho, RATIO)
    loss = (mass * f_divergence_loss(h, x, Probe(x_t, ratio, ratio, real, fake, rho), rho)).sum()

    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    q = s**2 + RATIO**2
    density = normal(points, m, q).prod(1)
    exact_rho = normal(points, mean, p).prod(1) / density
    delta = mean + DATA[1] ** 2 / p * (points - mean) - m - s**2 / q * (points - m)
    true = (density * h(exact_rho) * delta.square().sum(1)).sum() * (axis[1] - axis[0]) ** 2
    ours, theirs = (torch.cat(torch.autograd.grad(v, (m, s))) for v in (loss, true))
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_f_distills_gradient_is_that_of_the_divergence(name: str) -> None:
    m, s = theta()
    x, probe, mass = sampled(m, s, EDM())
    even = 1 / (x - probe.real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    probe = dataclasses.replace(probe, usual=even / (len(mass) * mass))
    loss = FDistillLoss(name, clip=1e9)(clean(x, torch.zeros(len(x))), probe)  # type: ignore[arg-type]
    true = gradient(divergence(GENERATORS[name], m, s, RATIO), m, s) * RATIO**2  # scores for clean guesses
    assert torch.allclose(gradient(loss, m, s), true, rtol=1e-5)


# ------------------------------------------------------------------------------------------- identities of the family


def some(seed: int = 0, n: int = 6, dims: int = 3) -> tuple[Tensor, Probe]:
    """Random answers of two networks that depend on the sample."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dims, generator=g, dtype=torch.float64).requires_grad_(True)
    a, b = torch.randn(2, dims, dims, generator=g, dtype=torch.float64)
    x_t = x + torch.randn(n, dims, generator=g, dtype=torch.float64)
    ratio = torch.rand(n, generator=g, dtype=torch.float64) + 0.2
    rho = (torch.randn(n, generator=g, dtype=torch.float64) * 2).exp()
    return x, Probe(x_t, ratio, ratio, (x_t @ a).tanh(), (x_t @ b).tanh(), rho)


@given(st.integers(0, 1000))
def test_reverse_kl_is_twice_sid_at_a_half(seed: int) -> None:
    x, probe = some(seed)
    sample = clean(x, torch.zeros(len(x)))
    ours, sid = UniLoss("reverse_kl")(sample, probe), SiDLoss(0.5)(sample, probe)
    assert torch.allclose(ours, 2 * sid)
    assert torch.allclose(gradient(ours, x), 2 * gradient(sid, x))
    for f in NAMES:  # without a ratio, each is the reverse KL
        assert torch.equal(UniLoss(f)(sample, dataclasses.replace(probe, rho=None)), ours)
        assert torch.equal(
            FDistillLoss(f)(sample, dataclasses.replace(probe, rho=None)), DMDLoss()(sample, probe)
        )  # fmt: skip
    assert torch.equal(FDistillLoss("reverse_kl")(sample, probe), DMDLoss()(sample, probe))


@given(st.integers(0, 1000))
def test_sim_with_the_squared_distance_is_sid_at_one(seed: int) -> None:
    x, probe = some(seed)
    sample = clean(x, torch.zeros(len(x)))
    sim, sid = SIMLoss("l2")(sample, probe), SiDLoss(1.0)(sample, probe)
    assert torch.allclose(sim, sid)
    assert torch.allclose(gradient(sim, x), gradient(sid, x))


@given(st.integers(0, 1000))
def test_the_forward_kl_has_no_squared_term(seed: int) -> None:
    """Its loss does not change when the real guess moves at right angles to ``fake - x``."""
    x, probe = some(seed)
    assert probe.rho is not None
    along = probe.fake - x
    sideways = torch.linalg.cross(along, torch.ones_like(along))
    moved = dataclasses.replace(probe, real=probe.real + sideways)

    def change(name: str) -> Tensor:
        h = WEIGHTS[name]
        a, b = (f_divergence_loss(h, x, p, probe.rho, 0 * p.ratio) for p in (moved, probe))  # type: ignore[arg-type]
        return (a - b).detach().abs()

    assert float(change("forward_kl").max()) < 1e-9
    assert float(change("jeffreys").max()) > 1e-3


@given(st.sampled_from(NAMES), st.floats(0, allow_infinity=True), st.sampled_from([UniLoss, FDistillLoss]))
def test_losses_are_finite_whatever_the_ratio(name: Divergence, rho: float, kind: type) -> None:
    x, probe = some()
    probe = dataclasses.replace(probe, rho=torch.full((len(x),), rho, dtype=torch.float64))
    loss = kind(name)
    value = loss(clean(x, torch.zeros(len(x))), probe)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient(value, x)).all()
    least, most = (float(loss.h(torch.tensor(r))) for r in (0.1, 10.0))
    assert least * 0.999 <= float(loss.weight(probe.rho).max()) <= most * 1.001


def test_a_clipped_ratio_does_not_move_with_the_student() -> None:
    x, probe = some()
    high = dataclasses.replace(probe, rho=torch.full((len(x),), 100.0, dtype=torch.float64))
    sample = clean(x, torch.zeros(len(x)))
    assert torch.equal(UniLoss("pearson")(sample, high), UniLoss("pearson", correction=0)(sample, high))
    inside = dataclasses.replace(probe, rho=torch.full((len(x),), 2.0, dtype=torch.float64))
    assert not torch.equal(UniLoss("pearson")(sample, inside), UniLoss("pearson", correction=0)(sample, inside))


@given(st.sampled_from(NAMES), st.floats(0.2, 5.0), st.floats(1, 1e4))
def test_a_wrong_ratio_does_not_turn_the_pull_round(name: Divergence, rho: float, far: float) -> None:
    """Samples far off, which a head that has learnt nothing takes for likely: they are drawn to the data all the same.
    (Both networks' guesses are held, so what is left is the pull on the sample itself.)"""
    assert (pulled(UniLoss(name), rho, far) >= 0).all()


def pulled(loss: UniLoss, rho: float, far: float) -> Tensor:
    x = torch.full((1, 2), far, requires_grad=True)
    ratio = torch.full((1,), 0.1)
    probe = Probe(x.detach(), ratio, ratio, torch.zeros(1, 2), x.detach() * 0.9, torch.full((1,), rho))
    return gradient(loss(clean(x, torch.zeros(1)), probe), x)


def test_the_whole_correction_runs_away_where_the_ratio_is_wrong() -> None:
    """Why it is bounded: seen on the ring, where a run with JS left for infinity."""
    assert (pulled(UniLoss("js", correction=math.inf), 1.0, 5.0) < 0).all()
    assert (pulled(UniLoss("js"), 1.0, 5.0) >= 0).all()


def test_slopes_of_constants_are_zero() -> None:
    rho = torch.tensor([1.0, 2.0])
    with torch.no_grad():
        assert torch.equal(slope(torch.ones_like)(rho), torch.zeros(2))


# ------------------------------------------------------------------------------------------- means by noise level


def test_every_level_has_a_mean_of_its_own() -> None:
    levels = LevelMean(bins=4, low=0.1, high=10.0, decay=0.9)
    low, high = torch.tensor([0.01, 0.05]), torch.tensor([20.0])
    got = levels(torch.cat([low, high]), torch.tensor([1.0, 3.0, 8.0]))
    assert got.tolist() == [2.0, 2.0, 8.0]  # the first look is the mean
    got = levels(low, torch.tensor([4.0, 4.0]))
    assert got.tolist() == [3.0, 3.0]  # the second has half the weight
    for _ in range(200):
        got = levels(low, torch.tensor([7.0, 9.0]))
    assert torch.allclose(got, torch.tensor(8.0))
    assert levels(high, torch.tensor([8.0])).tolist() == [8.0]
    levels(high, torch.tensor([0.0]))
    before = levels.mean.clone()
    levels(high, torch.tensor([18.0]))
    assert torch.isclose(levels.mean[-1] - before[-1], (18 - before[-1]) / levels.looks[-1])
    assert len(levels.state_dict()) == 2
    assert not list(levels.parameters())


@given(st.floats(1e-6, 1e6), st.floats(0, 1e6))
def test_means_by_level_are_positive_for_any_ratio(ratio: float, weight: float) -> None:
    levels = LevelMean()
    got = levels(torch.tensor([ratio]), torch.tensor([weight]))
    assert float(got) == pytest.approx(max(weight, 1e-6), rel=1e-5)
