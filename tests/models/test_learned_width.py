"""Narrow networks out of wide ones and back: shapes, the convolution by hand, and what the kernels start as."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from atoll.core.tree import named_tensors
from atoll.data.dataset import Info
from atoll.models.cnn import CNN
from atoll.models.learned_width import (
    AREA,
    Widths,
    compress,
    dilate,
    first_kernels,
    matrices,
    narrower,
    reached,
    tensor,
    widths,
)
from atoll.models.mlp import MLP

INFO = Info(name="digits", kind="image", shape=(1, 8, 8), num_classes=10)


def user() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 10), nn.Tanh(), nn.Linear(10, 4),
    )  # fmt: skip


NETWORKS = {
    "mlp": lambda: MLP(hidden=(20, 12)).build(INFO, 10),
    "cnn": lambda: CNN((6, 8), 14).build(INFO, 10),
    "user": user,
}


@pytest.fixture(params=itertools.product(NETWORKS, (0.75, 0.5)), ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Widths]:
    name, ratio = request.param
    torch.manual_seed(0)
    wide = NETWORKS[name]().eval()
    for n, b in wide.named_buffers():
        if n.endswith("running_var"):
            b.uniform_(0.5, 2)
    narrow = narrower(wide, ratio).eval()
    return wide, narrow, widths(wide, narrow)


def noisy(kernels: dict[str, Tensor]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in kernels.items()}


def test_every_tensor_has_the_shape_of_the_narrow_network_and_back(pair: tuple[nn.Module, nn.Module, Widths]) -> None:
    wide, narrow, w = pair
    big, small = named_tensors(wide), named_tensors(narrow)
    found = compress(noisy(first_kernels(w, mixing=True)), big, w, "identity")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in small.items()}
    back = dilate(noisy(first_kernels(w, mixing=False)), small, w)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in big.items()}
    layers = [m for m in wide.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    less = [m for m in narrow.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert less[0].weight.shape[1:] == layers[0].weight.shape[1:]  # the first layer loses outputs alone
    assert len(less[-1].weight) == len(layers[-1].weight)  # and the last one inputs
    assert all(len(a.weight) > len(b.weight) for a, b in zip(layers[:-1], less, strict=False))


def test_kernels_start_as_slicing_and_padding(pair: tuple[nn.Module, nn.Module, Widths]) -> None:
    wide, narrow, w = pair
    small = named_tensors(narrow)
    found = compress(first_kernels(w, mixing=True), named_tensors(wide), w, "identity")
    assert all(torch.allclose(found[n], t) for n, t in small.items())
    back = dilate(first_kernels(w, mixing=False), small, w)
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(functional_call(wide, back, (x,)), narrow(x), atol=1e-5)  # units of zeros add nothing
    reach = reached(first_kernels(w, mixing=False), small, w)
    for name in w.places:
        assert int(reach[name].sum()) == small[name].numel()
        assert not bool(back[name][reach[name] == 0].any())


def test_what_has_equal_shapes_passes_untouched(pair: tuple[nn.Module, nn.Module, Widths]) -> None:
    wide, _, w = pair
    big, last = named_tensors(wide), list(named_tensors(wide))[-1]
    assert compress(first_kernels(w, mixing=True), big, w, "leaky")[last] is big[last]
    same = widths(wide, narrower(wide, 1.0))
    assert first_kernels(same, mixing=True) == {}
    assert all(t is big[n] for n, t in compress({}, big, same, "leaky").items())


def test_gradients_reach_kernels_and_nothing_else(pair: tuple[nn.Module, nn.Module, Widths]) -> None:
    wide, narrow, w = pair
    kernels = {n: t.requires_grad_() for n, t in first_kernels(w, mixing=True).items()}
    made = compress(kernels, named_tensors(wide), w, "identity")
    x = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    functional_call(narrow, made, (x,)).square().sum().backward()
    for name, k in kernels.items():
        assert k.grad is not None, name
        if k.numel() > 1 and not name.endswith("length"):
            assert bool(k.grad.any()) or name.startswith(("0.", "1.")), name
    assert all(p.grad is None for p in wide.parameters())


def test_the_convolution_by_hand() -> None:
    """A convolution's weight [5, 4, 2, 1] becomes [3, 3, 2, 1]: kernels of 3 x 2, one for each of two places."""
    g = torch.Generator().manual_seed(4)
    w = Widths(
        {"c.weight": torch.Size((5, 4, 2, 1))}, {"c.weight": torch.Size((3, 3, 2, 1))}, {"c.weight": 2}, frozenset()
    )
    kernels = {n: torch.rand(t.shape, generator=g) for n, t in first_kernels(w, mixing=True).items()}
    assert kernels["c.weight:kernel"].shape == (2, 1, 3, 2)
    big = torch.randn(5, 4, 2, 1, generator=g)
    k = kernels["c.weight:kernel"][:, 0]
    k = torch.stack([kernels["c.weight:kernel.length"][s].item() * k[s] / k[s].square().sum().sqrt() for s in (0, 1)])
    mixed = [big[:, :, s, 0] + sum(kernels["c.weight:mix"][s, t] * big[:, :, t, 0] for t in (0, 1)) for s in (0, 1)]
    found = compress(kernels, {"c.weight": big}, w, "identity")["c.weight"]
    for s, o, i in itertools.product(range(2), range(3), range(3)):
        by_hand = sum(float(k[s, a, b] * mixed[s][o + a, i + b]) for a in range(3) for b in range(2))
        assert float(found[o, i, s, 0]) == pytest.approx(by_hand, abs=1e-5)
    small = torch.randn(3, 3, 2, 1, generator=g)
    back = dilate(kernels, {"c.weight": small}, w)["c.weight"]
    for s, o, i in itertools.product(range(2), range(5), range(4)):
        pairs = [(a, b) for a in range(3) for b in range(2) if 0 <= o - a < 3 and 0 <= i - b < 3]
        by_hand = sum(float(k[s, a, b] * small[o - a, i - b, s, 0]) for a, b in pairs)
        assert float(back[o, i, s, 0]) == pytest.approx(by_hand, abs=1e-5)


def test_columns_of_a_flattened_image_stay_with_their_place() -> None:
    t = torch.arange(24.0).view(2, 12)  # two outputs of three channels of four pixels
    m = matrices(t, 4)
    assert m.shape == (4, 2, 3)
    assert m[1].tolist() == [[1, 5, 9], [13, 17, 21]]
    assert torch.equal(tensor(m, t.shape), t)
    wide = CNN((6, 8), 14).build(INFO, 10)
    places = widths(wide, narrower(wide, 0.5)).places
    assert (places["conv2.weight"], places["dense1.weight"], places["dense2.weight"]) == (25, 4, 1)


def test_large_kernels_are_products_and_small_ones_are_not() -> None:
    wide = MLP(hidden=(80, 70)).build(INFO, 10)
    w = widths(wide, narrower(wide, 0.5))
    kernels = first_kernels(w, mixing=False)
    assert AREA < 41 * 36
    assert kernels["layers.1.weight:column"].shape == (1, 1, 36, 1)
    assert kernels["layers.1.weight:row"].shape == (1, 1, 1, 41)
    assert kernels["layers.0.weight:kernel"].shape == (1, 1, 41, 1)


def test_the_papers_activation() -> None:
    wide = MLP(hidden=(4,)).build(INFO, 10)
    w = widths(wide, narrower(wide, 0.5))
    plain, leaky = (
        compress(first_kernels(w, True), named_tensors(wide), w, a)["layers.0.weight"] for a in ("identity", "leaky")
    )
    assert torch.allclose(leaky, torch.where(plain > 0, 0.85 * plain, 0.001 * plain))
