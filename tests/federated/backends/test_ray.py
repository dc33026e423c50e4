"""Actors give the same bits as the inline backend, die without harm, and leave nothing behind."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import signal
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from atoll.core.errors import RunError, SiteFailed
from atoll.core.message import Message
from atoll.core.tree import equal
from atoll.data.dataset import Dataset
from atoll.federated.backends import ray as backend
from atoll.federated.backends.inline import Inline
from atoll.federated.backends.ray import Ray, share
from atoll.federated.engine import Engine
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.method import DeviceProfile, LocalWork, Method
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.scaffold import scaffold
from atoll.federated.secure.secure_sum import SecureSum
from atoll.federated.visit import Job, Outcome, Publication, Setup
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import plan, prepare
from atoll.tasks.classification import Classification

pytest.importorskip("ray")


def weights(rows):
    return rows[-1].engine.state.replica["weights"]


@pytest.fixture
def setup(digits_task, digits_federation):
    return Setup(
        task=digits_task, federation=digits_federation, method=fedavg(), profiles=(DeviceProfile(),) * 5, seed=0
    )


@pytest.fixture
def workers(setup, crew):
    opened = crew.open(setup)
    replica = setup.method.share.initial(opened.local.site_model(None).model)
    opened.publish(Publication(0, replica, Message("weights", replica)))
    yield opened
    opened.close()


def descendants() -> set[int]:
    """Process ids of everything that this process has started, and what that has started."""
    parent = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, above = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
                if state != "Z":
                    parent[int(entry.name)] = int(above)
    found, grown = {os.getpid()}, True
    while grown:
        more = {p for p, above in parent.items() if above in found} - found
        found, grown = found | more, bool(more)
    return found - {os.getpid()}


# ------------------------------------------------------------------- before the module's own cluster is up


def test_a_run_starts_a_cluster_and_leaves_nothing_behind(run):
    import ray

    before, handler = descendants(), signal.getsignal(signal.SIGTERM)
    started: list[set[int]] = []
    rows = run(fedavg(), backend=Ray(workers=1), on_merge=lambda *_: started.append(descendants() - before))
    assert equal(weights(run(fedavg())), weights(rows))
    assert len(started[0]) >= 3
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is handler
    waiting = time.monotonic() + 5
    while started[0] & descendants() and time.monotonic() < waiting:
        time.sleep(0.05)
    assert not started[0] & descendants()
    assert not rows[-1].engine.workers._crew.folder.exists()


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1", "127.0.0.1", "head:port"])
def test_no_cluster_to_join_is_said(run, address, monkeypatch):
    # ``auto`` looks at all processes of the machine, where another test may be running a cluster of its own just now.
    def none_here(*_, **__):
        raise ConnectionError("Could not find any running Ray instance.")

    if address == "auto":
        monkeypatch.setattr("ray._private.services.get_ray_address_from_environment", none_here)
    with pytest.raises(RunError, match=f"Cannot join '{address}'"):
        run(fedavg(), backend=Ray(workers=1, address=address))


def test_without_ray_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"pip install atoll\[ray\]"):
        run(fedavg(), backend=Ray())


def test_a_recipe_moves_to_ray_by_one_line(tmp_path):
    recipe = read_recipe({"sites": 4, "rounds": 2, "backend": {"name": "ray", "workers": 3}})
    assert recipe.backend == Ray(workers=3)
    inline = read_recipe({"sites": 4, "rounds": 2})
    ours, theirs = plan(prepare(recipe)), plan(prepare(inline))
    assert (ours.up_bytes, ours.down_bytes) == (theirs.up_bytes, theirs.down_bytes)


# ------------------------------------------------------------------- what crosses


def test_the_rows_are_shared_once_and_read_in_place(setup, digits):
    shared = share(setup)
    stored = sum(c.numel() * c.element_size() for c in digits.columns.values())
    rows = 8 * sum(len(p.rows) for s in setup.federation.sites for p in (s.train, s.validation, s.test))
    assert sum(a.nbytes for a in shared) < stored + 2 * rows + 50_000
    for a in shared:
        a.flags.writeable = False  # as they come out of the store
    read = pickle.loads(shared[0], buffers=shared[1:])
    for mine, theirs in zip(setup.federation.sites, read.federation.sites, strict=True):
        for part in ("train", "validation", "test"):
            a, b = getattr(mine, part), getattr(theirs, part)
            assert equal(a.ready(), b.ready())
            assert any(np.shares_memory(b.columns["x"].numpy(), buffer) for buffer in shared[1:])


def test_columns_of_every_type_and_layout_arrive(setup, digits):
    columns = {
        "x": torch.randn(600, 8, 8).bfloat16(),
        "y": torch.arange(1200)[::2],
        "flag": torch.zeros(600, dtype=torch.bool),
        "wide": torch.randn(7, 600).t(),
        "empty": torch.zeros(600, 0),
    }
    odd = Dataset(columns, digits.info)
    shared = share(odd)
    assert equal(dict(odd.columns), dict(pickle.loads(shared[0], buffers=shared[1:]).columns))


def test_code_that_no_worker_can_import_travels(setup, tmp_path):
    (tmp_path / "home_made.py").write_text(
        "class Odd:\n    def f(self):\n        return helper()\ndef helper():\n    return 42\n"
    )
    spec = importlib.util.spec_from_file_location("home_made", tmp_path / "home_made.py")
    sys.modules["home_made"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shared = share(module.Odd())
    del sys.modules["home_made"]
    assert pickle.loads(shared[0], buffers=shared[1:]).f() == 42


def test_what_cannot_be_sent_is_said(setup):
    with pytest.raises(RunError, match="cannot be sent"):
        share(threading.Lock())


# ------------------------------------------------------------------- sites and actors that fail


@dataclass(frozen=True)
class Misbehaving(LocalWork):
    """Site 1 does something nasty: at every visit from round ``after``, or, where a note is to be left, once."""

    what: str
    note: Path | None = None
    after: int = 0
    inner: LocalSGD = field(default_factory=LocalSGD)

    def run(self, visit):
        result = self.inner.run(visit)
        if visit.site.site != 1 or visit.round < self.after:
            return result
        if self.note is not None:
            if self.note.exists():
                return result
            self.note.touch()
        if self.what == "raise":
            raise RuntimeError("disk full")
        if self.what == "die":
            os._exit(9)
        if self.what == "hang":
            time.sleep(60)
        if self.what == "stuck":  # in code that no alarm interrupts
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            time.sleep(60)
        if self.what == "nan":
            next(iter(result.message.parts["delta"].values())).view(-1)[0] = float("nan")
        if self.what == "unspeakable":
            return type(result)(Message("delta", {}, {"loss": float("nan")}))
        return result


@pytest.mark.parametrize("secure", [None, SecureSum(bits=24)], ids=["open", "secure"])
def test_a_visit_whose_actor_dies_is_done_again(run, crew, tmp_path, secure):
    ours, inner = scaffold().but(secure=secure), scaffold().local
    rows = run(ours.but(local=Misbehaving("die", tmp_path / "note", 1, inner)), backend=crew)
    assert (tmp_path / "note").exists()
    assert all(row.refused == {} for row in rows)
    plain = run(ours)
    assert equal(weights(plain), weights(rows))
    assert [r.metrics for r in plain] == [r.metrics for r in rows]
    assert len(crew.seats) == 2


def test_a_visit_that_kills_two_actors_is_the_sites_failure(run, crew):
    rows = run(Method(local=Misbehaving("die")), rounds=1, backend=crew)
    assert "died 2 times" in rows[0].refused[1]
    assert rows[0].replies == 4
    assert equal(weights(run(Method(local=Misbehaving("raise")), rounds=1)), weights(rows))


REASONS = {"raise": "disk full", "nan": "NaN", "unspeakable": "", "hang": "no answer within 0.5 s"}


@pytest.mark.parametrize("what", ["nothing", "die", "stuck"])
def test_short_visits_share_a_call_and_their_fates_are_their_own(run, crew, monkeypatch, what):
    monkeypatch.setattr(backend, "GRACE", 0.3)
    monkeypatch.setattr(backend, "SPREAD", 0.1)
    together, call = [], backend.RayWorkers._call

    def watched(self, seat, tickets):
        together.append(len(tickets))
        call(self, seat, tickets)

    monkeypatch.setattr(backend.RayWorkers, "_call", watched)
    ours = Misbehaving(what, after=1)
    rows = run(Method(local=ours), rounds=2, backend=crew, timeout=2.0 if what == "stuck" else None)
    plain = run(Method(local=replace(ours, what="nothing" if what == "nothing" else "raise")), rounds=2)
    assert max(together) > 1
    assert [list(r.refused) for r in rows] == [list(r.refused) for r in plain]
    assert [r.metrics for r in rows] == [r.metrics for r in plain]
    assert equal(weights(plain), weights(rows))


@pytest.mark.parametrize("what", REASONS)
def test_a_bad_site_is_counted_and_the_run_goes_on(run, crew, what):
    seats = list(crew.seats)
    local = Misbehaving(what)
    rows = run(Method(local=local), rounds=2, backend=crew, timeout=0.5 if what == "hang" else None)
    for row in rows:
        assert REASONS[what] in row.refused[1]
        assert row.replies == 4
    assert crew.seats == seats, "an error within a visit does not cost an actor"


def test_an_actor_that_no_alarm_reaches_is_ended_when_it_is_late(run, crew, monkeypatch):
    monkeypatch.setattr(backend, "GRACE", 0.3)
    row = run(Method(local=Misbehaving("stuck")), rounds=1, backend=crew, timeout=0.7)[0]
    assert "no answer within 0.7 s, so its process was ended" in row.refused[1]
    assert row.replies == 4


def test_what_sites_keep_outlives_an_actor_and_the_backend(setup, run, crew, tmp_path):
    setup = replace(setup, method=scaffold(), state_folder=tmp_path / "sites")
    first = Engine(setup, crew.open(setup))
    first.step()
    for seat in [s for s in crew.seats if s.ready]:
        first.workers._lost(seat, "")  # whoever served a site is gone
    first.step()
    first.workers.close()
    then = Engine(setup, Inline().open(setup), first.state)
    then.step()
    again = Engine(setup, crew.open(setup), then.state)
    again.step()
    again.workers.close()
    assert equal(again.state.replica["weights"], weights(run(scaffold(), rounds=4)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sites"]


def test_a_machine_that_does_not_see_the_states_may_run_only_what_keeps_none(setup, crew, monkeypatch):
    welcome = backend.RayWorkers._welcome

    def elsewhere(self, seat):
        self._beacon.write_text("of another disk")
        welcome(self, seat)

    monkeypatch.setattr(backend.RayWorkers, "_welcome", elsewhere)
    for method in (fedavg(), scaffold()):
        ours = replace(setup, method=method)
        engine = Engine(ours, crew.open(ours))
        try:
            if method.share == fedavg().share:
                assert engine.step().refused == {}
            else:
                with pytest.raises(RunError, match="does not see"):
                    engine.step()
        finally:
            engine.workers.close()


def test_a_cluster_without_room_is_said(run, crew, monkeypatch):
    monkeypatch.setattr(backend, "START_LIMIT", 1.0)
    with pytest.raises(RunError, match="of 2 CPUs and 0 GPUs"):
        run(fedavg(), backend=Ray(workers=1))


# ------------------------------------------------------------------- who does what, and how much waits


def test_replies_wait_in_bounded_memory_and_the_sum_is_the_same(run, crew, monkeypatch):
    held, call = [], backend.RayWorkers._call

    def watched(self, seat, tickets):
        call(self, seat, tickets)
        held.append(len(self._held))

    monkeypatch.setattr(backend.RayWorkers, "_call", watched)
    monkeypatch.setattr(backend, "SPREAD", 0.1)
    monkeypatch.setattr(crew, "about", Ray(workers=2, held_bytes=1))
    tight = run(fedavg(), backend=crew)
    assert equal(weights(run(fedavg())), weights(tight))
    assert max(held) <= 2 * 2 + 1


def test_a_site_goes_to_the_actor_that_knows_it_unless_another_would_idle(workers):
    a, b = seats = workers._crew.seats
    while not all(s.ready for s in seats):
        workers._patience()
        for call in list(workers._seat_of):
            workers._receive(call)
    workers._home = {0: a, 1: b, 2: b}
    workers._work = {t: Job(t, 0) for t in range(5)}
    workers._waiting = dict.fromkeys(range(3))
    assert workers._choose(a, None) == 0
    assert workers._choose(b, None) == 1
    del workers._waiting[0]
    assert workers._choose(a, None) == 1, "idle: takes what another knows"
    a.calls["running"] = [4]
    assert workers._choose(a, None) is None, "busy: leaves it to the other"
    assert workers._choose(a, 2) == 2, "somebody waits for it"
    workers._held, workers._reply_size = set(range(100, 104)), 1 << 40
    assert workers._choose(b, None) is None, "many replies wait"
    assert workers._choose(b, 2) == 2, "somebody waits for it, so it must run"
    a.calls.clear()
    workers._held.clear()
    workers._waiting.clear()


def test_results_may_be_asked_for_in_any_order(workers):
    tickets = workers.submit([Job(site, 0) for site in range(5)])
    outcomes = {t: workers.result(t) for t in reversed(tickets)}
    assert all(isinstance(o, Outcome) and o.site == t and not o.error for t, o in outcomes.items())
    for t in tickets:
        workers.release(t)
    assert not workers._held


def test_questions_are_answered_or_refused(workers):
    said = workers.ask({3: Message("what time is it"), 0: Message("weather")})
    assert list(said) == [3, 0]
    assert "does not answer `weather`" in said[0]


@dataclass(frozen=True)
class Judge(Classification):
    """Cannot evaluate."""

    def evaluate(self, model, data):
        raise RuntimeError("no such metric")


def test_an_evaluation_that_fails_is_not_silence(run, digits_task, crew):
    task = Judge(digits_task.info, digits_task.network)
    with pytest.raises(SiteFailed, match="no such metric"):
        run(fedavg(), rounds=1, task=task, evaluate_every=0, backend=crew,
            on_merge=lambda engine, _: engine.evaluate_sites())  # fmt: skip
