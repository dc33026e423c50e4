"""Generator and critic losses against exact gradients in one dimension, where every score is known.

The student is ``x = mean + std z``; its fake score is exact, in closed form, and without graph to its parameters. Nodes
of a grid with exact second moments stand for ``z`` and the noise, so expectations of quadratics have no error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.core.build import find, names_in
from atoll.core.streams import stream
from atoll.diffusion import losses
from atoll.diffusion.denoiser import Denoiser, Predicts
from atoll.diffusion.exact import PlaneNet
from atoll.diffusion.losses import (
    DMDLoss,
    GeneratorLoss,
    Probe,
    SiDLoss,
    SIMLoss,
    denoising_loss,
    hidden,
    over_distance,
    pseudo_huber,
    training_loss,
)
from atoll.diffusion.rollouts import Sample, clean
from atoll.diffusion.schedules import EDM, RF, NoiseSchedule, Trig, add_noise

MEAN, STD = 0.5, 0.8  # the teacher's
NAMES = names_in(GeneratorLoss.package, GeneratorLoss)
LEVELS = [0.4, 2.0]


def nodes(n: int) -> Tensor:
    """Midpoint quantiles of a standard normal, scaled to unit variance; float64."""
    z = math.sqrt(2) * torch.erfinv(2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1)
    return z / z.square().mean().sqrt()


def posterior(x_t: Tensor, ratio: Tensor | float, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """E[x0 | x_t] where the data are N(mean, std^2)."""
    return mean + std**2 / (std**2 + ratio**2) * (x_t - mean)


def log_density(x_t: Tensor, ratio: float, mean: Tensor | float, std: Tensor | float) -> Tensor:
    variance = torch.as_tensor(std) ** 2 + ratio**2
    return -0.5 * (x_t - mean) ** 2 / variance - 0.5 * variance.log()


def world(theta: Tensor, ratio: float, n: int = 48) -> tuple[Sample, Probe]:
    """Student samples at all pairs of nodes, and both scores at one noise level, with graphs to ``theta`` through the
    samples alone."""
    z, eps = (v.reshape(-1, 1) for v in torch.meshgrid(nodes(n), nodes(n), indexing="ij"))
    x = theta[0] + theta[1] * z
    x_t, frozen = x + ratio * eps, theta.detach()
    real, fake = posterior(x_t, ratio, MEAN, STD), posterior(x_t, ratio, frozen[0], frozen[1])
    rho = (log_density(x_t, ratio, MEAN, STD) - log_density(x_t, ratio, frozen[0], frozen[1])).exp()[:, 0].detach()
    r = torch.full((len(x),), ratio, dtype=x.dtype)
    return clean(x, torch.zeros(len(x), dtype=torch.int64)), Probe(x_t, r, r, real, fake, rho)


def gradient(loss: GeneratorLoss, mean: float, std: float, ratio: float, n: int = 48) -> Tensor:
    theta = torch.tensor([mean, std], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(*world(theta, ratio, n)), theta)
    return found


@pytest.fixture
def unweighted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The theorems are about plain expectations."""
    monkeypatch.setattr(losses, "over_distance", lambda x, real: torch.ones(len(x), dtype=x.dtype))


def exact(of: Callable[[Tensor], Tensor], mean: float, std: float) -> Tensor:
    theta = torch.tensor([mean, std], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(of(theta), theta)
    return found


STARTS = [(-0.7, 0.3), (0.5, 1.5), (1.2, 0.8), (0.1, 0.9)]


@pytest.mark.usefixtures("unweighted")
@pytest.mark.parametrize("ratio", LEVELS)
@pytest.mark.parametrize(("mean", "std"), STARTS)
def test_dmds_gradient_is_that_of_the_kl_divergence(mean: float, std: float, ratio: float) -> None:
    """sigma^2 times the gradient of KL(student || teacher) of the noised laws."""

    def kl(theta: Tensor) -> Tensor:
        v, u = theta[1] ** 2 + ratio**2, STD**2 + ratio**2
        return 0.5 * (v / u - (v / u).log() + (theta[0] - MEAN) ** 2 / u - 1)

    assert torch.allclose(gradient(DMDLoss(), mean, std, ratio), ratio**2 * exact(kl, mean, std), atol=1e-9)


def score_distance(distance: Callable[[Tensor], Tensor], ratio: float, through_samples: bool, n: int) -> Any:
    """E d(D_r - D_f) over the student's noised samples, with a graph through the fake score (and the samples)."""

    def of(theta: Tensor) -> Tensor:
        z, eps = (v.reshape(-1, 1) for v in torch.meshgrid(nodes(n), nodes(n), indexing="ij"))
        x_t = theta[0] + theta[1] * z + ratio * eps
        x_t = x_t if through_samples else x_t.detach()
        return distance(posterior(x_t, ratio, MEAN, STD) - posterior(x_t, ratio, theta[0], theta[1])).mean()

    return of


@pytest.mark.usefixtures("unweighted")
@pytest.mark.parametrize("ratio", LEVELS)
@pytest.mark.parametrize(("mean", "std"), STARTS)
def test_the_score_gradient_theorem(mean: float, std: float, ratio: float) -> None:
    """Without the fake score's parameters in the graph, SIM has the gradient with them."""
    square = score_distance(torch.square, ratio, False, 48)
    assert torch.allclose(2 * gradient(SIMLoss("l2"), mean, std, ratio), exact(square, mean, std), atol=1e-9)
    huber = score_distance(lambda y: (y**2 + 0.3**2).sqrt() - 0.3, ratio, False, 300)
    found = gradient(SIMLoss("huber", c=0.3), mean, std, ratio, 300)
    assert torch.allclose(found, exact(huber, mean, std), atol=4e-3)


@pytest.mark.usefixtures("unweighted")
@pytest.mark.parametrize("ratio", LEVELS)
@pytest.mark.parametrize(("mean", "std"), STARTS)
def test_sid_of_one_half_is_half_the_fisher_divergences_gradient(mean: float, std: float, ratio: float) -> None:
    fisher = score_distance(torch.square, ratio, True, 48)
    assert torch.allclose(2 * gradient(SiDLoss(0.5), mean, std, ratio), exact(fisher, mean, std), atol=1e-9)


@given(seed=st.integers(0, 2**20), spread=st.floats(0.01, 30))
@settings(max_examples=30, deadline=None)
def test_sim_with_squares_is_sid_of_one(seed: int, spread: float) -> None:
    """In value and gradient, weights included, for any shape."""
    g = stream(seed, "sid")
    parts = [spread * torch.randn(4, 2, 3, generator=g) for _ in range(3)]
    found = []
    for loss in (SIMLoss("l2"), SiDLoss(1.0)):
        x, real, fake = (p.clone().requires_grad_(True) for p in parts)
        ones = torch.ones(4)
        value = loss(clean(x, ones), Probe(x, ones, ones, real, fake))
        found.append((value, *torch.autograd.grad(value, (x, real, fake))))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_pulls_towards_the_teacher_and_rests_there(name: str) -> None:
    loss: GeneratorLoss = find(GeneratorLoss.package, name, GeneratorLoss)()
    for ratio in LEVELS:
        assert float(gradient(loss, MEAN, STD, ratio).abs().max()) < 1e-6, "it moves a student that is right"
        for shift in (-0.8, 0.8):
            assert float(gradient(loss, MEAN + shift, STD, ratio)[0]) * shift > 0
        for factor in (0.4, 1.7):
            assert float(gradient(loss, MEAN, STD * factor, ratio)[1]) * (factor - 1) > 0


@pytest.mark.usefixtures("unweighted")
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_ends_at_the_teacher(name: str) -> None:
    """Without the weights: over a single number, 1 / |x - real| has no mean."""
    loss: GeneratorLoss = find(GeneratorLoss.package, name, GeneratorLoss)()
    theta = torch.tensor([-0.6, 1.4], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([theta], lr=0.05, betas=(0.0, 0.99))
    for step in range(150):
        optimiser.param_groups[0]["lr"] = 0.05 * (1 - step / 150)
        total = sum(loss(*world(theta, ratio, 12)) for ratio in LEVELS)
        (theta.grad,) = torch.autograd.grad(total, theta)  # type: ignore[arg-type]
        optimiser.step()
    assert theta.tolist() == pytest.approx([MEAN, STD], abs=0.03)


# ------------------------------------------------------------------------------------------- their parts


def test_dmds_gradient_is_the_weighted_difference() -> None:
    """To 1e-6, for an image-like shape; nothing reaches the scores."""
    g = stream(0, "dmd")
    x, real, fake = (torch.randn(5, 2, 3, 3, generator=g).requires_grad_(True) for _ in range(3))
    ones = torch.ones(5)
    loss = DMDLoss()(clean(x, ones), Probe(x.detach(), ones, ones, real, fake))
    found, *others = torch.autograd.grad(loss, (x, real, fake), allow_unused=True)
    w = torch.stack([1 / (x[i] - real[i]).abs().mean() for i in range(5)]).detach()
    assert torch.allclose(found, w[:, None, None, None] * (fake - real) / x.numel(), atol=1e-6)
    assert others == [None, None]
    (none,) = torch.autograd.grad(DMDLoss()(clean(x, ones), Probe(x, ones, ones, real, real)), x)
    assert torch.equal(none, torch.zeros_like(x))


def test_dmd_pulls_at_the_anchor_but_measures_at_the_sample() -> None:
    g = stream(1, "dmd")
    x, anchor = (torch.randn(4, 3, generator=g).requires_grad_(True) for _ in range(2))
    real, fake, ones = torch.randn(4, 3, generator=g), torch.randn(4, 3, generator=g), torch.ones(4)
    sample = Sample(x, anchor, ones, ones, ones.long())
    found, none = torch.autograd.grad(
        DMDLoss()(sample, Probe(anchor, ones, ones, real, fake)), (anchor, x), allow_unused=True
    )
    w = 1 / (x - real).abs().mean(1, keepdim=True)
    assert none is None
    assert torch.allclose(found, w * (fake - real) / 12, atol=1e-6)


def test_weights_are_bounded_and_carry_no_graph() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert not over_distance(x, x + 1).requires_grad
    assert over_distance(x, x + 2).tolist() == pytest.approx([0.5] * 3)
    assert over_distance(x, x).tolist() == pytest.approx([1e5] * 3)


@given(scale=st.floats(1e-4, 1e4), size=st.sampled_from([1, 2, 64, 784]))
@settings(max_examples=40, deadline=None)
def test_the_pseudo_huber_gradient_is_bounded(scale: float, size: int) -> None:
    """Per sample at most 1 / sqrt(size), whatever the scores' difference; nearly that where it is large."""
    g = stream(2, "huber")
    x, delta = torch.randn(4, size, generator=g, dtype=torch.float64).requires_grad_(True), scale * torch.randn(
        4, size, generator=g, dtype=torch.float64
    )  # fmt: skip
    fake, ones = torch.randn(4, size, generator=g, dtype=torch.float64), torch.ones(4)
    (found,) = torch.autograd.grad(SIMLoss()(clean(x, ones), Probe(x, ones, ones, fake + delta, fake)), x)
    norms, bound = 4 * found.norm(dim=1), size**-0.5
    assert (norms <= bound + 1e-9).all()
    large = delta.norm(dim=1) > 10 * 0.015 * size**0.5
    assert (norms[large] > 0.99 * bound).all()
    assert torch.allclose(found / norms[:, None], -delta / delta.norm(dim=1, keepdim=True) / 4, atol=1e-6)


@given(factor=st.floats(1.0, 1000.0))
@settings(max_examples=20, deadline=None)
def test_a_saturated_huber_loss_is_free_of_scale(factor: float) -> None:
    g = stream(3, "huber")
    x, fake, delta = (torch.randn(4, 2, 5, generator=g) for _ in range(3))
    ones = torch.ones(4)

    def value(loss: GeneratorLoss, times: float) -> float:
        return float(loss(clean(x, ones), Probe(x, ones, ones, fake + times * delta, fake)))

    assert value(SIMLoss(c=0.01), factor) == pytest.approx(value(SIMLoss(c=0.01), 1.0), rel=1e-3)


def test_huber_bends_where_it_says() -> None:
    x, ones = torch.zeros(1, 4, requires_grad=True), torch.ones(1)

    def slope(c: float | None, delta: float) -> float:
        real, fake = torch.full((1, 4), delta), torch.zeros(1, 4)
        (found,) = torch.autograd.grad(SIMLoss(c=c)(clean(x, ones), Probe(x, ones, ones, real, fake)), x)
        return float(found.norm()) * 2  # times sqrt(size)

    assert slope(1.0, 0.5) == pytest.approx(1 / math.sqrt(2))  # |delta| = 1 = c
    assert slope(None, 0.015) == pytest.approx(1 / math.sqrt(2))
    assert slope(1.0, 1e-4) == pytest.approx(2e-4, rel=1e-3)  # linear below


@given(value=st.floats(-50, 50))
@settings(max_examples=25, deadline=None)
def test_pseudo_huber_is_between_its_limits(value: float) -> None:
    a, b = torch.full((1, 9), value, dtype=torch.float64), torch.zeros(1, 9, dtype=torch.float64)
    norm = 3 * abs(value)
    for c, used in ((0.5, 0.5), (None, 0.00054 * 3)):
        found = float(pseudo_huber(a, b, c))
        assert found == pytest.approx(math.hypot(norm, used) - used, abs=1e-9)
        assert max(0.0, norm - used) - 1e-9 <= found <= norm + 1e-9


# ------------------------------------------------------------------------------------------- denoising


def test_edms_weight_is_the_papers() -> None:
    g = stream(4, "edm")
    guess, x0 = torch.randn(3, 2, 2, generator=g), torch.randn(3, 2, 2, generator=g)
    s, sd = torch.tensor([0.1, 1.0, 7.0]), 0.5
    weight = (s**2 + sd**2) / (s * sd) ** 2
    expected = weight * (guess - x0).square().mean((1, 2))
    assert torch.allclose(denoising_loss(guess, x0, s, sd), expected, rtol=1e-5)


@pytest.mark.parametrize("predicts", ["edm", "x0", "eps", "v", "flow"])
@pytest.mark.parametrize("schedule", [EDM(), RF(), Trig()], ids=repr)
def test_a_denoiser_that_knows_has_no_loss(predicts: Predicts, schedule: NoiseSchedule) -> None:
    """Whatever the network predicts, the target is the truth; and a network is asked once."""
    g = stream(5, "training")
    x0, eps, ratio = torch.randn(6, 2, generator=g), torch.randn(6, 2, generator=g), torch.logspace(-1, 1, 6)
    t, calls = schedule.time(ratio), []
    x_t = add_noise(schedule, x0, eps, t)
    a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    da, ds = schedule.d_alpha(t)[:, None], schedule.d_sigma(t)[:, None]
    truth = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": da * x0 + ds * eps}

    class Oracle(torch.nn.Module):
        def forward(self, x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
            calls.append(x)
            if predicts != "edm":
                return truth[predicts]
            r, sd = ratio[:, None], 0.5
            return (x0 - x_t / a * sd**2 / (r**2 + sd**2)) * (r**2 + sd**2).sqrt() / (r * sd)

    found = training_loss(Denoiser(Oracle(), schedule, predicts, classes=4), x0, torch.zeros(6).long(), ratio, eps)
    assert found.shape == (6,)
    assert float(found.max()) < 1e-6
    assert len(calls) == 1


def test_what_a_flow_learns_is_its_velocity() -> None:
    """The plain squared error of ``eps - x0``."""
    torch.manual_seed(0)
    made = Denoiser(PlaneNet(width=16), RF(), "flow", classes=4)
    g = stream(6, "flow")
    x0, eps, cond = torch.randn(5, 2, generator=g), torch.randn(5, 2, generator=g), torch.arange(5) % 4
    t = torch.linspace(0.1, 0.9, 5)
    said = made.net((1 - t)[:, None] * x0 + t[:, None] * eps, t, cond)
    expected = (said - (eps - x0)).square().mean(1)
    assert torch.allclose(training_loss(made, x0, cond, t / (1 - t), eps), expected, atol=1e-5)


def test_conditions_are_hidden_row_by_row() -> None:
    made = Denoiser(PlaneNet(width=16), EDM(), "edm", classes=4)
    hide = torch.tensor([True, False, True, False])
    assert hidden(made, torch.arange(4), hide).tolist() == [4, 1, 4, 3]
    embedded = Denoiser(PlaneNet(width=16), EDM(), "edm", null=torch.zeros(3))
    assert hidden(embedded, torch.ones(4, 3), hide).sum(1).tolist() == [0, 3, 0, 3]
