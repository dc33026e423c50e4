"""``kill -9`` at random moments, resume, and the model has the same bits as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import safetensors.torch

from atoll.core.errors import RunError
from atoll.core.files import read_json_lines
from atoll.core.tree import equal
from atoll.federated import checkpoint
from atoll.recipes.recipe import read_recipe, replace
from atoll.recipes.run import finished, reopen, start

RECIPES = {
    "site state": {"method": "scaffold"},
    "in flight": {
        "method": {"name": "fedbuff", "k": 3, "concurrency": 5},
        "devices": {"name": "spread", "percent": 80},
    },
    "error feedback": {"uplink": [{"name": "top_k", "fraction": 0.1}, {"name": "quantise", "bits": 8}]},
    "server moments, private norms": {"method": {"name": "fedopt", "optimizer": "yogi"}},
    "letters": {"topology": {"name": "gossip", "degree": 2}},
    "process pool": {"method": "scaffold", "backend": {"name": "process_pool", "workers": 2}},
}


PEEK = os.WEXITED | os.WNOHANG | os.WNOWAIT


def recipe(name: str):
    base = {"name": "killed", "rounds": 12, "sites": 6, "model": {"name": "mlp", "hidden": [16]}}
    return read_recipe({**base, "select": {"name": "uniform", "fraction": 0.7}, **RECIPES[name]})


def weights(folder):
    """Of the global model, or of every site's own."""
    files = sorted((folder / "model").rglob("model.safetensors"))
    assert files
    return {f"{f.parent.name}/{n}": t for f in files for n, t in safetensors.torch.load_file(f).items()}


def in_child(work) -> int:
    """Run ``work`` in a forked process; returns its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def kill_soon(pid: int, events, more_lines: int, then: float) -> None:
    """Kill the process a moment after it has written so many more lines (or has ended by itself)."""

    def lines() -> int:
        return len(events.read_bytes().splitlines()) if events.exists() else 0

    goal, patience = lines() + more_lines, time.monotonic() + 20
    while lines() < goal and time.monotonic() < patience and os.waitid(os.P_PID, pid, PEEK) is None:
        time.sleep(0.001)
    time.sleep(then)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_resumes_to_the_same_bits(name, tmp_path):
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    start(recipe(name), calm)[0].go()
    start(recipe(name), wild)
    luck, kills = random.Random(name), 0
    for _ in range(60):
        pid = in_child(lambda: reopen(wild).go())
        if kills < 10:
            kill_soon(pid, wild / "events.jsonl", more_lines=luck.randint(0, 2), then=luck.uniform(0, 0.02))
        _, status = os.waitpid(pid, 0)
        kills += os.WIFSIGNALED(status)
        if finished(wild) is not None:
            break
    assert kills >= 4
    assert equal(weights(calm), weights(wild))
    expected = [e for e in read_json_lines(calm / "events.jsonl") if e["event"] == "round"]
    got = [e for e in read_json_lines(wild / "events.jsonl") if e["event"] == "round"]
    for a, b in zip(expected, got, strict=True):
        for field in ("round", "metrics", "up_bytes", "down_bytes", "flops", "time", "replies"):
            assert a[field] == b[field], field
    states = list((wild / "state" / "sites").glob("*")) if (wild / "state" / "sites").exists() else []
    assert len(states) <= 6 + 1, "states of rounds long gone are still there"


def half(name: str, folder):
    """A run of two merges whose recipe then asks for twelve."""
    start(replace(recipe(name), rounds=2), folder)[0].go()
    return reopen(folder, recipe(name))


def test_an_event_file_that_has_lost_lines_is_not_filled_with_zeros(tmp_path):
    again = half("site state", tmp_path)
    os.truncate(tmp_path / "events.jsonl", 10)
    with pytest.raises(RunError, match=r"events\.jsonl"):
        again.go()
    assert (tmp_path / "events.jsonl").stat().st_size == 10


@pytest.mark.parametrize("loss", ["gone", "empty"])
def test_a_lost_site_state_is_said_at_once(tmp_path, loss):
    again = half("site state", tmp_path)
    one = next((tmp_path / "state" / "sites").iterdir())
    if loss == "gone":
        one.unlink()
    else:
        one.write_bytes(b"")
    with pytest.raises(RunError, match="states are missing"):
        again.go()


def test_lines_are_on_the_disk_before_the_checkpoint_that_counts_them(tmp_path, monkeypatch):
    order, fsync, save = [], os.fsync, checkpoint.save
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: (order.append("checkpoint"), save(*a, **k))[1])
    start(replace(recipe("site state"), rounds=1), tmp_path)[0].go()
    assert order[order.index("checkpoint") - 1].endswith("events.jsonl")
