"""Layers with passports: what they compute, and that they can be taken out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atoll.core.errors import AtollError
from atoll.models.passported import Passport, insert_passports, passports, without_passports
from atoll.privacy.passports import draw_passports_, unpredictable_uniform

G = torch.Generator().manual_seed(0)


def network(layers: int = 2, count: int = 3, drawn: bool = True) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(288, 8), nn.ReLU(), nn.Linear(8, 4)
    )
    insert_passports(net, torch.zeros(1, 1, 8, 8), layers, count)
    if drawn:
        with torch.no_grad():
            draw_passports_(net, 5, 7)
    return net


X = torch.randn(6, 1, 8, 8, generator=G)


def test_scales_and_shifts_by_the_papers_formula():
    """gamma = D(E(Avg(W s))), by hand from the weights."""
    guarded = network(count=1)[0]
    for kind, got in zip(("scale_passports", "shift_passports"), guarded.scale_and_shift(), strict=True):
        seen = F.conv2d(getattr(guarded, kind), guarded.layer.weight).mean((2, 3))[0]
        hidden = F.leaky_relu(guarded.encode.weight @ seen + guarded.encode.bias)
        assert hidden.shape == (2,)
        assert torch.allclose(got, guarded.decode.weight @ hidden + guarded.decode.bias, atol=1e-6)
    gamma, beta = guarded.scale_and_shift()
    h = F.batch_norm(guarded.layer(X), None, None, training=True)
    want = gamma[:, None, None] * h + beta[:, None, None]
    assert torch.allclose(guarded.train()(X), want, atol=1e-5)


def test_with_scale_one_and_shift_zero_it_is_the_plain_network(monkeypatch):
    net = network()
    monkeypatch.setattr(Passport, "scale_and_shift", lambda p, _=None: (torch.ones(8), torch.zeros(8)))
    plain = nn.Sequential(
        nn.Sequential(net[0].layer, nn.BatchNorm2d(8, affine=False)), net[1], net[2],
        nn.Sequential(net[3].layer, nn.BatchNorm1d(8, affine=False)), *net[4:],
    )  # fmt: skip
    for mode in (True, True, False):  # also the statistics must be the same, after two batches
        assert torch.allclose(net.train(mode)(X), plain.train(mode)(X), atol=1e-5)


def test_evaluation_is_deterministic_and_training_draws_one_of_the_passports():
    net = network(layers=1)
    assert torch.equal(net.eval()(X), net(X))
    torch.manual_seed(1)
    seen = {tuple(net.train()(X).detach().flatten().tolist()) for _ in range(30)}
    assert len(seen) == 3
    alone = network(layers=1, count=1)
    assert torch.allclose(alone.train()(X), alone(X))


def test_without_passports_it_computes_the_same_and_keeps_none():
    net = network()
    for _ in range(3):
        net.train()(X)
    out = without_passports(net)
    assert torch.allclose(out.eval()(X), net.eval()(X), atol=1e-5)
    assert not list(passports(out))
    assert len(list(passports(net))) == 2
    assert not any("passports" in n or "encode" in n for n in out.state_dict())


def test_weights_feel_the_loss_through_scales_too():
    """W, E and D train jointly: with its layer's output held still, W still gets a gradient."""
    guarded = network()[0]
    gamma, _ = guarded.scale_and_shift()
    grads = torch.autograd.grad(
        gamma.square().sum(), [guarded.layer.weight, guarded.encode.weight, guarded.decode.weight]
    )
    assert all(float(g.abs().max()) > 0 for g in grads)


def test_passports_have_unit_noise_around_one_mean_a_channel():
    net = nn.Sequential(nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    insert_passports(net, torch.zeros(1, 6, 8, 8), 1, 200)
    with torch.no_grad():
        draw_passports_(net, 3)
    s = net[0].scale_passports
    mean = s.mean((0, 2, 3))
    assert torch.allclose(mean, mean.round(), atol=0.05)
    assert set(mean.round().abs().tolist()) <= {1.0, 2.0, 3.0}
    assert torch.allclose(s.var((0, 2, 3)), torch.ones(6), atol=0.05)
    many = unpredictable_uniform(20_000)
    assert 0 < many.min() < 0.001
    assert 0.999 < many.max() < 1


def test_layers_are_those_that_an_input_meets_first():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(3, 2), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x))

    net = Backwards()
    assert insert_passports(net, torch.zeros(1, 5), 1, 2) == ("first",)
    assert net.training
    with pytest.raises(AtollError, match="before a network's last one"):
        insert_passports(nn.Linear(2, 2), torch.zeros(1, 2), 1, 1)
    words = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(AtollError, match="sees a sequence of 7 vectors"):
        insert_passports(words, torch.zeros(1, 7, dtype=torch.int64), 1, 1)
