from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from atoll.core.errors import RecipeError
from atoll.core.message import Message
from atoll.core.tree import equal
from atoll.data.dataset import Dataset
from atoll.federated import checkpoint
from atoll.federated.backends.inline import Inline
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.combine.inverse_frequency import InverseFrequency
from atoll.federated.combine.weighted_mean import WeightedMean
from atoll.federated.device_profiles.spread import Spread
from atoll.federated.engine import Engine
from atoll.federated.local.training import Training
from atoll.federated.method import LocalWork
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.fedfix import fedfix
from atoll.federated.methods.fedinterval import fedinterval
from atoll.federated.schedules.buffered import Buffered
from atoll.federated.schedules.fixed_interval import FixedInterval
from atoll.federated.schedules.synchronous import Synchronous
from atoll.federated.select.uniform import Uniform
from atoll.federated.visit import Result


def weights(rows):
    return rows[-1].engine.state.replica["weights"]


@dataclass(frozen=True)
class OneHot(LocalWork):
    """Site i always sends the i-th unit vector, so that the weights are the sums of what each site has counted."""

    more: int = 0

    def run(self, visit):
        delta = torch.zeros(len(visit.replica["weights"]["w"]))
        delta[visit.site.site] = 1
        padding = "x" * (self.more * (visit.round // 3 % 4))  # a longer message takes longer to send
        return Result(Message("delta", {"delta": {"w": delta}}, {"padding": padding}))


SIZES = (5, 1, 2, 4, 1, 7)
P = torch.tensor(SIZES) / sum(SIZES)


@pytest.fixture
def six(quadratics):
    """Six sites of unequal size, site 0 five times as slow as the last; lengths of visits, and how to run."""
    task, federation = type(quadratics.task)(6), quadratics.federation
    row = Dataset({"x": torch.ones(1, 6), "y": torch.zeros(1, 6)}, replace(federation.info, shape=(6,)))
    sites = tuple(replace(federation.sites[0], train=row.select([0] * n)) for n in SIZES)
    return {"task": task, "federation": replace(federation, sites=sites), "devices": Spread(80.0)}


@pytest.fixture
def tau(run, six):
    [first] = run(fedavg().but(local=OneHot()), rounds=1, **six)
    return [first.time * (1 - 0.8 * i / 5) for i in range(6)]


@pytest.mark.parametrize("scheme", ["sync", "fedfix", "fedfix often", "fedfix rarely", "async", "buffered"])
def test_every_site_counts_by_its_part_of_the_examples_in_the_long_run(scheme, run, six, tau):
    """The mean of omega_i(n) over the server's steps n is p_i, within 2 %."""
    speed = sum(1 / t for t in tau)
    dt = {"fedfix": 0.37, "fedfix often": 0.07, "fedfix rarely": 0.8}.get(scheme, 1.0) * tau[0]
    combine, schedule = {
        "sync": (WeightedMean(), Synchronous()),
        "async": (InverseFrequency(1 / speed, ticks=False), Buffered(1)),
        "buffered": (InverseFrequency(3 / speed, ticks=False), Buffered(3)),
    }.get(scheme, (None, None))
    method = fedfix(dt).but(local=OneHot())
    if combine is not None:
        method = method.but(combine=combine, schedule=schedule)
    rows = run(method, rounds=900 if scheme == "async" else 300, evaluate_every=10**6, **six)
    steps = rows[-1].time / dt if combine is None else len(rows)  # a tick without arrivals is a step of zero
    torch.testing.assert_close(weights(rows)["w"] / steps, P, rtol=0.02, atol=0)


def test_the_baseline_leans_towards_fast_sites(run, six, tau):
    rows = run(fedinterval(0.37 * tau[0], staleness=0.0).but(local=OneHot()), rounds=100, evaluate_every=10**6, **six)
    mean = weights(rows)["w"] / len(rows)
    assert mean[5] / mean[0] > 1.5 * P[5] / P[0]


def test_each_reply_counts_for_the_ticks_it_took_also_when_visits_differ(run, six):
    """For each site, the ticks that its replies counted for are all that went by before its visit in flight."""
    work = OneHot(more=100)
    dt = run(fedavg().but(local=work), rounds=1, **six)[0].time / 5
    rows = run(fedfix(dt).but(local=work), rounds=80, evaluate_every=10**6, **six)
    state = rows[-1].engine.state
    counted = weights(rows)["w"] / P
    lengths = {s: set() for s in range(6)}
    for row in rows:
        for site in row.up_bytes:
            lengths[site].add(row.round)
    for site in range(6):
        begun = state.flights[site].started if site in state.flights else state.now
        assert float(counted[site]) == pytest.approx(begun / dt, rel=1e-4)
    gaps = {site: {b - a for a, b in zip(sorted(r), sorted(r)[1:], strict=False)} for site, r in lengths.items()}
    assert len(gaps[0]) > 1  # visits of one site did take different times


def test_an_interval_longer_than_any_visit_is_fedavg(run):
    ours = run(fedfix(dt=10.0), devices=Spread(80.0))
    for name, w in weights(run(fedavg())).items():
        torch.testing.assert_close(weights(ours)[name], w, atol=1e-6, rtol=0)
    assert [r.time for r in ours] == [10.0, 20.0, 30.0]


def test_contributions_start_from_the_version_a_site_received(run, quadratics):
    """Times 1 and 0.3 of a slow visit, a tick every 0.55: the slow one lands at the second, and counts for two."""
    lr, world = 0.1, {"task": quadratics.task, "devices": Spread(70.0)}
    federation = replace(quadratics.federation, sites=quadratics.federation.sites[:2])
    [first] = run(fedavg(), rounds=1, federation=federation, **world)
    rows = run(fedfix(dt=0.55 * first.time, training=Training(lr=lr)), rounds=2, federation=federation, **world)
    assert [sorted(r.up_bytes) for r in rows] == [[1], [0, 1]]

    def delta(site, x):
        return -lr * quadratics.curvature[site] * (x - quadratics.centre[site])

    x0 = torch.zeros(3)
    x1 = x0 + delta(1, x0) / 2
    x2 = x1 + (2 * delta(0, x0) + delta(1, x1)) / 2
    torch.testing.assert_close(weights(rows)["w"], x2, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("ours", [True, False], ids=["fedfix", "fedinterval"])
def test_the_limit_is_the_federated_optimum_and_that_of_plain_averages_is_not(ours, run, quadratics):
    world = {"task": quadratics.task, "federation": quadratics.federation, "devices": Spread(80.0)}
    [first] = run(fedavg(), rounds=1, **world)
    training, dt = Training(lr=0.02), 0.2 * first.time
    method = fedfix(dt, training=training) if ours else fedinterval(dt, training=training)
    rows = run(method, rounds=1000, evaluate_every=10**6, **world)
    distance = float((weights(rows)["w"] - quadratics.optimum).norm())
    assert distance < 0.03 if ours else distance > 0.15


def test_a_site_never_has_two_visits_at_once(run):
    rows = run(fedfix(dt=0.01), rounds=8, devices=Spread(80.0))
    landed = [sum(s in r.up_bytes for r in rows) for s in range(5)]
    assert landed[0] < landed[4]
    asked = [sum(r.down_bytes.get(s, 0) > 0 for r in rows) for s in range(5)]
    flying = rows[-1].engine.in_flight
    assert all(asked[s] - landed[s] == (s in flying) for s in range(5))


def test_arriving_with_a_tick_is_arriving_before_it():
    rule = InverseFrequency(0.1)
    assert [rule.merges(s) for s in (0.0, 0.05, 0.1, 0.1 + 1e-12, 0.1 + 1e-6, 3 * 0.1, 0.35)] == [1, 1, 1, 1, 2, 3, 4]
    assert InverseFrequency(0.1, ticks=False).merges(0.35) == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"schedule": Buffered(k=3)}, r"Buffered has no fixed interval; use FixedInterval\(dt=0.5\)"),
        ({"schedule": FixedInterval(0.25)}, r"FixedInterval merges every 0.25; use FixedInterval\(dt=0.5\)"),
        ({"select": Uniform(count=3)}, r"Uniform asks 3 of 5; ask all"),
    ],
    ids=["buffered", "interval", "select"],
)
def test_what_would_bend_the_weights_is_refused(parts, text, run):
    with pytest.raises(RecipeError, match=text):
        run(fedfix(0.5).but(**parts), rounds=1)


def test_other_backends_and_a_resumed_run_have_the_same_bits(run, tmp_path):
    method, devices = fedfix(dt=0.01).but(uplink=(Quantise(bits=8),)), Spread(80.0)
    whole = run(method, rounds=6, devices=devices)
    assert equal(weights(whole), weights(run(method, rounds=6, devices=devices, backend=ProcessPool(workers=2))))
    half = run(method, rounds=3, devices=devices)
    assert half[-1].engine.state.flights
    checkpoint.save(half[-1].engine.state, tmp_path, {})
    state, _ = checkpoint.load(tmp_path)
    setup = half[-1].engine.setup
    rest = Engine(setup, Inline().open(setup), state)
    for _ in range(3):
        rest.step()
    assert equal(weights(whole), rest.state.replica["weights"])
    assert all(math.isfinite(float(t.sum())) for t in weights(whole).values())
