"""Visits side by side: the same bits as alone, whoever the company is."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.data.dataset import Dataset, Federation, SiteData
from atoll.federated.local.dense import Layers
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.training import Training
from atoll.federated.local.vectorised import GROUP, train_together
from atoll.federated.method import Split
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.fedprox import fedprox
from atoll.federated.share.parameters import Parameters
from atoll.federated.worker import Worker
from atoll.models.mlp import MLP
from atoll.tasks.classification import Classification

LR = 0.1
Data = dict[str, Tensor]


def draw(sizes: tuple[int, ...], rows: int, seed: int) -> tuple[Layers, Data]:
    g = torch.Generator().manual_seed(seed)
    layers = [
        (torch.randn(o, i, generator=g) / i**0.5, torch.randn(o, generator=g)) for i, o in itertools.pairwise(sizes)
    ]
    x = torch.randn(rows, sizes[0], generator=g)
    return layers, {"x": x, "y": torch.randint(0, sizes[-1], (rows,), generator=g)}


def batches(data: Data, size: int, epochs: int) -> Iterator[Data]:
    for _ in range(epochs):
        for x, y in zip(data["x"].split(size), data["y"].split(size), strict=True):
            yield {"x": x, "y": y}


def trained(sites: list[tuple[Layers, Data]], size: int, epochs: int) -> list[list[Tensor]]:
    networks = [[(w.clone(), b.clone()) for w, b in layers] for layers, _ in sites]
    train_together(networks, [batches(d, size, epochs) for _, d in sites], LR)
    return [[t for layer in network for t in layer] for network in networks]


def by_autograd(layers: Layers, data: Data, size: int, epochs: int) -> list[Tensor]:
    params = [t.clone().requires_grad_() for layer in layers for t in layer]
    for batch in batches(data, size, epochs):
        x = batch["x"]
        for i in range(0, len(params), 2):
            x = F.linear(x if i == 0 else x.relu(), params[i], params[i + 1])
        grads = torch.autograd.grad(F.cross_entropy(x, batch["y"]), params)
        params = [(p - LR * g).detach().requires_grad_() for p, g in zip(params, grads, strict=True)]
    return [p.detach() for p in params]


widths = st.lists(st.integers(2, 70), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    widths=widths,
    classes=st.integers(2, 11),
    size=st.sampled_from([2, 3, 10, 32, 64]),
    rows=st.lists(st.integers(1, 130), min_size=2, max_size=8),
    epochs=st.integers(1, 2),
    seed=st.integers(0, 10**6),
)
def test_company_does_not_change_a_bit(
    widths: list[int], classes: int, size: int, rows: list[int], epochs: int, seed: int
) -> None:
    sites = [draw((*widths, classes), n, seed + i) for i, n in enumerate(rows)]
    alone = [trained([site], size, epochs)[0] for site in sites]
    order = random.Random(seed).sample(range(len(sites)), random.Random(seed).randint(2, len(sites)))
    for i, got in zip(order, trained([sites[i] for i in order], size, epochs), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, alone[i], strict=True))


@pytest.mark.parametrize("sizes", [(784, 10), (64, 32, 10), (30, 16, 2), (7, 5, 3)])
def test_equal_and_unequal_batches_of_every_length_keep_their_bits(sizes: tuple[int, ...]) -> None:
    for rows in (1, 2, 3, 5, 8, 13, 17, 31, 32, 33, 63):
        sites = [draw(sizes, rows, seed) for seed in range(5)]
        alone = [trained([site], 32, 1)[0] for site in sites]
        for got, expected in zip(trained(sites, 32, 1), alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), rows


@settings(max_examples=15, deadline=None)
@given(widths=widths, rows=st.lists(st.integers(1, 70), min_size=2, max_size=4), seed=st.integers(0, 100))
def test_each_network_is_trained_on_its_own_rows(widths: list[int], rows: list[int], seed: int) -> None:
    sites = [draw((*widths, 4), n, seed + i) for i, n in enumerate(rows)]
    for (layers, data), got in zip(sites, trained(sites, 32, 2), strict=True):
        for a, b in zip(got, by_autograd(layers, data, 32, 2), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.fixture
def group_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many visits went together, call by call."""
    seen: list[int] = []
    original = LocalSGD.run_many

    def spy(self, visits):  # type: ignore[no-untyped-def]
        seen.append(len(visits))
        return original(self, visits)

    monkeypatch.setattr(LocalSGD, "run_many", spy)
    return seen


class PrivateHead(Parameters):
    """The last layer stays at its site."""

    def split(self, model):  # type: ignore[no-untyped-def]
        names = super().split(model).shared
        return Split(shared=names[:2], private=names[2:])


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_run_with_groups_equals_a_run_without(run, group_sizes, monkeypatch, private, epochs) -> None:  # type: ignore[no-untyped-def]
    method = fedavg(Training(batch_size=16, epochs=epochs))
    method = method.but(share=PrivateHead()) if private else method
    grouped = run(method, rounds=3)[-1]
    assert group_sizes == [5, 5, 5]
    monkeypatch.setattr(Worker, "together", lambda self, job, others: 0)
    alone = run(method, rounds=3)[-1]
    assert group_sizes == [5, 5, 5]
    for name, t in alone.engine.state.replica["weights"].items():
        assert torch.equal(t, grouped.engine.state.replica["weights"][name])
    assert alone.engine.evaluate_sites() == grouped.engine.evaluate_sites()
    assert (alone.time, alone.flops) == (grouped.time, grouped.flops)


def test_a_site_that_fails_does_not_take_its_neighbours_along(
    run, digits_federation: Federation, group_sizes: list[int]
) -> None:  # type: ignore[no-untyped-def]
    clean = run(fedavg(), rounds=1)[-1]
    bad = digits_federation.sites[2].train
    y = bad.column("y").clone()
    y[0] = 10**6
    broken = Dataset({"x": bad.column("x"), "y": y}, bad.info)
    sites = list(digits_federation.sites)
    sites[2] = replace(sites[2], train=broken)
    row = run(fedavg(), rounds=1, federation=replace(digits_federation, sites=tuple(sites)))[-1]
    assert list(row.refused) == [2]
    assert row.replies == clean.replies - 1
    assert row.up_bytes == {s: n for s, n in clean.up_bytes.items() if s != 2}


@pytest.mark.parametrize(
    "method",
    [
        fedavg(Training(step="stock")),
        fedavg(Training(batch_size=1)),
        fedavg(Training(momentum=0.9)),
        fedavg(Training(clip_norm=1.0)),
        fedavg(Training(optimizer="adam")),
        fedprox(0.1),
    ],
)
def test_other_work_is_done_one_by_one(run, group_sizes: list[int], method) -> None:  # type: ignore[no-untyped-def]
    run(method, rounds=1)
    assert group_sizes == []


def test_large_or_narrow_models_and_several_threads_go_one_by_one(run, digits: Dataset, group_sizes: list[int]) -> None:  # type: ignore[no-untyped-def]
    run(fedavg(), rounds=1, task=Classification(digits.info, MLP((200,))))
    run(fedavg(), rounds=1, threads=2)
    run(fedavg(), rounds=1, task=Classification(digits.info, MLP((1,))))
    assert group_sizes == []


def test_a_group_has_a_greatest_size(digits: Dataset, digits_task: Classification, run, group_sizes) -> None:  # type: ignore[no-untyped-def]
    empty = digits.select([])
    sites = tuple(SiteData(digits.select(range(9 * i, 9 * i + 9)), empty, empty) for i in range(GROUP + 3))
    run(fedavg(), rounds=1, federation=Federation(sites, digits.select(range(20)), info=digits.info))
    assert group_sizes == [GROUP, 3]
