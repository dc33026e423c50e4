"""The U-Net that denoises, and how it is told time, class and further numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.core.errors import DataError
from atoll.core.streams import stream
from atoll.data.dataset import Info
from atoll.diffusion.denoiser import Denoiser, tapped
from atoll.diffusion.gan_heads import Adversary
from atoll.diffusion.schedules import EDM
from atoll.models.dit import DiT
from atoll.models.model import build_model
from atoll.models.unet import ResBlock, TimeAndClass, UNet

CASES = [
    (UNet(width=8), (1, 8, 8)), (UNet(width=8, fold=1), (3, 13, 9)), (UNet(width=12, fold=3), (2, 9, 15)),
    (UNet(width=8, blocks=2), (3, 8, 12)), (DiT(dim=16, layers=2, heads=2), (1, 8, 8)),
    (DiT(patch=3, dim=16, layers=3, heads=4), (2, 9, 15)), (DiT(patch=1, dim=8, layers=1, heads=1), (3, 4, 5)),
]  # fmt: skip
EACH = pytest.mark.parametrize(("network", "shape"), CASES, ids=lambda c: repr(c)[:60])


def info(shape: tuple[int, ...]) -> Info:
    return Info(name="pictures", kind="image", shape=shape, num_classes=4)


def awake(network: Any, shape: tuple[int, ...]) -> nn.Module:
    """With random weights everywhere: a fresh one says nothing."""
    model = build_model(network, info(shape), 4, 0)
    g = stream(0, "awake")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return model


def inputs(shape: tuple[int, ...], n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = stream(1, "inputs")
    return torch.randn(n, *shape, generator=g), torch.randn(n, generator=g), torch.arange(n) % 5


@EACH
def test_a_fresh_network_says_nothing_and_keeps_the_shape(network: Any, shape: tuple[int, ...]) -> None:
    model = build_model(network, info(shape), 4, 0)
    x, t, cond = inputs(shape)
    assert torch.equal(model(x, t, cond), torch.zeros_like(x))
    preconditioned = Denoiser(model, EDM(), "edm", classes=4)
    s = torch.tensor(0.5)
    assert torch.allclose(preconditioned(x, s, cond), x / 2, atol=1e-6)  # so EDM starts at the skip


@EACH
def test_it_hears_time_class_and_every_pixel(network: Any, shape: tuple[int, ...]) -> None:
    model = awake(network, shape)
    x, t, cond = inputs(shape)
    changes = {"x": (x.flip(-1), t, cond), "t": (x, t + 0.3, cond), "class": (x, t, (cond + 1) % 5)}
    with torch.no_grad():
        base = model(x, t, cond)
        for what, changed in changes.items():
            assert float((model(*changed) - base).abs().flatten(1).max(1).values.min()) > 1e-4, what
    leaf = x.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(model(leaf, t, cond)[:, :, 0, 0].sum(), leaf)
    assert (found.abs().flatten(1).sum(1) > 0).all()
    if isinstance(network, DiT):
        assert (found != 0).all()  # attention sees it all


@EACH
def test_rows_do_not_see_each_other(network: Any, shape: tuple[int, ...]) -> None:
    model = awake(network, shape)
    x, t, cond = inputs(shape)
    together = model(x, t, cond)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], cond[i : i + 1]) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-4)


@EACH
def test_every_weight_learns(network: Any, shape: tuple[int, ...]) -> None:
    model = awake(network, shape)
    found = torch.autograd.grad(model(*inputs(shape)).square().sum(), list(model.parameters()))
    for (name, _), g in zip(model.named_parameters(), found, strict=True):
        assert float(g.abs().max()) > 0, name


@EACH
def test_its_taps_suit_discriminators(network: Any, shape: tuple[int, ...]) -> None:
    made = Denoiser(awake(network, shape), EDM(), "edm", classes=4)
    layers = Adversary().layers(made)
    x, t, cond = inputs(shape)
    with tapped(made, layers) as found:
        made(x, t.exp(), cond)
    assert set(found) == set(layers)
    assert all(f.dim() in (3, 4) and len(f) == 5 for f in found.values())


@pytest.mark.parametrize("network", [UNet(width=8, numbers=2), DiT(dim=16, layers=1, heads=2, numbers=2)], ids=repr)
def test_further_numbers_start_without_effect(network: Any) -> None:
    """So a copy of a network that was never told them begins as that network."""
    shape = (1, 8, 8)
    model: Any = awake(network, shape)
    for p in model.embed.numbers[-1].parameters():
        nn.init.zeros_(p)
    x, t, cond = inputs(shape)
    numbers = torch.rand(5, 2, generator=stream(2, "numbers"))
    assert torch.equal(model(x, t, cond, numbers=numbers), model(x, t, cond))
    nn.init.normal_(model.embed.numbers[-1].weight)
    told = model(x, t, cond, numbers=numbers)
    assert not torch.allclose(told, model(x, t, cond))
    assert not torch.allclose(told, model(x, t, cond, numbers=numbers.flip(1)))


def test_a_block_is_modulated_by_scale_and_shift() -> None:
    torch.manual_seed(0)
    block, g = ResBlock(8, 12, 16), stream(3, "block")
    x, e = torch.randn(2, 8, 5, 4, generator=g), torch.randn(2, 16, generator=g)
    assert torch.equal(block(x, e), block.short(x))  # its second convolution starts at zero
    nn.init.normal_(block.conv2.weight)
    scale, shift = block.film(e)[:, :12, None, None], block.film(e)[:, 12:, None, None]
    h = block.norm2(block.conv1(F.silu(block.norm1(x)))) * (1 + scale) + shift
    assert torch.allclose(block(x, e), block.short(x) + block.conv2(F.silu(h)), atol=1e-5)


def test_times_close_and_far_are_told_apart() -> None:
    embed = TimeAndClass(64, 4, 0)
    t = torch.cat([torch.linspace(-1.4, 1.0, 200), torch.tensor([0.0, 1.0])])  # of EDM: ln(sigma) / 4
    waves = embed.waves(t)
    assert waves.shape == (202, 64)
    distance = torch.cdist(waves[:200], waves[:200]) + 10 * torch.eye(200)
    assert float(distance.min()) > 0.05
    assert "frequencies" not in embed.state_dict()  # nothing that a site would have to send


def test_its_size_is_what_was_planned() -> None:
    model = UNet().build(Info(name="fashion", kind="image", shape=(1, 28, 28), num_classes=10), 10)
    assert 440_000 < sum(p.numel() for p in model.parameters()) < 520_000


@pytest.mark.parametrize(
    ("network", "shape", "sentence"),
    [
        (UNet(), (1, 9, 8), r"folds blocks of 2 x 2 pixels .* `pictures` has 9 x 8"),
        (UNet(fold=4), (1, 4, 4), r"folds blocks of 4 x 4"),
        (UNet(), (5,), r"unet takes images"),
        (DiT(), (1, 10, 8), r"patches of 4 x 4, which `pictures` with 10 x 8 pixels cannot be"),
        (DiT(dim=10, heads=4), (1, 8, 8), r"`dim` to be a multiple of `heads`; got 10 and 4"),
        (DiT(), (5,), r"dit takes images"),
    ],
)
def test_what_does_not_fit_is_said(network: Any, shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        network.build(info(shape), 4)
