"""Gradient inversion: it works where nothing hides, and layers with passports keep it from working."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from atoll.core.tree import Tree
from atoll.models.passported import SECRET, insert_passports
from atoll.privacy.gradient_inversion import Inversion, gradient_distance, invert, reconstruction_error
from atoll.privacy.passports import draw_passports_


def network(guarded: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(384, 16), nn.Tanh(), nn.Linear(16, 10)
    )
    if guarded:
        insert_passports(net, torch.zeros(1, 1, 8, 8), 2, 1)
    return net.train()


def secrets_of(net: nn.Module, seed: int) -> Tree:
    with torch.no_grad():
        draw_passports_(net, 5, seed)
    return {n: b.clone() for n, b in net.named_buffers() if n.rpartition(".")[2] in SECRET}


def attack(net: nn.Module, x: Tensor, y: Tensor, truth: Tree, guess: Tree, optimise: bool) -> float:
    weights = [p for p in net.parameters() if p.requires_grad]

    def loss(secrets: Tree, x: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, secrets, (x,)), y)

    observed = torch.autograd.grad(loss(truth, x), weights)
    start = torch.rand(x.shape, generator=torch.Generator().manual_seed(5))
    names = tuple(guess) if optimise else ()
    knobs = Inversion(steps=150, lr=0.1, variation=1e-3)
    found = invert(loss, weights, observed, start, guess, names, knobs)
    return reconstruction_error(found.x, x)


@pytest.fixture(scope="module")
def errors(digits):  # type: ignore[no-untyped-def]
    """Mean squared error per pixel: nothing hidden; passports known, unknown, optimised; a random image."""
    x, y = (digits.ready(torch.arange(2))[c] for c in ("x", "y"))
    plain, guarded = network(False), network(True)
    truth, other = secrets_of(guarded, 1), secrets_of(guarded, 2)
    return {
        "plain": attack(plain, x, y, {}, {}, False),
        "known": attack(guarded, x, y, truth, truth, False),
        "unknown": attack(guarded, x, y, truth, other, False),
        "optimised": attack(guarded, x, y, truth, other, True),
        "nothing": reconstruction_error(torch.rand(x.shape, generator=torch.Generator().manual_seed(5)), x),
    }


def test_without_a_secret_the_rows_come_back(errors):
    assert errors["plain"] < 0.2 * errors["nothing"]


def test_passports_keep_the_rows_back_and_not_by_their_secrecy_alone(errors):
    """The attacker who knows them fails too: most of the effect is the normalisation that comes with them."""
    assert errors["unknown"] > 3 * errors["plain"]
    assert errors["optimised"] > 3 * errors["plain"]
    assert errors["known"] > 3 * errors["plain"]


def test_distances_by_hand():
    a, b = [torch.tensor([3.0]), torch.tensor([[4.0]])], [torch.tensor([0.0]), torch.tensor([[2.0]])]
    assert float(gradient_distance(a, b, "squared")) == 13.0
    assert float(gradient_distance(a, b, "cosine")) == pytest.approx(1 - 4 / 5)
    assert float(gradient_distance(a, [2 * t for t in a], "cosine")) == pytest.approx(0, abs=1e-6)


def test_errors_do_not_depend_on_the_order_of_rows():
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert reconstruction_error(x.flip(0), x) == 0
    assert reconstruction_error(torch.tensor([[0.0, 1.0]]), x) == 0.5
