"""Every method of the package on digits, with its defaults: what all of them must do.

A new method is found by itself. One that cannot run on a small classifier with its defaults gets a line in
``conftest.py``, with the reason.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import replace

import pytest
import torch

import atoll.federated.methods
from atoll.core.errors import RecipeError
from atoll.core.message import encoded_size
from atoll.core.tree import equal
from atoll.federated.backends.inline import Inline
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.check import problems_of
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.schedules.buffered import Buffered
from atoll.federated.select.uniform import Uniform
from atoll.federated.topologies.gossip import Gossip
from atoll.federated.topologies.tree import Tree
from atoll.federated.visit import Job

PAIRS: dict[str, dict[str, object]] = {
    "codec": {"uplink": (Quantise(bits=8),)},
    "schedule": {"schedule": Buffered(k=3)},
    "tree": {"topology": Tree(fan_out=2)},
    "gossip": {"topology": Gossip(degree=4)},
}
WORDS = {"codec": "Quantise", "schedule": "Buffered", "tree": "Tree", "gossip": "Gossip|Peers"}
SAYS = {"pacfl"}
"""Methods whose server has something to say: who is grouped with whom."""
TRAVELS_NOT = {"local_only"}
# How many rows pass a filter, or prefixes are frequent, depends on the data: a dry visit sends the most it may be.
AT_MOST = {"edgefd", "fed_hh", "pfedgate"}
NAMES = sorted(m.name for m in pkgutil.iter_modules(atoll.federated.methods.__path__))


@pytest.fixture
def world(digits_federation):
    """The digits, with a public part for methods whose server owns data."""
    public = digits_federation.test.select(range(100))
    return replace(digits_federation, test=digits_federation.test.select(range(100, 300)), public=public)


def trace(rows):
    """All that a run says about itself, but real time."""
    return [
        (r.round, r.time, r.replies, r.down_bytes, r.up_bytes, r.flops, r.refused, r.notes, dict(r.metrics))
        for r in rows
    ]


@pytest.mark.parametrize("name", NAMES)
def test_two_rounds(name, build, run, world):
    rows = run(build(name), rounds=2, federation=world)
    for row in rows:
        assert row.refused == {}
        assert row.notes == [] or name in SAYS
        assert row.replies > 0
        assert all(size > 0 for size in (*row.up_bytes.values(), *row.down_bytes.values()))
    engine = rows[-1].engine
    for tree in engine.state.replica.values():
        assert all(bool(torch.isfinite(t).all()) for t in tree.values())
    broadcast = engine.state.broadcast
    payload = broadcast.common.payload_bytes + sum(m.payload_bytes for m in broadcast.per_site.values())
    assert (payload == 0) == (name in TRAVELS_NOT)

    again = run(build(name), rounds=2, federation=world)
    assert trace(rows) == trace(again)
    for part, tree in engine.state.replica.items():
        assert equal(tree, again[-1].engine.state.replica[part]), part


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_visit_has_the_size_of_a_real_one(name, build, run, world):
    """At a site's first visit and at a later one: what a plan foresees is what the wire carries."""
    for rounds in (1, 2):
        engine = run(build(name), rounds=rounds, federation=world)[-1].engine
        worker, tags = engine.workers.local, engine.state.tags
        site = min(engine.row.up_bytes)
        before = worker.states.get(site, tags[site]) if site in tags else None
        job = Job(site, engine.round, 9, 1, engine.state.broadcast.per_site.get(site), tags.get(site), dry=True)
        dry, real = worker.run(job), worker.run(replace(job, dry=False))
        assert (dry.error, real.error) == ("", "")
        planned, sent = encoded_size(dry.message), encoded_size(real.message)
        assert planned >= sent if name in AT_MOST else planned == sent
        assert dry.flops >= real.flops if name in AT_MOST else dry.flops == real.flops
        assert dry.state_tag is None
        if before is not None:
            after = worker.states.get(site, tags[site])
            assert all(equal(before.parts[p], after.parts[p]) for p in before.parts)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", PAIRS)
def test_it_composes_with_the_same_bits_in_the_pool_or_is_refused(name, part, build, run, world):
    """Each method with one other part and some of its sites, on two backends."""
    made = build(name).but(**PAIRS[part])
    if problems_of(made):
        with pytest.raises(RecipeError, match=WORDS[part]):
            run(made, rounds=1, federation=world)
        return
    if made.schedule.synchronous and name != "centralised":
        made = made.but(select=Uniform(count=4))
    ends = []
    for backend in (Inline(), ProcessPool(workers=2)):
        rows = run(made, rounds=2, federation=world, backend=backend)
        for row in rows:
            assert row.refused == {}
            assert row.notes == [] or name in SAYS
        ends.append((trace(rows), rows[-1].engine.state))
    (said, state), (said_, state_) = ends
    assert said == said_
    for mine, theirs in ((state.replica, state_.replica), (state.server, state_.server)):
        assert mine.keys() == theirs.keys()
        assert all(equal(mine[p], theirs[p]) for p in mine)


@pytest.mark.parametrize("name", NAMES)
def test_the_builder_says_what_it_is(name, build):
    module = importlib.import_module(f"atoll.federated.methods.{name}")
    builder, made = getattr(module, name), build(name)
    assert made.card == module.CARD
    assert made.card.name == name
    assert set(made.arguments) == set(inspect.signature(builder).parameters)
    described = inspect.getdoc(builder) or ""
    for argument in made.arguments:
        assert f"{argument}:" in described, f"`{argument}` has no line under Args"
