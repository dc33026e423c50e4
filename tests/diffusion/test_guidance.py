"""Classifier-free guidance: one line, linear, and honest about its calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.core.streams import stream
from atoll.diffusion.cfg import cfg
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.exact import PlaneNet, ring
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.schedules import RF, convert


class Counting(nn.Module):
    """A plane network that counts the rows it sees, and the calls."""

    def __init__(self, numbers: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.rows, self.calls = PlaneNet(width=16, numbers=numbers), 0, 0

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, **more: Any) -> Tensor:
        self.rows, self.calls = self.rows + len(x), self.calls + 1
        out: Tensor = self.net(x, t, cond, **more)
        return out


def world(numbers: int = 0) -> tuple[Denoiser, Tensor, Tensor, Tensor]:
    g = stream(0, "guidance")
    t = torch.linspace(0.05, 0.9, 9)
    return Denoiser(Counting(numbers), RF(), "flow", classes=4), torch.randn(9, 2, generator=g), t, torch.arange(9) % 4


def test_one_and_zero_are_one_prediction_each_for_one_call() -> None:
    made, x, t, cond = world()
    net: Any = made.net
    for scale, asked in ((1.0, cond), (0.0, torch.full_like(cond, 4))):
        want = made(x, t, asked)
        net.rows = 0
        guidance = Guidance(scale)
        assert torch.equal(guidance(made, x, t, cond), want)
        assert net.rows == 9 * guidance.calls == 9
    net.rows, interval = 0, Guidance(1.0, low=0.2, high=2.0)
    assert torch.equal(interval(made, x, t, cond), made(x, t, cond))  # off is off, wherever it is
    assert interval.calls == 1
    assert net.rows == 18


@given(a=st.floats(-2, 6), b=st.floats(-2, 6), u=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_it_is_linear_in_its_scale_and_commutes_with_conversions(a: float, b: float, u: float) -> None:
    made, x, t, cond = world()
    with torch.no_grad():
        low, high = Guidance(a)(made, x, t, cond), Guidance(b)(made, x, t, cond)
        between = Guidance(u * a + (1 - u) * b)(made, x, t, cond)
        assert torch.allclose(between, u * low + (1 - u) * high, atol=2e-5)
        given_, null = made(x, t, cond), made(x, t, made.null(cond))
        assert torch.allclose(low, null + a * (given_ - null), atol=2e-5)
        for kind in ("eps", "v", "flow"):
            of_each = [made.predict(x, t, c, kind) for c in (made.null(cond), cond)]
            mixed = of_each[0] + a * (of_each[1] - of_each[0])
            assert torch.allclose(convert(RF(), low, "x0", kind, x, t), mixed, atol=1e-4, rtol=1e-4), kind


def test_both_predictions_are_one_batch() -> None:
    made, x, _t, cond = world()
    net: Any = made.net
    guidance = cfg(2.0)
    guidance(made, x, torch.tensor(0.5), cond)
    assert (net.calls, net.rows) == (1, 9 * guidance.calls) == (1, 18)
    assert torch.allclose(guidance(made, x, torch.tensor(0.5), cond), guidance(made, x, torch.full((9,), 0.5), cond))


def test_an_interval_guides_only_inside() -> None:
    made, x, t, cond = world()
    ratio = made.schedule.ratio(t)
    inside = (ratio >= 0.5) & (ratio <= 2.0)
    assert inside.any()
    assert not inside.all()
    found = cfg(3.0, low=0.5, high=2.0)(made, x, t, cond)
    assert torch.allclose(found[inside], cfg(3.0)(made, x, t, cond)[inside], atol=1e-6)
    assert torch.allclose(found[~inside], made(x, t, cond)[~inside], atol=1e-6)
    zero = Guidance(0.0, low=0.5)  # unconditional inside, conditional outside: two calls
    assert zero.calls == 2
    outside = ratio < 0.5
    assert torch.allclose(zero(made, x, t, cond)[outside], made(x, t, cond)[outside], atol=1e-6)


def test_further_inputs_of_the_network_go_along() -> None:
    made, x, t, cond = world(numbers=1)
    with torch.no_grad():
        for p in made.net.net.embed.numbers[-1].parameters():  # type: ignore[union-attr, index]
            p.normal_(generator=stream(1, "numbers"))
    numbers = torch.linspace(0, 1, 9)[:, None]
    found = cfg(2.0)(made, x, t, cond, numbers=numbers)
    given_, null = made(x, t, cond, numbers=numbers), made(x, t, made.null(cond), numbers=numbers)
    assert torch.allclose(found, 2 * given_ - null, atol=1e-5)
    assert not torch.allclose(found, cfg(2.0)(made, x, t, cond, numbers=1 - numbers), atol=1e-3)


def test_stronger_guidance_narrows_what_the_exact_teacher_makes() -> None:
    """Agreement with the class rises, spread within it falls."""
    from atoll.diffusion.solvers import Sampler

    teacher, n = ring(8, 4, std=0.5), 400
    z, cond = torch.randn(n, 2, generator=stream(2, "z")), torch.arange(n) % 4
    means = torch.stack([teacher.net.means[teacher.net.labels == c].mean(0) for c in range(4)])  # type: ignore[index, operator]
    agree, spread = [], []
    for scale in (0.0, 1.0, 2.0, 4.0):
        x = Sampler("heun", 12, Guidance(scale))(teacher, z, cond)
        agree.append(float((torch.cdist(x, means).argmin(1) == cond).float().mean()))
        spread.append(float(torch.stack([x[cond == c].var(0).sum() for c in range(4)]).mean()))
    assert agree[0] < 0.4 < 0.9 < agree[1] <= agree[2] <= agree[3]
    assert spread == sorted(spread, reverse=True)


def test_an_empty_interval_is_refused() -> None:
    with pytest.raises(AtollError, match="`low` below `high`; got 2 and 1"):
        Guidance(2.0, low=2, high=1)


def test_it_needs_a_null_condition() -> None:
    bare = Denoiser(nn.Identity(), RF(), "flow")
    with pytest.raises(AtollError, match="Guidance needs a null condition"):
        cfg(2.0)(bare, torch.zeros(1, 2), torch.tensor(0.5), torch.zeros(1, 3))
