"""Bristle: which rows of which peers count how much, and what travels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sklearn.metrics import f1_score

from atoll.core.message import Message
from atoll.core.tree import equal, named_tensors
from atoll.federated.combine.vouched_rows import Judge, VouchedRows, f1_per_class, prioritise, weights
from atoll.federated.combine.weighted_mean import WeightedMean
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.saying_classes import SayingClasses
from atoll.federated.local.training import Training
from atoll.federated.method import MergeContext, Reply
from atoll.federated.methods.bristle import bristle
from atoll.federated.simulate.attacks import Hostile, RandomNoise

ALL = torch.ones(4, dtype=torch.bool)


def some(*classes):
    known = torch.zeros(4, dtype=torch.bool)
    known[list(classes)] = True
    return known


def test_equal_peers_count_their_certainty_and_useless_ones_nothing():
    f1 = torch.tensor([0.9, 0.8, 0.7, 0.6])
    certainty = f1.mean() - f1.std(correction=0)
    torch.testing.assert_close(weights(f1, f1, ALL, ALL), certainty.expand(4))
    assert (weights(f1, torch.zeros(4), ALL, ALL) == 0).all()
    assert (weights(torch.zeros(4), torch.zeros(4), ALL, ALL) == 0).all()


def test_the_weight_of_a_row_by_hand():
    own, peer = torch.tensor([0.5, 0.9, 0.4, 0.0]), torch.tensor([0.8, 0.5, 0.4, 0.0])
    got = weights(own, peer, some(0, 1, 2), some(0, 1, 2))
    certainty = peer[:3].mean() - peer[:3].std(correction=0)
    better = 10 / (1 + torch.exp(torch.tensor(-(3.0**3.5) / 100))) - 4
    worse = 10 / (1 + torch.exp(torch.tensor(1.0))) - 4  # 4 ** 4.9 is far below the floor of -100
    assert worse < 0
    torch.testing.assert_close(got, torch.stack([better * certainty, torch.tensor(0.0), certainty, torch.tensor(0.0)]))


def test_only_classes_that_both_know_are_judged():
    """A peer with two of four classes has no F1 on the others; that must not cost it its certainty."""
    own, peer = torch.tensor([0.8, 0.8, 0.9, 0.9]), torch.tensor([0.8, 0.8, 0.0, 0.0])
    got = weights(own, peer, ALL, some(0, 1))
    torch.testing.assert_close(got, torch.tensor([0.8, 0.8, 0.0, 0.0]))


def test_foreign_rows_take_one_weight_from_all_scores_without_the_floor():
    own, peer = torch.tensor([0.2, 0.9, 0.0, 0.0]), torch.tensor([0.9, 0.3, 0.0, 0.0])
    got = weights(own, peer, some(0, 1), ALL)
    total = 7.0**3.2 - 6.0**4.9
    assert total < -5000
    assert got[2] == got[3] == 0
    liked = weights(own, torch.tensor([0.9, 0.9, 0.0, 0.0]), some(0, 1), ALL)
    torch.testing.assert_close(liked[2], (10 / (1 + torch.exp(torch.tensor(-(7.0**3.2) / 100))) - 4) * 0.9)
    assert (weights(own, peer, some(0), some(1)) == 0).all(), "no class in common: nothing to judge by"


def test_the_draw_by_distance():
    """Ten of thirty at a = 0.4: 4 of the nearest third, 5 of the middle one, 2 of the farthest."""
    distances = torch.randperm(30, generator=torch.Generator().manual_seed(1)).tolist()
    drawn = prioritise(distances, 10, 0.4, torch.Generator().manual_seed(0))
    thirds = [sum(distances[i] // 10 == t for i in drawn) for t in range(3)]
    assert thirds == [4, 5, 2]
    assert drawn == sorted(set(drawn))
    assert len(prioritise([1.0, 2.0], 10, 0.4, torch.Generator())) == 2


def test_f1_is_scikit_learns():
    g = torch.Generator().manual_seed(0)
    y, p = (torch.randint(0, 5, (60,), generator=g) for _ in range(2))
    want = torch.tensor(f1_score(y, p, average=None, labels=range(6), zero_division=0.0), dtype=torch.float32)
    torch.testing.assert_close(f1_per_class(p, y, 6), want)


@pytest.fixture
def at_site(digits_task, digits_federation):
    """A site's model, its output layer's names, and the context of a merge there."""
    model = digits_task.model(0)
    names = [n for n in named_tensors(model) if n.startswith("layers.1")]
    assert len(names) == 2
    own = {n: named_tensors(model)[n].detach() for n in names}
    rows = digits_federation.sites[0].train
    context = MergeContext(0, {"weights": own}, 1, 5, digits_task, rows, model=model, site=0)
    zero = {n: torch.zeros_like(t) for n, t in own.items()}
    return context, own, zero


def reply(site, delta, classes):
    return Reply(site, Message("delta", {"delta": delta}, {"classes": classes}))


def test_alone_the_own_layer_stays(at_site):
    context, _, zero = at_site
    combined = VouchedRows().combine([reply(0, zero, list(range(10)))], context)
    assert all((t == 0).all() for t in combined.parts["delta"].values())


def test_a_row_is_the_weighted_mean_of_own_and_peers(at_site, monkeypatch):
    context, own, zero = at_site
    g = torch.Generator().manual_seed(0)
    deltas = [{n: torch.randn(t.shape, generator=g) for n, t in own.items()} for _ in range(2)]
    given = iter([torch.arange(10.0), torch.ones(10)])
    monkeypatch.setattr("atoll.federated.combine.vouched_rows.weights", lambda *_: next(given))
    replies = [reply(0, zero, []), reply(1, deltas[0], [1]), reply(2, deltas[1], [2])]
    combined = VouchedRows().combine(replies, context).parts["delta"]
    for name, t in combined.items():
        for c in range(10):
            want = (c * deltas[0][name][c] + 1 * deltas[1][name][c]) / (1 + c + 1)
            torch.testing.assert_close(t[c], want)


def test_as_many_layers_are_judged_as_there_are_candidates(at_site, monkeypatch):
    context, _, zero = at_site
    asked = []
    true = Judge.f1
    monkeypatch.setattr(Judge, "f1", lambda self, delta: asked.append(1) or true(self, delta))
    replies = [reply(i, zero, [0]) for i in range(13)]
    for candidates in (3, 6, 9):
        asked.clear()
        VouchedRows(candidates=candidates).combine(replies, context)
        assert abs(len(asked) - 1 - candidates) <= 1, "thirds are rounded"


def test_a_peer_that_lies_about_its_form_is_passed_over(at_site):
    context, own, zero = at_site
    far = {n: torch.full_like(t, 1e6) for n, t in own.items()}
    for classes in (None, "all", [0, 99], [True], [-1]):
        combined = VouchedRows().combine([reply(0, zero, [0]), reply(1, far, classes)], context)
        assert all((t == 0).all() for t in combined.parts["delta"].values())


def test_only_the_output_layer_travels_and_the_body_stays(run, digits_task):
    rows = run(bristle(degree=4), rounds=3)
    body = {n: t for n, t in named_tensors(digits_task.model(0)).items() if n.startswith("layers.0")}
    engine = rows[-1].engine
    at = engine.workers.local.site_model(0)
    assert equal({n: at.tensors[n] for n in body}, body)
    assert {n for n, p in at.model.named_parameters() if p.requires_grad} == {"layers.1.weight", "layers.1.bias"}
    letter = engine.state.broadcast.per_site[0].parts["1"]
    assert sum(t.numel() for t in letter.values()) == 10 * 32 + 10
    assert engine.state.broadcast.per_site[0].facts["from"]["1"]["classes"] != []
    assert 4 * 330 < rows[-1].up_bytes[0] < 4 * 330 + 900


def test_noise_from_two_of_five_peers_does_not_help_itself_in(run):
    calm = Training(lr=0.1, epochs=2)
    spoilt = Hostile(SayingClasses(LocalSGD(calm)), (3, 4), RandomNoise(std=5.0))
    good = {}
    for name, method in {
        "bristle": replace(bristle(degree=4, training=calm), local=spoilt),
        "mean": replace(bristle(degree=4, training=calm), local=spoilt, combine=WeightedMean(by="uniform")),
    }.items():
        sites = run(method, rounds=5)[-1].engine.evaluate_sites()
        good[name] = sum(sites[i]["accuracy"] for i in range(3)) / 3
    assert good["bristle"] > good["mean"] + 0.2
