"""Peers that mix models with their neighbours': who talks to whom, what is mixed, what travels, what is refused."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from atoll.core.errors import RecipeError
from atoll.core.tree import equal
from atoll.federated.backends.inline import Inline
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.codecs.clip import Clip
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.codecs.top_k import TopK
from atoll.federated.combine.krum import Krum
from atoll.federated.combine.median import Median
from atoll.federated.combine.weighted_mean import WeightedMean
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.training import Training
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.fedbn import fedbn
from atoll.federated.methods.fedopt import fedopt
from atoll.federated.methods.fedprox import fedprox
from atoll.federated.methods.frl import frl
from atoll.federated.methods.local_only import local_only
from atoll.federated.methods.scaffold import scaffold
from atoll.federated.schedules.buffered import Buffered
from atoll.federated.select.uniform import Uniform
from atoll.federated.simulate.attacks import Hostile, SignFlip
from atoll.federated.topologies.gossip import Gossip


def models(engine):
    states = {i.site: engine.workers.local.states.get(i.site, engine.state.tags[i.site]) for i in engine.sites}
    return {site: s.parts["private"] for site, s in states.items()}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 5), st.booleans())
def test_the_graph_is_symmetric_and_connected(num_sites, half, seed, changing):
    gossip = Gossip(degree=2 * half, changing=changing)
    near = {i: gossip.neighbours(i, 3, num_sites, seed) for i in range(num_sites)}
    for i, others in near.items():
        assert others == sorted(set(others))
        assert i not in others
        assert len(others) <= 2 * half
        assert all(i in near[j] for j in others)
    reached, todo = {0}, [0]
    while todo:
        new = set(near[todo.pop()]) - reached
        reached |= new
        todo += new
    assert len(reached) == num_sites


def test_the_graph_changes_only_when_asked():
    still, moving = Gossip(degree=2), Gossip(degree=2, changing=True)
    assert [still.neighbours(i, 0, 30, 1) for i in range(30)] == [still.neighbours(i, 9, 30, 1) for i in range(30)]
    assert [moving.neighbours(i, 0, 30, 1) for i in range(30)] != [moving.neighbours(i, 9, 30, 1) for i in range(30)]


def test_mixing_is_the_mean_over_the_closed_neighbourhood(run):
    """A first visit trains; a second one without steps shows the mixing alone."""
    gossip = Gossip(degree=2)
    method = fedavg().but(topology=gossip, combine=WeightedMean(by="uniform"))
    seen = []
    run(method, rounds=1, on_merge=lambda e, _: seen.append(models(e)))
    trained = seen[-1]

    class Lazy(LocalSGD):
        """Trains in round 0 only."""

        def run(self, visit):
            return super().run(visit if visit.round == 0 else replace(visit, dry=True))

    seen.clear()
    run(replace(method, local=Lazy()), rounds=2, on_merge=lambda e, _: seen.append(models(e)))
    for name in trained[0]:
        assert torch.equal(seen[0][0][name], trained[0][name])
    for site, mixed in seen[1].items():
        near = sorted([site, *gossip.neighbours(site, 0, 5, 0)])
        for name, t in mixed.items():
            want = torch.stack([trained[i][name] for i in near]).mean(0)
            torch.testing.assert_close(t, want, rtol=1e-5, atol=1e-6)


def test_peers_agree_in_the_end_and_without_letters_they_do_not(run):
    def apart(method):
        each = list(models(run(method, rounds=8)[-1].engine).values())
        return max(float((each[0][n] - m[n]).abs().max()) for m in each[1:] for n in each[0])

    calm = Training(lr=0.02)
    gossip = apart(fedavg(training=calm).but(topology=Gossip(degree=2), combine=WeightedMean(by="uniform")))
    alone = apart(local_only(training=calm))
    assert gossip < 0.5 * alone


def test_bytes_are_a_model_up_and_one_a_neighbour_down(run):
    rows = run(fedavg().but(topology=Gossip(degree=2)), rounds=2)
    model = sum(t.numel() * 4 for t in rows[-1].engine.state.replica["weights"].values())
    assert all(size < 300 for size in rows[0].down_bytes.values())
    for site in range(5):
        assert model < rows[1].up_bytes[site] < model + 1000
        assert 2 * model < rows[1].down_bytes[site] < 2 * model + 2000
    assert all(r.metrics == {} for r in rows), "there is no global model"


@pytest.mark.parametrize(
    "method",
    [
        fedavg().but(uplink=(Quantise(bits=8),)), fedprox(mu=0.1), fedbn(), fedavg().but(combine=Median()),
        fedavg().but(select=Uniform(count=3)),
    ],
    ids=["quantise", "fedprox", "fedbn", "median", "partial"],
)  # fmt: skip
def test_it_composes_with_the_same_bits_in_the_pool(method, run):
    ends = []
    for backend in (Inline(), ProcessPool(workers=2)):
        last = []
        rows = run(
            method.but(topology=Gossip(degree=2)), rounds=3, backend=backend,
            on_merge=lambda e, _, last=last: last.append(e.evaluate_sites()),
        )  # fmt: skip
        assert all(r.notes == [] and r.refused == {} for r in rows)
        ends.append((last, rows[-1].engine.state, [(r.down_bytes, r.up_bytes) for r in rows]))
    (metrics, state, sizes), (metrics_, state_, sizes_) = ends
    assert metrics == metrics_
    assert sizes == sizes_
    assert state.broadcast.per_site.keys() == state_.broadcast.per_site.keys()
    for site, letter in state.broadcast.per_site.items():
        assert all(equal(tree, state_.broadcast.per_site[site].parts[p]) for p, tree in letter.parts.items())


def test_a_median_peer_ignores_a_hostile_neighbour(run):
    """One of five sites writes minus a thousand times its update; all read all."""
    spoil = Hostile(LocalSGD(Training(lr=0.2, epochs=4)), (4,), SignFlip(scale=1000.0))
    accuracy = {}
    for combine in (WeightedMean(by="uniform"), Median()):
        method = fedavg().but(local=spoil, topology=Gossip(degree=4), combine=combine)
        per_site = run(method, rounds=6)[-1].engine.evaluate_sites()
        accuracy[type(combine)] = sum(per_site[i]["accuracy"] for i in range(4)) / 4
    assert accuracy[Median] > accuracy[WeightedMean] + 0.2


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (scaffold(), "server"), (fedopt(), "Adaptive"), (frl(), "reply|replies"),
        (fedavg().but(schedule=Buffered(k=2)), "Buffered"),
        (fedavg().but(uplink=(TopK(fraction=0.1),)), "TopK"), (fedavg().but(uplink=(Clip(norm=1.0),)), "Clip"),
        (fedavg().but(combine=Krum(f=2)), r"Gossip\(degree=6\)"),
        (fedavg().but(downlink=(Quantise(bits=8),)), "downlink"),
    ],
)  # fmt: skip
def test_what_gossip_cannot_do_is_refused(method, words, run):
    with pytest.raises(RecipeError, match=words):
        run(method.but(topology=Gossip()), rounds=1)


def test_a_letter_of_another_form_is_refused_and_the_run_goes_on(run):
    class Short(LocalSGD):
        def run(self, visit):
            result = super().run(visit)
            if visit.site.site != 2:
                return result
            delta = {n: t for i, (n, t) in enumerate(result.message.parts["delta"].items()) if i}
            return replace(result, message=replace(result.message, parts={"delta": delta}))

    rows = run(fedavg().but(local=Short(), topology=Gossip(degree=2)), rounds=2)
    for row in rows:
        assert set(row.refused) == {2}
        assert row.replies == 4
