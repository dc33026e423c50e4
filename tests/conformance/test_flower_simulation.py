"""On Flower's simulation engine every method has the bits and the bytes that it has inline."""

from __future__ import annotations

import contextlib
import os
import pkgutil
import time
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import atoll.federated.methods
import atoll.flower
from atoll.core.message import Message
from atoll.core.tree import equal
from atoll.federated.backends.flower_simulation import FlowerWorkers, start_nodes
from atoll.federated.backends.inline import Inline
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.codecs.top_k import TopK
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.method import Backend
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.fedopt import fedopt
from atoll.federated.methods.flora import flora
from atoll.federated.secure.secure_sum import SecureSum
from atoll.federated.select.uniform import Uniform

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
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


@contextlib.contextmanager
def instead(nodes: Any, app: Any) -> Any:
    """The engine's grid, with another app at the nodes for a while."""
    ours, nodes.load.app = nodes.app, app
    try:
        yield nodes.grid
    finally:
        nodes.load.app = ours
        nodes.link.answered.queue.clear()


@dataclass(frozen=True)
class Rows:
    """What a project's own function would load."""

    federation: Any

    def __call__(self, context: Any) -> Any:
        return self.federation.sites[context.node_config["partition-id"]]


@pytest.mark.parametrize("name", [*NAMES, "secure"])
def test_flower_equals_inline(name, build, run, digits_federation, engine):
    method = fedavg().but(secure=SecureSum()) if name == "secure" else build(name)
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


@pytest.mark.parametrize("name", ["fedavg", "fedopt", "codec"])
def test_a_strategy_on_flowers_engine_equals_inline(name, run, digits_task, digits_federation, engine):
    """The strategy and the ClientApp of `atoll.flower`, on the engine that `run_simulation` drives."""
    codec = fedavg().but(uplink=(TopK(fraction=0.2), Quantise(bits=8)))
    method = {"fedavg": fedavg(), "fedopt": fedopt(), "codec": codec}[name].but(select=Uniform(count=3))
    rows = run(method)
    strategy = atoll.flower.strategy(method, digits_task, 5, evaluate=False)
    with instead(engine.nodes, atoll.flower.client_app(digits_task, method, Rows(digits_federation))) as grid:
        result = strategy.start(grid, strategy.initial_arrays(), 3)
    assert [r.up_bytes for r in strategy.rows] == [r.up_bytes for r in rows]
    weights = rows[-1].engine.state.replica["weights"]
    assert all(torch.equal(torch.from_numpy(result.arrays[n].numpy()), t) for n, t in weights.items())


def test_a_question_to_sites(run, engine):
    answers = {}
    run(fedavg(), rounds=1, backend=engine, on_merge=lambda e, _: answers.update(e.workers.ask({2: Message("hello")})))
    assert answers == {2: "a site does not answer `hello`"}


@dataclass(frozen=True)
class Mishap(LocalSGD):
    """In round 1, every site fails in its own way; site 0 only once."""

    mark: str = ""

    def run(self, visit):
        if visit.round == 1:
            if visit.site.site == 0 and not os.path.exists(self.mark):
                open(self.mark, "w").close()
                os._exit(7)
            if visit.site.site == 1:
                time.sleep(60)
            if visit.site.site == 2:
                sum(range(10**12))  # does not come back to Python, where a signal could end it
            if visit.site.site == 3:
                raise ValueError("no disk")
        return super().run(visit)


@pytest.mark.slow
def test_every_failure_is_an_outcome(run, engine, tmp_path):
    """A process that dies is started again and gets its visit once more; what fails then has failed."""
    rows = run(fedavg().but(local=Mishap(mark=str(tmp_path / "died"))), rounds=3, backend=engine, timeout=0.5)
    assert (tmp_path / "died").exists()
    assert [r.replies for r in rows] == [5, 2, 5]
    assert rows[1].refused[1] == "TimeoutError: no answer within 0.5 s"
    assert rows[1].refused[2] == "its process died or gave no answer within 0.5 s"
    assert rows[1].refused[3] == "ValueError: no disk"
