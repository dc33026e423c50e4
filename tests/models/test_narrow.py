"""Which units can be taken out of a network, and that nothing changes when they said nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atoll.models.cnn import CNN
from atoll.models.export import about_model, load_model, save_model
from atoll.models.mlp import MLP
from atoll.models.narrow import Units, narrowed, remove_units, units_of


class Own(nn.Module):
    """A user's network: functions instead of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.b = nn.Conv2d(5, 4, 3)
        self.c = nn.Linear(16, 6)
        self.d = nn.Linear(6, 10)

    def forward(self, x):  # type: ignore[no-untyped-def]
        x = F.gelu(self.norm(self.a(x)))
        x = F.avg_pool2d(torch.sigmoid(self.b(x)), 2)
        return self.d(F.dropout(F.silu(self.c(torch.flatten(x, 1))), 0.1, training=self.training))


NETWORKS = {
    "mlp": lambda info: MLP((12, 8)).build(info, 10),
    "cnn": lambda info: CNN(channels=(4, 6), dense=9, norm="batch").build(info, 10),
    "own": lambda info: Own(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_without_silenced_units_a_network_computes_the_same(name, digits):  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = NETWORKS[name](digits.info)
    for m in model.modules():  # statistics and scales that are not those of a fresh norm
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.running_mean, m.running_var, m.weight.data, m.bias.data):
                t.copy_(torch.rand(t.shape, generator=g) + 0.5)
    x = digits.ready(torch.arange(40))["x"]
    before = model.eval()(x)
    small, masked, removed = copy.deepcopy(model), copy.deepcopy(model), 0
    found = units_of(model)
    assert len(found) == {"mlp": 2, "cnn": 3, "own": 3}[name]
    for units in found:
        n = len(dict(model.named_parameters())[f"{units.layer}.weight"])
        keep = torch.rand(n, generator=g) < 0.6
        keep[0] = True
        removed += int((~keep).sum())
        for part in units.parts({n: p.data for n, p in masked.named_parameters()}):
            part[~keep] = 0.0
        remove_units(small, units, keep)
    assert removed > 3
    dense = masked.eval()(x)
    assert not torch.allclose(dense, before, atol=1e-3)
    assert torch.allclose(small.eval()(x), dense, atol=1e-5)
    counts = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert counts[0] < 0.8 * counts[1]


def seq(*layers):  # type: ignore[no-untyped-def]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.c(self.a(x) + self.b(x).relu())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.b(self.a(self.a(x)))


class Branches(nn.Module):
    def forward(self, x):  # type: ignore[no-untyped-def]
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    "model",
    [
        Residual(), Twice(), Branches(), nn.Linear(3, 2), seq(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
        seq(nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 2)), seq(nn.Linear(4, 4), nn.MaxPool1d(3, 1, 1), nn.Linear(4, 2)),
        seq(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)), seq(nn.Conv2d(2, 4, 1), nn.Linear(4, 2)),
        seq(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)),
    ],
    ids=["residual", "twice", "branches", "one", "norm", "softmax", "pool", "grouped", "columns", "group_norm"],
)  # fmt: skip
def test_units_that_meet_others_stay(model):
    assert units_of(model) == []


def test_shared_weights_keep_a_layer_as_it_is():
    model = seq(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    assert units_of(model) == []


def test_a_unit_knows_all_its_entries():
    model = seq(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    (units,) = units_of(model)
    assert units == Units("0", ("1",), (("3", 4),))
    tree = {n: torch.zeros_like(p.data) for n, p in model.named_parameters()}
    units.set_(tree, torch.tensor([False, True, False]), True)
    assert {n: int(t.sum()) for n, t in tree.items()} == {
        "0.weight": 4, "0.bias": 1, "1.weight": 1, "1.bias": 1, "3.weight": 8, "3.bias": 0,
    }  # fmt: skip
    assert tree["3.weight"][:, 4:8].all()
    assert units.entries(tree).sum(1).tolist() == [0, 15, 0]


def test_a_narrow_network_is_saved_and_loaded(tmp_path, digits):  # type: ignore[no-untyped-def]
    network = CNN(channels=(4, 6), dense=9)
    model = network.build(digits.info, 10)
    for units, n in zip(units_of(model), (4, 6, 9), strict=True):
        remove_units(model, units, torch.arange(n) >= 2)
    builder = narrowed(network, model)
    assert dict(zip(builder.layers, builder.widths, strict=True)) == {"conv1": 2, "conv2": 4, "dense1": 7}
    save_model(model, tmp_path, about_model(builder, digits.info, 10, 0))
    x = digits.ready(torch.arange(5))["x"]
    assert torch.equal(load_model(tmp_path)(x), model.eval()(x))
