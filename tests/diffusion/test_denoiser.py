"""One network, seen as a function to clean samples, under every schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.core.streams import stream
from atoll.diffusion.denoiser import Denoiser, Predicts, tapped, viewed
from atoll.diffusion.exact import exact_mixture, ring
from atoll.diffusion.schedules import EDM, RF, VP, NoiseSchedule, Trig, add_noise, convert

RATIOS = torch.logspace(-2, 1.5, 12)
SCHEDULES = [EDM(), RF(), Trig(), VP()]


class Wavy(nn.Module):
    """A network that says something different for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        out: Tensor = self.outer(torch.tanh(self.inner(x) + t[:, None].sin() + cond[:, None]))
        return out


def world(ratios: Tensor = RATIOS, schedule: NoiseSchedule = EDM()) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy points, their times, and classes."""
    g, n = stream(0, "denoiser"), len(ratios)
    x0, eps = 0.5 * torch.randn(n, 3, generator=g), torch.randn(n, 3, generator=g)
    t = schedule.time(ratios)
    return add_noise(schedule, x0, eps, t), t, torch.arange(n) % 4


def net() -> nn.Module:
    torch.manual_seed(0)
    return Wavy()


def test_preconditioning_is_edms() -> None:
    """Table 1 of Karras et al. (2022), written out."""
    made, (x, s, cond) = Denoiser(net(), EDM(), "edm", classes=4, sigma_data=0.7), world()
    col, total = s[:, None], s[:, None] ** 2 + 0.7**2
    said = made.net(x / total.sqrt(), s.log() / 4, cond)
    assert torch.allclose(made(x, s, cond), 0.49 / total * x + col * 0.7 / total.sqrt() * said, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("predicts", ["edm", "flow", "v", "eps"])
def test_without_noise_it_changes_nothing(schedule: NoiseSchedule, predicts: Predicts) -> None:
    if isinstance(schedule, VP) and predicts == "flow":
        pytest.skip("VP's velocity is infinite at 0")
    x, _, cond = world()
    assert torch.allclose(Denoiser(net(), schedule, predicts, classes=4)(x, torch.tensor(0.0), cond), x, atol=1e-6)


@pytest.mark.parametrize("own", SCHEDULES, ids=repr)
@pytest.mark.parametrize("other", SCHEDULES, ids=repr)
def test_one_network_says_the_same_under_every_schedule(own: NoiseSchedule, other: NoiseSchedule) -> None:
    made = Denoiser(net(), own, "edm", classes=4)
    ratios = RATIOS[RATIOS < 12]  # beyond, float32 times of a flow lose digits
    x, t, cond = world(ratios, own)
    there = other.time(ratios)
    factor = other.alpha(there) / own.alpha(t)  # the same point, in the other's scale
    assert torch.allclose(viewed(made, other)(x * factor[:, None], there, cond), made(x, t, cond), atol=1e-5)
    native = Denoiser(made.net, other, "edm", classes=4)  # preconditioning sees the ratio alone
    assert torch.allclose(native(x * factor[:, None], there, cond), made(x, t, cond), atol=1e-5)


def test_a_view_of_its_own_schedule_is_itself_and_views_share_weights() -> None:
    made = Denoiser(net(), EDM(), "edm", classes=4)
    assert viewed(made, EDM()) is made
    seen = viewed(made, RF())
    assert {id(p) for p in seen.parameters()} == {id(p) for p in made.parameters()}
    assert torch.equal(seen.null(torch.arange(4)), torch.full((4,), 4))
    x, t, cond = world(RATIOS[:6], VP())
    assert torch.allclose(viewed(seen, VP())(x, t, cond), viewed(made, VP())(x, t, cond), atol=1e-5)  # views compose


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("predicts", ["edm", "x0", "eps", "v", "flow"])
@pytest.mark.parametrize("want", ["x0", "eps", "v", "flow"])
def test_predictions_agree_with_the_clean_sample(schedule: NoiseSchedule, predicts: Predicts, want: str) -> None:
    made = Denoiser(net(), schedule, predicts, classes=4, time_scale=3.0)
    x, t, cond = world(RATIOS[4:8], schedule)
    direct, around = made.predict(x, t, cond, want), convert(schedule, made(x, t, cond), "x0", want, x, t)
    assert torch.allclose(direct, around, atol=1e-4, rtol=1e-4)
    if want == predicts:
        assert torch.equal(direct, made.net(x, 3.0 * t, cond))


def test_a_time_may_be_one_for_all() -> None:
    made, (x, _, cond) = Denoiser(net(), RF(), "flow", classes=4), world()
    assert torch.equal(made(x, torch.tensor(0.3), cond), made(x, torch.full((len(x),), 0.3), cond))


def test_it_speaks_float32_whatever_the_network_computes_in() -> None:
    made = Denoiser(net(), EDM(), "edm", classes=4)
    x, t, cond = world()
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x, t, cond)
    assert out.dtype == torch.float32
    assert torch.allclose(out, made(x, t, cond), atol=0.05)
    assert not torch.equal(out, made(x, t, cond))
    flow = Denoiser(made.net, RF(), "flow", classes=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert flow.predict(x, t.clamp(max=0.9), cond, "flow").dtype == torch.float32


def test_conditions_may_be_embeddings() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return x + cond.mean(1)

    null, cond = torch.zeros(5, 3), torch.randn(2, 5, 3)
    made = Denoiser(Reads(), EDM(), "edm", null=null)
    assert torch.equal(made.null(cond), torch.zeros(2, 5, 3))
    assert "null_embedding" in made.state_dict()
    bare = Denoiser(Reads(), EDM(), "edm")
    with pytest.raises(AtollError, match="null condition, and this model has none"):
        bare.null(cond)


def test_taps_give_what_blocks_return_and_go_away() -> None:
    made = Denoiser(net(), EDM(), "edm", classes=4)
    x, t, cond = world()
    with tapped(made, ["net.inner"]) as found:
        made(x, t, cond)
        assert found["net.inner"].shape == x.shape
        found.clear()
        made(x, t, cond)
        assert "net.inner" in found
    found.clear()
    made(x, t, cond)
    assert not found
    with pytest.raises(AtollError, match=r"no module `net\.middle`; its blocks are: net, net\.inner"), tapped(
        made, ["net.middle"]
    ):  # fmt: skip
        pass
    with pytest.raises(ZeroDivisionError), tapped(made, ["net.inner"]) as found:
        raise ZeroDivisionError
    made(x, t, cond)
    assert not found


# ------------------------------------------------------------------------------------------- the exact teacher


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_exact_teacher_is_tweedies_formula(schedule: NoiseSchedule) -> None:
    """(x_t + sigma^2 score) / alpha, with the score by automatic differentiation of the density."""
    means = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [0.0, -1.0]])
    made = exact_mixture(means, 0.2, torch.tensor([0, 0, 1]), schedule)
    exact: Any = made.net
    ratio = torch.tensor([0.1, 0.5, 1.0, 3.0, 8.0, 0.5])
    t, cond = schedule.time(ratio), torch.tensor([0, 1, 2, 0, 1, 2])
    x = torch.randn(6, 2, generator=stream(0, "exact")) * schedule.ratio(t)[:, None] * schedule.alpha(t)[:, None]
    x.requires_grad_(True)
    (score,) = torch.autograd.grad(exact.log_density(x, t, cond).sum(), x)
    a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    assert torch.allclose(made(x, t, cond), (x + s**2 * score) / a, atol=2e-4)


def test_the_exact_teachers_density_is_that_of_its_samples() -> None:
    teacher: Any = ring()
    x, y = teacher.net.draw(4000, stream(0, "ring"))
    assert x.shape == (4000, 2)
    assert torch.bincount(y).tolist() == pytest.approx([1000] * 4, abs=120)
    grid = torch.linspace(-4, 4, 121)
    plane = torch.cartesian_prod(grid, grid)
    t = torch.full((len(plane),), 0.3)
    density = teacher.net.log_density(plane, t, torch.full((len(plane),), 4)).exp()
    assert float(density.sum() * (8 / 120) ** 2) == pytest.approx(1.0, abs=1e-3)
    noisy = x + 0.3 * torch.randn(4000, 2, generator=stream(1, "ring"))
    inside = (plane.norm(dim=1) < 2).float()
    expected = float((density * inside).sum() / density.sum())
    assert float((noisy.norm(dim=1) < 2).float().mean()) == pytest.approx(expected, abs=0.03)
