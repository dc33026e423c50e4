"""Networks that lost their norms: the formula, any module, and back to ordinary convolutions."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from atoll.data.dataset import Info
from atoll.models.cnn import CNN
from atoll.models.norm_free import (
    RELU_GAIN,
    NormFree,
    bake_convolutions,
    standardise,
    standardise_convolutions,
    strip_norms,
)

IMAGE = Info(name="images", kind="image", shape=(1, 8, 8), num_classes=3)


class Block(nn.Module):
    """Nested, residual, with odd names: a norm called ``conv`` and a convolution called ``norm``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=2, bias=False)
        self.conv = nn.GroupNorm(2, channels)
        self.inner = nn.ModuleDict({"a": nn.Conv2d(channels, channels, (1, 3), padding=(0, 1)), "b": nn.ReLU()})

    def forward(self, x):  # type: ignore[no-untyped-def]
        return x + self.inner["b"](self.inner["a"](self.conv(self.norm(x))))


def network() -> nn.Module:
    """A user's module: plain, strided, grouped, dilated, depthwise and transposed convolutions, and four norms."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Block(8),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False), nn.InstanceNorm2d(8, affine=True),
        nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding_mode="reflect", padding=1), nn.BatchNorm2d(12)), nn.ReLU(),
        nn.ConvTranspose2d(12, 4, 2), nn.Flatten(), nn.LayerNorm(100), nn.Linear(100, 3),
    )  # fmt: skip


STANDARDISED = ("0", "3.norm", "3.inner.a", "6.0")
NORMS = ("1", "3.conv", "5", "6.1", "10")


def by_hand(weight: list[list[float]], gain: list[float], gamma: float) -> list[list[float]]:
    """The paper's formula, number by number in double precision."""
    out = []
    for row, g in zip(weight, gain, strict=True):
        mean = math.fsum(row) / len(row)
        std = math.sqrt(math.fsum((w - mean) ** 2 for w in row) / len(row))
        out.append([gamma * g * (w - mean) / (std * math.sqrt(len(row))) for w in row])
    return out


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 4), st.floats(0.01, 50), st.integers(0, 99))
def test_the_formula(outputs: int, inputs: int, size: int, scale: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = scale * (torch.randn(outputs, inputs, size, size, generator=g) + 3)
    gain = torch.rand(outputs, generator=g) + 0.5
    got = standardise(weight, gain, 1.7).flatten(1)
    assert torch.allclose(got, torch.tensor(by_hand(weight.flatten(1).tolist(), gain.tolist(), 1.7)), atol=1e-4)
    assert float(got.mean(1).abs().max()) < 1e-5
    assert torch.allclose(got.norm(dim=1), 1.7 * gain, rtol=1e-5)


def test_the_gain_keeps_the_variance_of_a_layer_through_relu() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert pytest.approx((1 / 2 - 1 / (2 * math.pi)) ** -0.5) == RELU_GAIN  # second moment less the mean's square
    assert pytest.approx(1.7139588594436646, rel=1e-3) == RELU_GAIN  # the estimate in the papers' code
    assert float((RELU_GAIN * x.relu()).std()) == pytest.approx(1.0, abs=0.01)
    w = torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(1))
    out = torch.nn.functional.conv2d(
        x[: 32 * 60 * 60].view(1, 32, 60, 60).relu(), standardise(w, torch.ones(64), RELU_GAIN)
    )
    assert float(out.var()) == pytest.approx(1.0, abs=0.05)


def test_a_constant_row_stays_finite_with_its_gradient() -> None:
    w = torch.full((2, 9), 3.0).view(2, 1, 3, 3).requires_grad_()
    standardise(w, torch.ones(2), 1.0).square().sum().backward()
    assert bool(torch.isfinite(w.grad).all())


def test_every_norm_goes_and_the_right_convolutions_are_standardised() -> None:
    model = network()
    raw = {n: model.get_submodule(n).weight.detach().clone() for n in STANDARDISED}
    kept = {n: model.get_submodule(n).weight.detach().clone() for n in ("4", "8", "11")}
    assert strip_norms(model) == NORMS
    assert standardise_convolutions(model) == STANDARDISED
    assert (strip_norms(model), standardise_convolutions(model)) == ((), ())  # a second time there is nothing to do
    for name in STANDARDISED:
        layer = model.get_submodule(name)
        rows = raw[name].flatten(1).double()
        want = (
            RELU_GAIN
            * (rows - rows.mean(1, keepdim=True))
            / (rows.std(1, correction=0, keepdim=True) * rows.shape[1] ** 0.5)
        )
        assert torch.allclose(layer.weight.flatten(1).double(), want, atol=1e-5), name
        assert layer.bias is not None, name
        assert torch.equal(layer.parametrizations.weight.original, raw[name])  # what is trained and averaged
    for name, weight in kept.items():
        assert torch.equal(model.get_submodule(name).weight, weight), name
    assert not any("running" in n or "num_batches" in n for n in model.state_dict())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {f"{n}.parametrizations.weight.0.gain" for n in STANDARDISED} <= trained


def test_no_example_looks_at_another() -> None:
    model = network()
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(model.train()(x)[:1], model(x[:1].expand(2, -1, -1, -1))[:1], atol=1e-3)  # with norms
    strip_norms(model)
    standardise_convolutions(model)
    together = model.train()(x)
    for i in range(6):
        assert torch.allclose(model(x[i : i + 1])[0], together[i], atol=1e-5)


def test_baked_models_have_ordinary_convolutions_and_the_same_outputs() -> None:
    model = network()
    strip_norms(model)
    standardise_convolutions(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    live, twin = model.eval()(x), copy.deepcopy(model)
    assert bake_convolutions(model) == STANDARDISED
    assert torch.equal(model(x), live)
    assert torch.equal(twin(x), live)  # a copy is still standardised
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    assert all(type(m) is nn.Conv2d for m in model.modules() if isinstance(m, nn.Conv2d))
    plain = network()
    strip_norms(plain)
    plain.load_state_dict(model.state_dict())  # all names, nothing else
    assert torch.equal(plain.eval()(x), live)


def test_frozen_layers_stay_frozen_and_weights_that_are_parametrised_stay_theirs() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[0].requires_grad_(False)
    nn.utils.parametrizations.weight_norm(model[3])
    strip_norms(model)
    assert standardise_convolutions(model) == ("0", "2")
    assert not any(p.requires_grad for p in model[0].parameters())
    assert bake_convolutions(model) == ("0", "2")
    assert parametrize.is_parametrized(model[3])


def test_without_a_convolution_norms_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 1, groups=4))
    assert strip_norms(model) == ()
    assert standardise_convolutions(model) == ()
    assert isinstance(model[1], nn.LayerNorm)


def test_as_a_builder() -> None:
    plain = CNN(channels=(4, 8), dense=16, norm="batch")
    model = NormFree(plain).build(IMAGE, 3)
    assert set(model.state_dict()) == set(replace(plain, norm="none").build(IMAGE, 3).state_dict())
    assert NormFree(plain) == NormFree(replace(plain))
