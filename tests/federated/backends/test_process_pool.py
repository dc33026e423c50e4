"""The pool gives the same bits as the inline backend, and survives sites that misbehave."""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from atoll.core.errors import BadReply, RunError, SiteFailed
from atoll.core.message import Message
from atoll.core.tree import equal, named_tensors
from atoll.federated.backends import process_pool
from atoll.federated.backends.inline import Inline
from atoll.federated.backends.process_pool import ProcessPool, _alive, _sweep
from atoll.federated.combine.weighted_mean import WeightedMean
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.method import DeviceProfile, LocalWork, Method
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.scaffold import scaffold
from atoll.federated.select.uniform import Uniform
from atoll.federated.visit import Job, Publication, Result, Setup
from atoll.tasks.classification import Classification


def weights(rows):
    return rows[-1].engine.state.replica["weights"]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_same_bits_as_inline(run, workers):
    method = fedavg().but(select=Uniform(count=3))
    inline, pool = run(method, backend=Inline()), run(method, backend=ProcessPool(workers=workers))
    assert equal(weights(inline), weights(pool))
    for a, b in zip(inline, pool, strict=True):
        assert (a.up_bytes, a.down_bytes, a.flops, a.time) == (b.up_bytes, b.down_bytes, b.flops, b.time)
        assert a.metrics == b.metrics


def test_replies_wait_in_bounded_memory_and_the_sum_is_the_same(run):
    tight = run(fedavg(), backend=ProcessPool(workers=2, held_bytes=1))
    assert equal(weights(run(fedavg())), weights(tight))
    held = len(tight[-1].engine.workers._slots)
    assert held <= 2 * 2 + 1


def test_site_models_are_evaluated_in_the_workers(run):
    seen = []
    for backend in (Inline(), ProcessPool(workers=2)):
        run(fedavg(), rounds=1, backend=backend, on_merge=lambda engine, _: seen.append(engine.evaluate_sites()))
    assert seen[0] == seen[1]
    assert set(seen[0]) == set(range(5))


@dataclass(frozen=True)
class Misbehaving(LocalWork):
    """One site does something nasty; the others train."""

    what: str
    site: int = 1
    inner: LocalSGD = field(default_factory=LocalSGD)

    def run(self, visit):
        result = self.inner.run(visit)
        if visit.site.site != self.site:
            return result
        delta = result.message.parts["delta"]
        if self.what == "raise":
            raise RuntimeError("disk full")
        if self.what == "die":
            os._exit(9)
        if self.what == "hang":
            time.sleep(60)
        if self.what == "nan":
            next(iter(delta.values())).view(-1)[0] = float("nan")
        if self.what == "shape":
            name = next(iter(delta))
            delta[name] = delta[name][:1]
        if self.what == "name":
            delta["surprise"] = torch.zeros(3)
        if self.what == "huge":
            name = next(iter(delta))
            delta[name] = torch.zeros(1_000_000)
        return result


REASONS = {
    "raise": "disk full",
    "nan": "NaN",
    "shape": "expected",
    "name": "surprise",
    "huge": "over the limit",
    "hang": "no answer within",
    "die": "died",
}


@pytest.mark.parametrize("what", [w for w in REASONS if w != "die"])
def test_a_bad_site_is_counted_and_the_run_goes_on_inline(run, what):
    rows = run(Method(local=Misbehaving(what)), rounds=2, timeout=2.0 if what == "hang" else None, reply_limit=500_000)
    for row in rows:
        assert REASONS[what] in row.refused[1]
        assert row.replies == 4
    good = run(fedavg(), rounds=1)[0]
    assert 1 in good.up_bytes


@pytest.mark.parametrize("what", ["raise", "nan", "hang", "die"])
def test_a_bad_site_is_counted_and_the_run_goes_on_in_the_pool(run, what):
    options = {"timeout": 0.8 if what == "hang" else None, "backend": ProcessPool(workers=2)}
    rows = run(Method(local=Misbehaving(what)), rounds=2, **options)
    for row in rows:
        assert REASONS[what] in row.refused[1]
        assert row.replies == 4


def test_a_round_in_which_everybody_fails_leaves_the_model_as_it_is(run):
    @dataclass(frozen=True)
    class Never(LocalWork):
        def run(self, visit):
            raise RuntimeError("no power")

    rows = run(Method(local=Never()), rounds=2)
    assert all("no usable reply" in row.notes[0] for row in rows)
    assert all(len(row.refused) == 5 for row in rows)
    untouched = run(fedavg(), rounds=1)[0].engine.workers.local.setup.task.model(0)
    before = {n: p.detach() for n, p in untouched.named_parameters()}
    assert equal(weights(rows), before)


def test_workers_of_a_killed_run_go_away_and_their_blocks_are_swept(digits_task, digits_federation):
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        setup = Setup(
            task=digits_task, federation=digits_federation, method=fedavg(), profiles=(DeviceProfile(),) * 5, seed=0
        )
        pool = ProcessPool(workers=2).open(setup)
        pids = " ".join(str(p.process.pid) for p in pool._processes)
        os.write(write, f"{pids} {pool._folder}".encode())
        time.sleep(60)
        os._exit(0)
    *pids, folder = os.read(read, 1000).decode().split()
    assert os.path.exists(folder)  # while it lives; afterwards any other pool on this machine may sweep it
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    waiting = time.monotonic() + 10
    while any(_alive(int(p)) for p in pids) and time.monotonic() < waiting:
        time.sleep(0.05)
    assert not any(_alive(int(p)) for p in pids)
    _sweep(Path(folder).parent)
    assert not os.path.exists(folder)


def test_a_skipped_merge_leaves_site_states_as_they_were(run):
    @dataclass(frozen=True)
    class Refuses(WeightedMean):
        def combine(self, replies, context):
            if context.round == 1:
                raise BadReply("not today")
            return super().combine(replies, context)

    tags = []
    method = scaffold().but(combine=Refuses(by="uniform"))
    rows = run(method, rounds=3, on_merge=lambda engine, _: tags.append(dict(engine.state.tags)))
    assert "not today" in rows[1].notes[0]
    assert tags[0] == tags[1] != tags[2]
    server, states = rows[-1].engine.state.replica, rows[-1].engine.workers.local.states
    kept = [states.get(site, tag).parts for site, tag in tags[2].items()]
    for name, c in server["control"].items():
        mean = torch.stack([parts["local.control"][name] for parts in kept]).mean(0)
        assert torch.allclose(mean, c, atol=1e-6)


@pytest.fixture
def pool(digits_task, digits_federation):
    """An open pool of one worker."""
    setup = Setup(
        task=digits_task, federation=digits_federation, method=fedavg(), profiles=(DeviceProfile(),) * 5, seed=0
    )
    opened = ProcessPool(workers=1).open(setup)
    yield opened
    opened.close()


def replica_of(pool, extra: int = 0):
    named = {n: t.clone() for n, t in named_tensors(pool.local.site_model(None).model).items()}
    return {"weights": named, "more": {"x": torch.zeros(extra)}}


def test_publications_of_changing_size_lie_in_one_block(pool):
    for extra in (1, 5_000, 10, 20_000, 3, 40_000):
        parts = replica_of(pool, extra)
        pool.publish(Publication(0, parts, Message("weights", parts)))
    assert len(list(pool._folder.glob("replica*"))) == 1


def test_a_worker_that_lags_behind_never_reads_a_publication_that_is_being_replaced(pool):
    parts = replica_of(pool, 5_000)
    pool.publish(Publication(0, parts, Message("weights", parts)))
    pool.result(pool.submit([Job(0, 0)])[0])
    worker = pool._processes[0].process.pid
    os.kill(worker, signal.SIGSTOP)
    pool.publish(Publication(0, parts, Message("weights", parts)))
    parts = replica_of(pool, 10)
    pool.publish(Publication(0, parts, Message("weights", parts)))
    os.kill(worker, signal.SIGCONT)
    assert pool.result(pool.submit([Job(0, 1)])[0]).error == ""


def test_a_worker_that_cannot_start_ends_the_run(run, monkeypatch):
    monkeypatch.setattr(process_pool, "_serve", lambda *_: os._exit(3))
    with pytest.raises(RunError, match="start"):
        run(fedavg(), rounds=1, backend=ProcessPool(workers=2))


def test_the_time_that_a_worker_takes_to_start_is_not_the_sites(run, monkeypatch):
    serve = process_pool._serve

    def late(*arguments):
        time.sleep(1.0)
        serve(*arguments)

    monkeypatch.setattr(process_pool, "_serve", late)
    monkeypatch.setattr(process_pool, "GRACE", 0.1)
    rows = run(fedavg(), rounds=1, backend=ProcessPool(workers=1), timeout=0.5)
    assert rows[0].refused == {}


@dataclass(frozen=True)
class Judge(Classification):
    """Evaluates slowly, or not at all."""

    seconds: float = 0.0

    def evaluate(self, model, data):
        if not self.seconds:
            raise RuntimeError("no such metric")
        time.sleep(self.seconds)
        return super().evaluate(model, data)


def sites_evaluated(run, task, **options):
    found = []
    run(fedavg(), rounds=1, task=task, evaluate_every=0, backend=ProcessPool(workers=2), **options,
        on_merge=lambda engine, _: found.append(engine.evaluate_sites()))  # fmt: skip
    return found[0]


def test_an_evaluation_that_fails_is_not_silence(run, digits_task):
    with pytest.raises(SiteFailed, match="no such metric"):
        sites_evaluated(run, Judge(digits_task.info, digits_task.network))


def test_the_time_limit_is_for_visits_not_for_evaluations(run, digits_task, monkeypatch):
    monkeypatch.setattr(process_pool, "GRACE", 0.05)
    slow = Judge(digits_task.info, digits_task.network, seconds=0.6)
    assert all(sites_evaluated(run, slow, timeout=0.4).values())


@dataclass(frozen=True)
class Unspeakable(LocalWork):
    """Replies with something that no message can hold."""

    what: str

    def run(self, visit):
        if self.what == "complex":
            return Result(Message("delta", {"delta": {"x": torch.zeros(1, dtype=torch.complex64)}}))
        return Result(Message("delta", {}, {"loss": float("nan")}))


@pytest.mark.parametrize("what", ["complex", "nan fact"])
@pytest.mark.parametrize("backend", [Inline(), ProcessPool(workers=1)], ids=["inline", "pool"])
def test_a_reply_that_cannot_be_encoded_is_the_sites_failure(run, what, backend):
    row = run(Method(local=Unspeakable(what)), rounds=1, backend=backend)[0]
    assert len(row.refused) == 5
    assert "died" not in row.refused[0]


def test_shared_memory_that_is_full_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(RunError, match="shared memory"):
        process_pool.Block(tmp_path / "block").ensure(100)
