"""What a round costs in a real deployment: separate processes, TLS, node authentication, loopback.

    python benchmarks/deployment.py                 2 and 4 sites at several paces, and stock Flower
    python benchmarks/deployment.py --arms atoll-2-0.5 --rounds 5
    python benchmarks/report.py                     the table from the records

An arm is ``atoll-SITES-PACE``: seconds for which a SuperNode sleeps when it found no message (3 is Flower's own), or
``flower-SITES``: stock SuperLink, SuperNodes and FedAvg without TLS, and sites that only send back what they got. All
federate the same network; Atoll's sites train one epoch a round over equal shares of Fashion-MNIST. Its programs are
those of the command line; ``arms/traced.py`` has them write down when each request passes where, and a round's seconds
are those from broadcast to broadcast. ``crowd-SITES-PACE``: many connections from one process (``arms/crowd.py``) to a
real server, digits and a small network, three rounds at most.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from atoll.deploy.keys import make_certificates, make_site_key

from machine import describe
from work import cpu_seconds, memory_mb, tree

HERE = Path(__file__).resolve().parent
ARMS = ["atoll-2-3", "atoll-2-0.5", "atoll-2-0.1", "atoll-4-0.5", "atoll-4-0.1", "flower-2", "crowd-100-0.5"]
ROWS, LR, BATCH, HIDDEN = 1000, 0.05, 32, 200
STEPS = {
    "server sends": ("send", "sent"), "node asks": ("sent", "pull"), "node fetches": ("pull", "pulled"),
    "site reads": ("pulled", "read"), "site works": ("read", "worked"), "site hands over": ("worked", "handed"),
    "node sends": ("handed", "pushed"), "server takes": ("pushed", "taken"),
}  # fmt: skip
"""A request's way, by the marks between which each step lies."""
LIMIT = 300.0


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arms", type=lambda s: s.split(","), default=ARMS, help=f"default: {','.join(ARMS)}")
    p.add_argument("--rounds", type=int, default=10, help="after the first")
    p.add_argument("--repetitions", type=int, default=1)
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    runs: list[dict[str, Any]] = []
    for repetition in range(a.repetitions):
        for arm in random.sample(a.arms, len(a.arms)):
            load, parts = os.getloadavg()[0], arm.split("-")
            with tempfile.TemporaryDirectory() as folder:
                try:
                    if parts[0] == "flower":
                        got = flower(Path(folder), int(parts[1]), a.rounds)
                    elif parts[0] == "crowd":
                        got = crowd(Path(folder), int(parts[1]), float(parts[2]), min(a.rounds, 3))
                    else:
                        got = atoll(Path(folder), int(parts[1]), float(parts[2]), a.rounds)
                except (AssertionError, subprocess.SubprocessError) as e:
                    got = {"error": str(e)[-2000:]}
            runs.append({"arm": arm, "model": "mlp", "repetition": repetition, "load": load, **got})
            print(json.dumps(runs[-1]), flush=True)
    record = {
        "benchmark": "deployment", "machine": describe(), "rounds": a.rounds, "repetitions": a.repetitions,
        "rows": ROWS, "parameters": 784 * HIDDEN + HIDDEN + HIDDEN * 10 + 10, "runs": runs,
    }  # fmt: skip
    out = a.out or HERE / "results" / f"deployment-{time.strftime('%Y%m%d-%H%M%S')}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"record: {out}")
    return int(any("error" in r for r in runs))


def recipe(sites: int, rounds: int) -> dict[str, Any]:
    return {
        "name": "deployment", "data": "fashion_mnist", "partition": {"name": "iid"}, "sites": sites, "test": 0.0,
        "limit": ROWS * sites, "model": {"name": "mlp", "hidden": [HIDDEN]}, "rounds": rounds, "evaluate_every": 0,
        "method": {"name": "fedavg", "training": {"lr": LR, "epochs": 1, "batch_size": BATCH}},
    }  # fmt: skip


@contextlib.contextmanager
def ended(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Whatever happens, these processes and their children end."""
    try:
        yield
    finally:
        trees = [pid for p in processes if p.poll() is None for pid in tree(p.pid)]
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
        for pid in trees:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in processes:
            process.wait()


def start(command: Sequence[Any], folder: Path, name: str, **variables: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
    with open(folder / f"{name}.log", "ab") as log:
        return subprocess.Popen(
            [str(c) for c in command], cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def prepare(folder: Path, names: Sequence[str]) -> None:
    """Certificates and keys of a federation."""
    make_certificates(folder / "certificates", ["127.0.0.1"])
    (folder / "sites").mkdir()
    for name in names:
        make_site_key(folder / "keys" / f"{name}.key").rename(folder / "sites" / f"{name}.pub")


def serve(folder: Path, config: dict[str, Any], port: int) -> subprocess.Popen[bytes]:
    """An ``atoll server`` that leaves a trace in ``trace.jsonl``."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    command = [
        sys.executable, HERE / "arms" / "traced.py", folder / "trace.jsonl", "server", "recipe.yaml", "--out", "run",
        "--host", "127.0.0.1", "--port", port, "--certificates", "certificates", "--sites", "sites", "--rehearse",
    ]  # fmt: skip
    return start(command, folder, "server")


def atoll(folder: Path, sites: int, pace: float, rounds: int) -> dict[str, Any]:
    """A federation of real processes: seconds a round, and where they went."""
    names, port = [f"site{i}" for i in range(sites)], free_port()
    prepare(folder, names)
    processes = []
    with ended(processes):
        for name in names:
            command = [
                sys.executable, HERE / "arms" / "traced.py", folder / "trace.jsonl", "join", "--server",
                f"127.0.0.1:{port}", "--certificate", "certificates/ca.pem", "--key", f"keys/{name}.key", "--out",
                f"at-{name}", "--pace", pace, "--rehearse",
            ]  # fmt: skip
            processes.append(start(command, folder, name))
        processes.append(serve(folder, recipe(sites, rounds + 1), port))
        with watched(processes) as peak:
            code = processes[-1].wait(LIMIT)
        assert code == 0, (folder / "server.log").read_text()[-1500:]
        marks = read_trace(folder)
    took = round_seconds(marks)
    return {"round_s": statistics.median(took), "rounds_s": took, "steps_s": steps(marks), "peak_mb": round(peak[0])}


def flower(folder: Path, sites: int, rounds: int) -> dict[str, Any]:
    """The same exchange in stock Flower, as its own commands start it."""
    programs, port, marks = Path(sys.executable).parent, free_port(), folder / "marks"
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"  # they start each other by name
    variables = {"FLWR_HOME": str(folder / "home"), "FLWR_TELEMETRY_ENABLED": "0", "PATH": path}
    (folder / "home").mkdir()
    (folder / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    processes = []
    with ended(processes):
        link = [programs / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port]
        processes.append(start(link, folder, "superlink", **variables))
        until_open(port)
        for i in range(sites):
            node = [
                programs / "flower-supernode",
                "--insecure",
                "--superlink",
                f"127.0.0.1:{port}",
                "--port",
                free_port(),
            ]
            processes.append(start(node, folder, f"supernode{i}", **variables))
        config = f'rounds={rounds + 2} sites={sites} marks="{marks}"'
        run = [programs / "flwr", "run", HERE / "arms" / "flower_app", "here", "--run-config", config]
        process = start(run, folder, "run", **variables)
        assert process.wait(60) == 0, (folder / "run.log").read_text()[-1500:]
        began = time.monotonic()
        with watched(processes) as peak:
            while not marks.exists() or len(marks.read_text().splitlines()) < rounds + 2:
                assert time.monotonic() - began < LIMIT, (folder / "superlink.log").read_text()[-1500:]
                time.sleep(0.1)
    at = [float(line) for line in marks.read_text().splitlines()]
    took = [b - a for a, b in itertools.pairwise(at[1:])]
    return {"round_s": statistics.median(took), "rounds_s": took, "peak_mb": round(peak[0])}


def crowd(folder: Path, sites: int, pace: float, rounds: int) -> dict[str, Any]:
    """Many sites, each with its own connection, at one real server: seconds a round, and what that end takes."""
    port = free_port()
    prepare(folder, [f"site{i:03}" for i in range(sites)])
    config = recipe(sites, rounds + 1)
    config |= {"data": "digits", "limit": None, "model": {"name": "mlp", "hidden": [32]}}
    processes = [serve(folder, config, port)]
    with ended(processes):
        until_open(port)
        command = [sys.executable, HERE / "arms" / "crowd.py", f"127.0.0.1:{port}", folder, pace]
        processes.append(start(command, folder, "crowd"))
        until(folder, "publish")
        pids = {m["mark"]: m["pid"] for m in read_trace(folder) if m["mark"] in ("server", "superlink")}
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        peak, began = dict.fromkeys(pids, 0.0), time.monotonic()
        while processes[0].poll() is None:
            assert time.monotonic() - began < LIMIT, (folder / "server.log").read_text()[-1500:]
            for name, pid in pids.items():
                peak[name] = max(peak[name], memory_mb(pid))
                before[name + " end"] = max(before.get(name + " end", 0.0), cpu_seconds(pid))
            wall = time.monotonic() - began
            time.sleep(0.5)
        assert processes[0].returncode == 0, (folder / "server.log").read_text()[-1500:]
        marks = read_trace(folder)
    peak["server"] -= peak["superlink"]  # its child
    spent = {name: before[name + " end"] - before[name] for name in pids}
    spent["server"] -= spent["superlink"]
    took, waits = round_seconds(marks), sorted(latencies(marks))
    return {
        "round_s": statistics.median(took), "rounds_s": took, "latency_s": statistics.median(waits),
        "latency_95_s": waits[int(0.95 * (len(waits) - 1))], "superlink_peak_mb": round(peak["superlink"]),
        "server_peak_mb": round(peak["server"]), "superlink_cpu": spent["superlink"] / wall,
        "server_cpu": spent["server"] / wall,
    }  # fmt: skip


def until(folder: Path, mark: str) -> None:
    """Wait until the trace has a mark."""
    began = time.monotonic()
    while not (folder / "trace.jsonl").exists() or not any(m["mark"] == mark for m in read_trace(folder)):
        assert time.monotonic() - began < LIMIT, (folder / "server.log").read_text()[-1500:]
        time.sleep(0.5)


def latencies(marks: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds from each request for a visit to its answer, after the first round."""
    begin = [m["t"] for m in marks if m["mark"] == "publish"][1]
    sent, out = {}, []
    for m in marks:
        if m["mark"] == "send" and m["t"] > begin and m["kind"] == "visit":
            sent[m["site"]] = m["t"]
        if m["mark"] == "taken" and m["site"] in sent:
            out.append(m["t"] - sent.pop(m["site"]))
    return out


def until_open(port: int) -> None:
    """Wait until somebody listens."""
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise AssertionError(f"nobody listens on port {port}")


@contextlib.contextmanager
def watched(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[float]]:
    """The largest memory (proportional set size) of the processes and their children, in MB."""
    peak, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(2.0):
            peak[0] = max(peak[0], sum(memory_mb(p.pid) for p in processes))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def read_trace(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "trace.jsonl").read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda m: m["t"])


def round_seconds(marks: Sequence[dict[str, Any]]) -> list[float]:
    """From broadcast to broadcast; the first round is the warm-up."""
    at = [m["t"] for m in marks if m["mark"] == "publish"]
    return [b - a for a, b in itertools.pairwise(at[1:])]


def steps(marks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The median seconds of each step of a visit's way, over sites and rounds after the first."""
    nodes = next(m["nodes"] for m in marks if m["mark"] == "nodes")
    sites = {node: int(site) for site, node in nodes.items()}
    at = {m["pid"]: sites[m["node"]] for m in marks if "node" in m}  # which site a process belongs to
    begin = [m["t"] for m in marks if m["mark"] == "publish"][1]
    ways: dict[int, dict[str, float]] = {}
    found: dict[str, list[float]] = {name: [] for name in STEPS}
    for m in marks:
        site = m.get("site", at.get(m["pid"]))
        if m["t"] < begin or site is None:
            continue
        if m["mark"] == "send":
            ways[site] = {} if m["kind"] == "visit" else {"other": 0.0}
        way = ways.setdefault(site, {"other": 0.0})
        way[m["mark"]] = m["t"]
        if m["mark"] == "taken" and "other" not in way:
            for name, (a, b) in STEPS.items():
                if a in way and b in way:
                    found[name].append(max(0.0, way[b] - way[a]))
    return {name: statistics.median(times) for name, times in found.items() if times}


if __name__ == "__main__":
    sys.exit(main())
