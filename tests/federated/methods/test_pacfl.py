"""PA-CFL: nothing but a signature before there are groups, no parameter from one group to another, honest noise."""

from __future__ import annotations

import math
import secrets
from collections import Counter
from dataclasses import fields, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from atoll.core.errors import AtollError, BadReply, DataError, RecipeError
from atoll.core.message import Message
from atoll.core.tree import equal
from atoll.data.dataset import Dataset, Info
from atoll.data.federation import make_federation
from atoll.data.partitions.by_column import ByColumn
from atoll.data.sources.demand import Demand
from atoll.federated.check import problems_of
from atoll.federated.codecs.cast import Cast
from atoll.federated.codecs.clip import Clip
from atoll.federated.codecs.gaussian_noise import GaussianNoise
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.codecs.top_k import TopK
from atoll.federated.combine.median import Median
from atoll.federated.engine import federate
from atoll.federated.grouping import earth_movers, group
from atoll.federated.local.training import Training
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.fedbn import fedbn
from atoll.federated.methods.fedkseed import fedkseed
from atoll.federated.methods.fedopt import fedopt
from atoll.federated.methods.pacfl import pacfl
from atoll.federated.methods.scaffold import scaffold
from atoll.federated.privacy import spent, unit_of
from atoll.federated.secure.secure_sum import SecureSum
from atoll.federated.select.uniform import Uniform
from atoll.federated.share.parameters import Parameters
from atoll.federated.share.per_group import PerGroup
from atoll.federated.signatures.feature_importance import FeatureImportance
from atoll.federated.signatures.histogram import Histogram
from atoll.federated.signatures.signature import UNIT, known, private, whole
from atoll.federated.topologies.bubbles import Bubbles
from atoll.models.logistic import Logistic
from atoll.privacy.discrete_laplace import discrete_laplace
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import reopen, start
from atoll.tasks.forecasting import Forecasting

INSECURE = {"test_seed": 1, "allow_insecure_test_seed": True}
TRAINING = Training(lr=0.01, optimizer="adam")
KINDS = Bubbles(Histogram("kind"), privacy=None)
"""Groups that are known."""


def demand(**options):  # type: ignore[no-untyped-def]
    federation = make_federation(Demand(**{"days": 60, "shops": 6, "window": 4, **options}), ByColumn(), validation=0.0)
    return {"federation": federation, "task": Forecasting(federation.info, Logistic(start="random"))}


@pytest.fixture(scope="module")
def world():  # type: ignore[no-untyped-def]
    return demand()


def go(world, method, rounds: int = 3, **options):  # type: ignore[no-untyped-def]
    rows = list(federate(method=method, rounds=rounds, evaluate_every=0, **world, **options))
    assert not any(r.refused for r in rows)
    return rows


def groups_of(engine) -> list[int]:  # type: ignore[no-untyped-def]
    return engine.state.replica["groups"]["of"].tolist()


def model_of(engine, site: int):  # type: ignore[no-untyped-def]
    return engine.state.broadcast.per_site[site].parts["weights"]


# ------------------------------------------------------------------------------------------- what is revealed


def test_nothing_but_a_signature_leaves_before_there_are_groups(world):
    rows = list(federate(method=pacfl(TRAINING, **INSECURE), rounds=2, evaluate_every=0, **world))
    engine = rows[0].engine
    sent = []
    local = engine.method.local

    class Watched(type(local)):  # type: ignore[misc]
        def run(self, visit):  # type: ignore[no-untyped-def]
            result = super().run(visit)
            sent.append((visit.round, result))
            return result

    method = engine.method.but(local=Watched(**{f.name: getattr(local, f.name) for f in fields(local)}))
    go(world, method, rounds=2)
    first = [r for n, r in sent if n == 0]
    assert len(first) == 6
    for result in first:
        assert {p: list(t) for p, t in result.message.parts.items()} == {"signature": ["p"]}
        p = result.message.parts["signature"]["p"]
        assert (p.shape, p.dtype) == ((7,), torch.int32)
        assert (dict(result.message.facts), dict(result.metrics), dict(result.state)) == ({}, {}, {})
        assert result.message.payload_bytes == 4 * 7
    assert all(r.message.kind == "delta" for n, r in sent if n == 1)


def test_everyone_is_asked_first_whatever_select_says(world):
    rows = go(world, pacfl(TRAINING, privacy=None).but(select=Uniform(count=2)), rounds=3)
    assert [len(r.up_bytes) for r in rows] == [6, 2, 2]


def test_importance_names_what_drives_demand():
    federation = demand(days=300)["federation"]
    for site, parts in enumerate(federation.sites[:3]):
        found = FeatureImportance().measure(parts.train, 0)
        assert len(found) == FeatureImportance().size(federation.info) == 7
        assert sorted(np.argsort(found)[-2:].tolist()) == [1 + 2 * site, 2 + 2 * site]
    repeated = FeatureImportance().measure(federation.sites[0].train, 0)
    assert np.array_equal(repeated, FeatureImportance().measure(federation.sites[0].train, 0))


def test_a_signature_needs_something_to_measure():
    rows = Dataset({"x": torch.zeros(3, 2)}, Info(name="bare", shape=(2,)))
    with pytest.raises(DataError, match="needs features and a target, and `bare` has none"):
        FeatureImportance().measure(rows, 0)
    with pytest.raises(DataError, match="`town` of `bare` is none"):
        Histogram("town").size(rows.info)
    named = Dataset(
        {"x": torch.zeros(3, 2), "town": torch.tensor([0, 2, 2])}, replace(rows.info, names={"town": ("a", "b", "c")})
    )
    assert Histogram("town").measure(named, 0).tolist() == [1, 0, 2]
    with pytest.raises(DataError, match="other values than its 2 names"):
        Histogram("town").measure(named.about(replace(rows.info, names={"town": ("a", "b")})), 0)


# ------------------------------------------------------------------------------------------- noise


def test_discrete_laplace_has_its_distribution():
    """Ratios of neighbouring probabilities are exp(-1 / scale), on both sides, and zero is not counted twice."""
    scale, n = Fraction(5, 3), 6000
    below = known(3, "laplace")
    counts = Counter(discrete_laplace(scale, below) for _ in range(n))
    a = math.exp(-1 / scale)
    for x in range(-4, 5):
        p = (1 - a) / (1 + a) * a ** abs(x)
        assert abs(counts[x] - n * p) < 4.5 * math.sqrt(n * p * (1 - p)), x


@settings(max_examples=100, deadline=None)
@given(a=st.lists(st.floats(0, 1e6), min_size=2, max_size=12), b=st.lists(st.floats(0, 1e6), min_size=2, max_size=12))
def test_two_signatures_are_at_most_two_apart_before_noise(a, b):
    n = min(len(a), len(b))
    p, q = whole(np.array(a[:n])), whole(np.array(b[:n]))
    assert p.min() >= 0
    assert p.sum() <= UNIT
    assert np.abs(p - q).sum() <= 2 * UNIT


def test_noise_has_the_scale_of_two_over_epsilon():
    """By the numbers that are drawn: their mean magnitude is the scale."""
    shares, epsilon = np.full(4000, UNIT // 4000), 4.0
    drawn = [discrete_laplace(2 * UNIT / Fraction(epsilon), known(0, i)) for i in range(len(shares))]
    assert np.mean(np.abs(drawn)) == pytest.approx(2 * UNIT / epsilon, rel=0.06)
    below, noisy = known(7, "x"), private(np.array([UNIT, 0, 0]), epsilon, known(7, "x"))
    by_hand = np.array([UNIT, 0, 0]) + [discrete_laplace(2 * UNIT / Fraction(epsilon), below) for _ in range(3)]
    assert np.array_equal(noisy, whole(by_hand.clip(0).astype(float)))
    assert np.array_equal(private(np.array([UNIT, 0, 0]), None), [UNIT, 0, 0])


def test_noise_comes_from_the_operating_system(world, monkeypatch):
    asked, true = [], secrets.randbelow
    monkeypatch.setattr(secrets, "randbelow", lambda n: asked.append(n) or true(n))
    go(world, pacfl(TRAINING), rounds=1)
    assert len(asked) > 6 * 7
    before = len(asked)
    go(world, pacfl(TRAINING, **INSECURE), rounds=1)
    assert len(asked) == before
    with pytest.raises(AtollError, match="noise that anybody can subtract"):
        pacfl(test_seed=3)


def test_the_ledger_counts_the_signature(world):
    for made, want in ((pacfl(privacy=3.0), 3.0), (pacfl(privacy=None), None), (pacfl(**INSECURE), math.inf)):
        engine = go(world, made, rounds=2)[-1].engine
        assert spent(engine.method, engine.state.cohorts, 6) == want
        assert unit_of(engine.method) == ("site" if want is None else "site's signature; its updates are not covered")


# ------------------------------------------------------------------------------------------- grouping


def shares(rows: list[list[float]]) -> dict[int, np.ndarray]:  # type: ignore[type-arg]
    p = np.array(rows, dtype=float)
    return dict(enumerate(p / p.sum(1, keepdims=True)))


def test_distances_are_earth_movers():
    from scipy.stats import wasserstein_distance

    p = np.array(list(shares([[1, 2, 3, 4], [4, 0, 0, 1], [0, 0, 1, 0]]).values()))
    for a in range(3):
        for b in range(3):
            oracle = wasserstein_distance(range(4), range(4), p[a], p[b])
            assert earth_movers(p, "index")[a, b] == pytest.approx(oracle)
            assert earth_movers(p, "zero_one")[a, b] == pytest.approx(1 - np.minimum(p[a], p[b]).sum())


point = st.lists(st.integers(0, 3), min_size=3, max_size=3).filter(any)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(point, min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
    ground=st.sampled_from(["zero_one", "index"]),
)
def test_the_order_of_sites_changes_nothing_and_equal_ones_stay_together(rows, order, ground):
    found = group(shares(rows), ground)
    turn = list(range(len(rows)))
    order.shuffle(turn)
    turned = group({i: shares(rows)[old] for i, old in enumerate(turn)}, ground)
    together = {frozenset(s for s in found if found[s] == g) for g in found.values()}
    assert together == {frozenset(turn[s] for s in turned if turned[s] == g) for g in turned.values()}
    for a, p in shares(rows).items():
        for b, q in shares(rows).items():
            if np.array_equal(p, q):
                assert found[a] == found[b]
    assert all(g == min(s for s in found if found[s] == g) for g in found.values())


def test_groups_by_hand():
    two = [[9, 1, 0], [8, 2, 0], [0, 1, 9], [0, 2, 8], [9, 1, 1]]
    assert group(shares(two)) == {0: 0, 1: 0, 4: 0, 2: 2, 3: 2}
    assert set(group(shares([[1, 2]] * 5)).values()) == {0}
    assert group(shares([[1, 0], [0, 1]])) == {0: 0, 1: 0}
    three = [*two, [0, 9, 0]]
    assert group(shares(three)) == {0: 0, 1: 0, 4: 0, 2: 2, 3: 2, 5: 5}
    assert len(set(group(shares(three), most=2).values())) == 2


def test_kinds_of_shops_are_found_and_so_is_the_poisoned_one():
    federation = demand(days=400, shops=9, poisoned=1)["federation"]
    raw = {i: whole(FeatureImportance(trees=10).measure(s.train, i)) for i, s in enumerate(federation.sites)}
    kinds = [int(s.train.column("kind")[0]) for s in federation.sites]

    def found(epsilon: float | None, seed: int = 0) -> list[int]:
        return [
            g for _, g in sorted(group({i: private(p, epsilon, known(seed, i)) / UNIT for i, p in raw.items()}).items())
        ]

    assert adjusted_rand_score(kinds, found(None)) == 1
    assert Counter(found(None))[9] == 1
    at_100, at_1 = ([adjusted_rand_score(kinds, found(e, s)) for s in range(5)] for e in (100.0, 1.0))
    assert np.mean(at_100) > 0.8
    assert np.mean(at_1) < 0.4, "with noise of scale 2 in a share, groups are chance"
    assert all(Counter(found(100.0, s))[9] == 1 for s in range(5))


# ------------------------------------------------------------------------------------------- groups apart


@pytest.mark.parametrize(
    "method",
    [fedavg(TRAINING), scaffold(training=Training(lr=0.05)), fedopt(), fedavg(TRAINING).but(combine=Median())],
    ids=["fedavg", "scaffold", "fedopt", "median"],
)
def test_a_groups_model_has_the_bits_that_it_would_have_alone(world, method):
    """Every method runs in its group as if there were no other site."""
    rows = go(world, method.but(topology=KINDS), rounds=4)
    engine = rows[-1].engine
    assert groups_of(engine) == [0, 1, 2, 0, 1, 2]
    assert rows[0].notes == ["groups of sites: 0 3 | 1 4 | 2 5"]
    federation = world["federation"]
    for kind in range(3):
        empty = replace(federation.sites[0], train=federation.sites[0].train.select([]))
        sites = tuple(s if i % 3 == kind else empty for i, s in enumerate(federation.sites))

        class Members(Uniform):
            def choose(self, round, sites, seed, kind=kind):  # type: ignore[no-untyped-def]
                return [s.site for s in sites if s.site % 3 == kind]

        class Later(type(method.local)):  # type: ignore[misc]
            """Rounds are counted from the second, since the first has grouped the sites."""

            def run(self, visit):  # type: ignore[no-untyped-def]
                return super().run(replace(visit, round=visit.round + 1))

        local = Later(**{f.name: getattr(method.local, f.name) for f in fields(method.local)})
        alone = go(
            {**world, "federation": replace(federation, sites=sites)},
            method.but(select=Members(), local=local),
            rounds=3,
        )
        weights = alone[-1].engine.state.replica["weights"]
        assert equal(model_of(engine, kind), weights), kind
        assert equal(model_of(engine, kind + 3), weights), kind


def test_a_poisoned_group_leaves_no_trace_in_others(world):
    poisoned = demand()
    site = poisoned["federation"].sites[1]
    wild = Dataset(
        {**site.train.columns, "y": torch.full_like(site.train.columns["y"], 1e4)}, site.train.info, site.train.rows
    )
    sites = tuple(replace(s, train=wild) if i == 1 else s for i, s in enumerate(poisoned["federation"].sites))
    poisoned["federation"] = replace(poisoned["federation"], sites=sites)
    a, b = (go(w, fedavg(TRAINING).but(topology=KINDS), rounds=4)[-1].engine for w in (world, poisoned))
    assert equal(model_of(a, 0), model_of(b, 0))
    assert equal(model_of(a, 2), model_of(b, 2))
    assert not equal(model_of(a, 4), model_of(b, 4))


def test_sites_are_judged_by_their_groups_model(world):
    """The one that came with the last visit, though the site has trained since."""
    seen = []
    rows = federate(method=fedavg(TRAINING).but(topology=KINDS), rounds=4, evaluate_every=0, **world)
    for row in rows:
        seen.append(
            {
                s: {n: t.clone() for n, t in m.parts["weights"].items()}
                for s, m in row.engine.state.broadcast.per_site.items()
            }
        )
        engine = row.engine
        if row.round:
            for site in range(6):
                at, _ = engine.workers.local.place(site, engine.state.tags[site])
                assert equal({n: at.tensors[n] for n in seen[-2][site]}, seen[-2][site])
    assert engine.evaluate_global() == {}


def test_a_late_site_makes_new_groups_and_no_model_is_mixed(world):
    """Site 5 fails at first; when it comes, groups keep the models that most of their sites had."""
    made = fedavg(TRAINING).but(topology=KINDS)
    step = _server(made)
    replies = {i: [0.9, 0.1] if i < 2 else [0.1, 0.9] for i in range(4)}
    first, state = step(_signatures(replies), {}, {"weights": {"w": torch.zeros(2)}}, 0)
    assert first.common.parts["groups"]["of"].tolist() == [0, 0, 2, 2, -1, -1]
    assert 5 not in first.per_site
    replica = {"weights": {"w": torch.zeros(2)}, **first.common.parts}
    deltas = {i: {"w": torch.tensor([float(i), 1.0])} for i in range(4)}
    second, state = step(_deltas(deltas), state, replica, 1)
    assert second.per_site[0].parts["weights"]["w"].tolist() == [0.5, 1.0]
    assert second.per_site[3].parts["weights"]["w"].tolist() == [2.5, 1.0]
    third, state = step(_signatures({5: [0.1, 0.9], 0: [0.0, 1.0]}), state, replica, 2)
    of = third.common.parts["groups"]["of"].tolist()
    assert of == [0, 0, 2, 2, -1, 2], "site 0 has said once who it is"
    assert third.per_site[5].parts["weights"]["w"].tolist() == [2.5, 1.0]
    assert third.per_site[1].parts["weights"]["w"].tolist() == [0.5, 1.0]


def _server(method):  # type: ignore[no-untyped-def]
    from atoll.federated.method import MergeContext, Reply

    composed = method.topology.compose(method)

    def step(messages, state, replica, round):  # type: ignore[no-untyped-def]
        context = MergeContext(round, replica, 6, 0, None)
        combined = composed.combine.combine((Reply(i, m, 10) for i, m in sorted(messages.items())), context)
        return composed.server.step(replica, state, combined, context)

    return step


def _signatures(rows):  # type: ignore[no-untyped-def]
    return {i: Message("signature", {"signature": {"p": torch.tensor(r).mul(UNIT).int()}}) for i, r in rows.items()}


def _deltas(rows):  # type: ignore[no-untyped-def]
    return {i: Message("delta", {"delta": r}) for i, r in rows.items()}


def test_a_strange_signature_is_a_group_by_itself(world):
    step = _server(fedavg(TRAINING).but(topology=KINDS))
    rows = {0: [0.9, 0.1], 1: [0.9, 0.1], 2: [0.2, 0.8], 3: [0.3, 0.3, 0.4]}
    first, _ = step(_signatures(rows), {}, {"weights": {"w": torch.zeros(2)}}, 0)
    assert first.common.parts["groups"]["of"].tolist()[3] == 3
    assert first.notes == ("groups of sites: 0 1 | 2 | 3; alone, so unlike the others, hostile or just unlucky: 2, 3",)
    share = PerGroup(Parameters())
    good = {"p": torch.tensor([UNIT // 2, UNIT // 2], dtype=torch.int32)}
    share.check(Message("signature", {"signature": good}), {})
    for bad in (
        {"p": good["p"].float()},
        {"p": -good["p"]},
        {"p": 3 * good["p"]},
        {"p": good["p"][:0]},
        {"q": good["p"]},
        good | {"q": good["p"]},
    ):
        with pytest.raises(BadReply, match="signature"):
            share.check(Message("signature", {"signature": bad}), {})
    with pytest.raises(BadReply):
        share.check(Message("signature", {"signature": good, "rows": good}), {})


# ------------------------------------------------------------------------------------------- composition


def test_codecs_leave_signatures_alone(world):
    plain = go(world, pacfl(TRAINING, privacy=None), rounds=2)[-1].engine
    for codec in (Quantise(bits=2), TopK(fraction=0.05), Cast()):
        coded = go(world, pacfl(TRAINING, privacy=None).but(uplink=(codec,)), rounds=3)[-1].engine
        assert equal(coded.state.server["signatures"], plain.state.server["signatures"])


def test_private_layers_stay_private_in_groups(run):
    engine = run(fedbn(Training(epochs=1)).but(topology=Bubbles(Histogram("y"), privacy=None)), rounds=3)[-1].engine
    assert len(engine.evaluate_sites()) == 5


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (fedkseed(), "Bubbles sends each group a model of its own"),
        (fedavg().but(secure=SecureSum(clip=1.0)), "SecureSum adds up all replies of a round"),
        (
            fedavg().but(uplink=(Clip(norm=1.0), GaussianNoise(1.0, 1.0))),
            "GaussianNoise is accounted for a sum over all sites",
        ),
        (fedavg().but(downlink=(Cast(),)), "`downlink` does not change"),
    ],
)
def test_what_cannot_be_right_is_refused(method, words):
    assert any(words in p for p in problems_of(method.but(topology=Bubbles())))


def test_from_a_recipe_also_after_a_stop(tmp_path):
    recipe = {
        "data": {"name": "demand", "days": 60, "shops": 6}, "partition": "by_column", "model": "logistic", "rounds": 4,
        "method": {"name": "fedprox", "mu": 0.1},
        "topology": {"name": "bubbles", "privacy": None, "signature": {"name": "histogram", "column": "kind"}},
    }  # fmt: skip
    whole_run = start(read_recipe(recipe), tmp_path / "a")[0].go()

    def stop(row):  # type: ignore[no-untyped-def]
        if row.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(read_recipe(recipe), tmp_path / "b")[0].go(stop)
    again = reopen(tmp_path / "b").go()
    assert again["metrics"] == whole_run["metrics"]
    assert again["personal"]
    with pytest.raises(RecipeError, match=r"signature.*Did you mean `histogram`"):
        read_recipe({**recipe, "topology": {"name": "bubbles", "signature": "histogramm"}})
