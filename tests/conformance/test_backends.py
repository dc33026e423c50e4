"""Every method gives the same bits on every backend."""

from __future__ import annotations

import pkgutil
from dataclasses import replace

import pytest

import atoll.federated.methods
from atoll.core.tree import equal
from atoll.federated.backends.inline import Inline
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.select.uniform import Uniform

NAMES = sorted(m.name for m in pkgutil.iter_modules(atoll.federated.methods.__path__))


@pytest.mark.parametrize("name", NAMES)
def test_every_backend_equals_inline(name, build, run, digits_federation, crew):
    method = build(name)
    if method.schedule.synchronous and name != "centralised":
        method = method.but(select=Uniform(count=3))  # partial participation: states and catching up matter
    world = replace(digits_federation, public=digits_federation.test.select(range(100)))
    traces = []
    for backend in (Inline(), ProcessPool(workers=2), crew):
        sites = []
        rows = run(
            method, rounds=3, federation=world, backend=backend,
            on_merge=lambda engine, _, sites=sites: sites.append(engine.evaluate_sites()),
        )  # fmt: skip
        ledger = [(r.time, r.replies, r.down_bytes, r.up_bytes, r.flops, r.refused, dict(r.metrics)) for r in rows]
        traces.append((ledger, sites, rows[-1].engine.state))
    (ledger, sites, state), *others = traces
    for ledger_, sites_, state_ in others:
        assert ledger == ledger_
        assert sites == sites_
        assert state.replica.keys() == state_.replica.keys()
        assert all(equal(state.replica[p], state_.replica[p]) for p in state.replica)
        assert all(equal(state.server[p], state_.server[p]) for p in state.server)
