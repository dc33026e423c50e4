"""On Flower's simulation engine every method has the bits and the bytes that it has inline."""

from __future__ import annotations

import importlib
import os
import pkgutil
import time
from dataclasses import dataclass, replace
from typing import Any

import pytest

import atoll.federated.methods
from atoll.core.tree import equal
from atoll.federated.backends.flower_simulation import FlowerWorkers, start_nodes
from atoll.federated.backends.inline import Inline
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.method import Backend
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.flora import flora
from atoll.federated.select.uniform import Uniform

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
ARGUMENTS: dict[str, dict[str, object]] = {"fedkseed": {"steps": 5, "pool": 64}, "fedbuff": {"k": 2}}
NAMES = sorted(m.name for m in pkgutil.iter_modules(atoll.federated.methods.__path__))


@dataclass(frozen=True)
class On(Backend):
    """Runs on an engine that stays: starting actors for each test would take most of the time."""

    nodes: Any

    def open(self, setup: Any) -> FlowerWorkers:
        return FlowerWorkers(setup, self.nodes, keep=True)


@pytest.fixture(scope="module")
def engine():
    nodes = start_nodes(count=5, workers=2)
    yield On(nodes)
    nodes.close()


@pytest.mark.parametrize("name", NAMES)
def test_flower_equals_inline(name, run, digits_federation, engine):
    module = importlib.import_module(f"atoll.federated.methods.{name}")
    method = getattr(module, name)(**ARGUMENTS.get(name, {}))
    if method.schedule.synchronous and name != "centralised":
        method = method.but(select=Uniform(count=3))  # partial participation: states and catching up matter
    world = replace(digits_federation, public=digits_federation.test.select(range(100)))
    traces = []
    for backend in (Inline(), engine):
        sites = []
        rows = run(
            method, rounds=3, federation=world, backend=backend,
            on_merge=lambda engine, row, sites=sites: sites.append(row.round == 2 and engine.evaluate_sites()),
        )  # fmt: skip
        ledger = [(r.time, r.replies, r.down_bytes, r.up_bytes, r.flops, r.refused, dict(r.metrics)) for r in rows]
        traces.append((ledger, sites, rows[-1].engine.state))
    (ledger, sites, state), (ledger_, sites_, state_) = traces
    assert ledger == ledger_
    assert sites == sites_
    assert state.replica.keys() == state_.replica.keys()
    assert all(equal(state.replica[p], state_.replica[p]) for p in state.replica)
    assert all(equal(state.server[p], state_.server[p]) for p in state.server)


@dataclass(frozen=True)
class Mishap(LocalSGD):
    """In round 1, every site fails in its own way."""

    def run(self, visit):
        if visit.round == 1:
            if visit.site.site == 0:
                os._exit(7)
            if visit.site.site == 1:
                time.sleep(60)
            if visit.site.site == 2:
                sum(range(10**12))  # does not come back to Python, where a signal could end it
            if visit.site.site == 3:
                raise ValueError("no disk")
        return super().run(visit)


def test_every_failure_is_an_outcome(run, engine):
    rows = run(fedavg().but(local=Mishap()), rounds=3, backend=engine, timeout=1.0)
    assert [r.replies for r in rows] == [5, 1, 5]
    assert rows[1].refused[0].startswith("its process died")
    assert rows[1].refused[1] == "TimeoutError: no answer within 1 s"
    assert rows[1].refused[2].startswith("its process died or gave no answer within 1 s")
    assert rows[1].refused[3] == "ValueError: no disk"


def test_a_site_that_lost_its_replica_gets_a_snapshot(run, engine, monkeypatch):
    """The files of all replicas vanish between two rounds: the bits stay, and nobody fails."""
    method = flora().but(select=Uniform(count=3))

    def lose(engine_, row):
        for path in engine_.workers._folder.glob("replicas/*"):
            path.unlink()

    kept, lost = (run(method, rounds=4, backend=b, on_merge=f) for b, f in ((Inline(), None), (engine, lose)))
    assert not any(r.refused for r in lost)
    assert [r.down_bytes for r in kept] == [r.down_bytes for r in lost]
    a, b = (rows[-1].engine.state.replica["weights"] for rows in (kept, lost))
    assert equal(a, b)


def test_a_question_to_sites(run, engine):
    from atoll.core.message import Message

    answers = {}
    run(fedavg(), rounds=1, backend=engine, on_merge=lambda e, _: answers.update(e.workers.ask({2: Message("hello")})))
    assert answers == {2: "a site does not answer `hello`"}
