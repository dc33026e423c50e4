from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.diffusion import tangent
from atoll.diffusion.denoiser import Denoiser, viewed
from atoll.diffusion.schedules import Trig
from atoll.diffusion.tangent import differences, jvp_tangent


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(2, 3 * 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        q, k, v = self.inward(x.reshape(len(x), 4, 2) * t.cos()[:, None, None])[:, None].chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).flatten(1)


class OneWay(torch.autograd.Function):
    """Sine, without a rule for forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences are not used."""

    def never(*_: Any) -> Any:
        raise AssertionError("not exact")

    monkeypatch.setattr(tangent, "differences", never)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.booleans())
def test_of_a_known_function_it_is_the_derivative(seed: int, exact: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, dx = torch.randn(2, 4, 3, generator=generator)
    t, dt = torch.randn(2, 4, generator=generator)
    value, found = jvp_tangent(lambda x, t: (x * t[:, None]).sin(), (x, t), (dx, dt), exact)
    assert torch.equal(value, (x * t[:, None]).sin())
    expected = (x * t[:, None]).cos() * (dx * t[:, None] + x * dt[:, None])
    assert torch.allclose(found, expected, atol=1e-5 if exact else 2e-3, rtol=1e-5 if exact else 2e-3)


@pytest.mark.usefixtures("exactly")
def test_of_a_denoiser_it_agrees_with_differences_to_a_hundredth(digit_teacher: Denoiser) -> None:
    x, trig = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), Trig()
    t, cond = torch.linspace(0.1, 1.5, 6), torch.arange(6)
    student = viewed(digit_teacher, trig)

    def said(x: Tensor, t: Tensor) -> Tensor:
        return student(x, t, cond)

    value, exact = jvp_tangent(said, (x, t), (x.roll(1, 0), t.cos() * t.sin()))
    again, rough = differences(said, (x, t), (x.roll(1, 0), t.cos() * t.sin()))
    assert torch.allclose(value, again, atol=1e-6)
    assert not exact.requires_grad
    assert (exact - rough).norm() < 0.01 * exact.norm()
    assert exact.norm() > 1


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_has_one_and_it_is_computed_in_float32(dtype: torch.dtype) -> None:
    net, (x, dx) = Attention(), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    t = torch.rand(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        value, exact = jvp_tangent(net, (x, t), (dx, t))
    assert value.dtype == exact.dtype == torch.float32
    with torch.no_grad():
        _, rough = differences(net, (x, t), (dx, t))
    assert (exact - rough).norm() < 2e-3 * exact.norm()


def test_a_part_without_a_rule_is_differenced() -> None:
    x = torch.randn(5, 2)
    value, found = jvp_tangent(lambda x, t: OneWay.apply(x), (x, x[:, 0]), (torch.ones_like(x), x[:, 0]))
    assert torch.equal(value, x.sin())
    assert torch.allclose(found, x.cos(), atol=1e-4)


def test_what_is_wrong_with_the_function_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="must match"):
        jvp_tangent(lambda x, t: x + torch.zeros(7), (torch.zeros(5), torch.zeros(5)), (torch.ones(5), torch.ones(5)))


@pytest.mark.parametrize("exact", [True, False])
def test_dropout_is_that_of_the_next_call(exact: bool) -> None:
    x = torch.rand(4, 50) + 1
    torch.manual_seed(3)
    value, found = jvp_tangent(lambda x, t: F.dropout(x, 0.5), (x, x[:, 0]), (torch.ones_like(x), x[:, 0]), exact)
    assert torch.equal(value, F.dropout(x, 0.5))
    assert torch.equal(found.round(), 2.0 * (value != 0))
