"""A real federation on this machine: separate processes, TLS, node authentication."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

pytest.importorskip("flwr")

from safetensors.torch import load_file

from atoll.deploy.keys import make_certificates, make_site_key
from atoll.recipes.recipe import load_recipe
from atoll.recipes.run import start

ATOLL = [sys.executable, "-c", "from atoll.cli import main; main()"]
PATIENCE = 300.0  # seconds that anything here may take on a busy machine


class Deployment:
    """Files and processes of one federation."""

    def __init__(self, folder: Path, names: list[str], pace: float = 0.1) -> None:
        self.folder, self.names, self.pace = folder, names, pace
        make_certificates(folder / "certificates", ["127.0.0.1"])
        (folder / "sites").mkdir()
        for name in names:
            make_site_key(folder / "keys" / f"{name}.key").rename(folder / "sites" / f"{name}.pub")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.program = ATOLL

    def _start(self, name: str, *arguments: Any) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                [*self.program, *map(str, arguments)],
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self.processes[name] = process
        return process

    def site(self, name: str, *more: Any, rows: tuple[Any, ...] = ("--rehearse",)) -> subprocess.Popen[bytes]:
        return self._start(
            name, "join", "--server", f"127.0.0.1:{self.port}", "--certificate", "certificates/ca.pem",
            "--key", f"keys/{name}.key", "--out", f"site-{name}", "--pace", self.pace, *rows, *more,
        )  # fmt: skip

    def serve(self, recipe: dict[str, Any] | str, out: str = "run", *more: Any) -> subprocess.Popen[bytes]:
        if isinstance(recipe, dict):
            path = self.folder / f"{out}.yaml"
            path.write_text(yaml.safe_dump(recipe))
            where: tuple[Any, ...] = (path, "--out", out)
        else:
            where = (recipe,)
        return self._start(
            "server", "server", *where, "--host", "127.0.0.1", "--port", self.port, "--certificates", "certificates",
            "--sites", "sites", "--rehearse", *more,
        )  # fmt: skip

    def finished(self, seconds: float = PATIENCE) -> str:
        """Wait for the server to end well; what it printed."""
        code = self.processes["server"].wait(seconds)
        said = self.log("server")
        assert code == 0, said + "\n".join(f"--- {n}\n{self.log(n)[-1500:]}" for n in self.names)
        return said

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def rounds(self, out: str = "run") -> list[dict[str, Any]]:
        path = self.folder / out / "events.jsonl"
        if not path.exists():
            return []
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [e for e in map(json.loads, lines) if e["event"] == "round"]

    def until(self, done: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                raise AssertionError(f"no {what} within {seconds} s\n{self.log('server')}")
            time.sleep(0.02)

    def child(self, name: str, module: str) -> int:
        """The process id of a Flower program that one of our processes has started."""
        found = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
        for line in found.splitlines():
            pid, parent, arguments = line.split(None, 2)
            if int(parent) == self.processes[name].pid and module in arguments:
                return int(pid)
        raise AssertionError(f"{name} has no child {module}:\n{found}")

    def kill(self, name: str) -> None:
        """End one of our processes and the Flower program under it, without a chance to say goodbye."""
        module = "atoll.deploy.superlink" if name == "server" else "atoll.deploy.supernode"
        child = self.child(name, module)
        os.kill(self.processes[name].pid, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)
        self.processes[name].wait()

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for name, process in self.processes.items():
            with contextlib.suppress(subprocess.TimeoutExpired, AssertionError):
                process.wait(20)
                continue
            self.kill(name)


EXACT = ("round", "time", "replies", "down_bytes", "up_bytes", "flops", "refused", "notes", "site_metrics", "metrics")


def inline(recipe: dict[str, Any], folder: Path) -> Path:
    """The same recipe in one process; its run directory."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    run, _ = start(load_recipe(str(path)), folder)
    run.go()
    return folder


def rounds(folder: Path) -> list[dict[str, Any]]:
    """What the ledger says of each round, but for real seconds."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [{k: e.get(k) for k in EXACT} for e in events if e["event"] == "round"]


def same(one: Path, other: Path) -> bool:
    """Whether two safetensors files hold the same bits."""
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and bool((a[n] == b[n]).all()) for n in a)


@pytest.fixture
def compare() -> SimpleNamespace:
    return SimpleNamespace(inline=inline, rounds=rounds, same=same)


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Callable[..., Deployment]]:
    made: list[Deployment] = []

    def make(*names: str, **options: Any) -> Deployment:
        (tmp_path / str(len(made))).mkdir()
        made.append(Deployment(tmp_path / str(len(made)), list(names), **options))
        return made[-1]

    yield make
    for d in made:
        d.close()
