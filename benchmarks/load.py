"""A thousand simulated sites, a hundred a round, on every backend that runs here.

    python benchmarks/load.py                       inline, process pool and Ray, two workers each
    python benchmarks/load.py --sites 100 --rounds 3 --repetitions 1
    python benchmarks/report.py                     the table from the records

Each arm runs in fresh processes, in a new random order in each repetition. *First result* is the time from the launch
of the program to the end of its first round: imports, data, starting workers and the round itself. Peak memory comes
from runs of its own. After the last round all arms must have the same weights to the bit, or the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atoll.data.dataset import Federation, SiteData
from atoll.data.sources.fashion_mnist import FashionMnist
from atoll.federated.backends.inline import Inline
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.backends.ray import Ray
from atoll.federated.engine import federate
from atoll.federated.local.training import Training
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.select.uniform import Uniform
from atoll.models.mlp import MLP
from atoll.tasks.classification import Classification

from machine import describe
from work import BATCH, HIDDEN, LR, memory_mb, tree

HERE, SEED, MODEL, LIMIT = Path(__file__).resolve().parent, 7, "small", 120
BACKENDS = {"inline": Inline(), "pool": ProcessPool(workers=2), "ray": Ray(workers=2)}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arms", type=lambda s: s.split(","), default=list(BACKENDS), help="e.g. inline,ray")
    p.add_argument("--sites", type=int, default=1000)
    p.add_argument("--per-round", type=int, default=100)
    p.add_argument("--rounds", type=int, default=10, help="after the first")
    p.add_argument("--repetitions", type=int, default=3)
    p.add_argument("--data", help="folder with the Fashion-MNIST files")
    p.add_argument("--out", type=Path)
    p.add_argument("--arm", help=argparse.SUPPRESS)
    a = p.parse_args()
    if unknown := [arm for arm in a.arms if arm not in BACKENDS]:
        p.error(f"unknown: {', '.join(unknown)}; arms: {', '.join(BACKENDS)}")
    if a.arm:
        work(a)
        return 0
    runs: list[dict[str, Any]] = []
    for repetition in range(a.repetitions + 1):
        for arm in random.sample(a.arms, len(a.arms)):
            got = launch(arm, sys.argv[1:], memory=repetition == a.repetitions)
            runs.append({"arm": arm, "model": MODEL, "repetition": repetition, **got})
            print(json.dumps(runs[-1]), flush=True)
    bad = any("error" in r for r in runs) or len({r["weights"] for r in runs}) != 1
    record = {
        "benchmark": "load", "machine": describe(), "sites": a.sites, "per_round": a.per_round, "rounds": a.rounds,
        "repetitions": a.repetitions, "same_weights": not bad, "runs": runs,
    }  # fmt: skip
    out = a.out or HERE / "results" / f"load-{time.strftime('%Y%m%d-%H%M%S')}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"record: {out}")
    return int(bad)


def launch(arm: str, arguments: list[str], memory: bool) -> dict[str, Any]:
    """One fresh process of an arm: what it reported, or ``error``; with ``memory``, watched, so its times are void."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryFile("w+") as out:
        started = time.time()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "BENCH_LAUNCHED": str(started)}
        command = [sys.executable, __file__, *arguments, "--arm", arm]
        process = subprocess.Popen(command, cwd=HERE, env=environment, stdout=out, stderr=subprocess.STDOUT)
        peak, over = [0.0], threading.Event()

        def watch() -> None:
            while not over.wait(0.2):
                peak[0] = max(peak[0], memory_mb(process.pid))

        if memory:
            threading.Thread(target=watch, daemon=True).start()
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            for pid in reversed(tree(process.pid)):
                os.kill(pid, 9)
            process.wait()
        over.set()
        out.seek(0)
        text = out.read()
    lines = [line.removeprefix("RESULT ") for line in text.splitlines() if line.startswith("RESULT ")]
    if process.returncode or not lines:
        return {"error": text[-800:] or f"exit status {process.returncode}"}
    got: dict[str, Any] = json.loads(lines[-1])
    if memory:
        return {"weights": got["weights"], "peak_mb": round(peak[0])}
    return got | {"load": load}


def work(a: argparse.Namespace) -> None:
    """An arm's own process: do the rounds and print the result line."""
    loaded = FashionMnist(a.data).load()
    order = torch.randperm(len(loaded.train), generator=torch.Generator().manual_seed(SEED))
    none = loaded.train.select([])
    sites = tuple(SiteData(loaded.train.select(rows), none, none) for rows in order.chunk(a.sites))
    federation = Federation(sites, none, info=loaded.train.info)
    task = Classification(federation.info, MLP(HIDDEN[MODEL]))
    method = fedavg(Training(lr=LR, batch_size=BATCH)).but(select=Uniform(count=a.per_round))
    took, began = [], time.time()
    backend = BACKENDS[a.arm]
    for row in federate(task, federation, method, rounds=1 + a.rounds, seed=SEED, backend=backend, evaluate_every=0):
        took.append(time.time() - began)
        if len(took) == 1:
            first = time.time() - float(os.environ["BENCH_LAUNCHED"])
        assert row.replies == a.per_round
        weights, began = row.engine.state.replica["weights"], time.time()
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in weights.values())).hexdigest()[:16]
    result = {"first_result_s": first, "round_s": float(np.median(took[1:])), "rounds_s": took[1:], "weights": digest}
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(main())
