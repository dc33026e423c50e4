"""Seconds per round and peak memory: Atoll against a bare PyTorch loop that does the same arithmetic.

    python benchmarks/simulation.py                         every model and arm that can run here
    python benchmarks/simulation.py --quick --models small  a look
    python benchmarks/report.py                             the table from the records

Arms run in fresh processes, one after the other, in a new random order in each repetition; ratios are taken
within a repetition, because a shared machine changes its speed. Peak memory comes from runs of its own. After
the first round all arms must have the same weights, or the record says so and the exit status is 1. Other
frameworks run where they are installed (``--peer NAME=PYTHON`` names an interpreter that has one); otherwise the
reason is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from machine import describe
from prepare import write_job
from ratios import ARMS, BASE, MODELS, ratios
from work import memory_mb, tree

HERE = Path(__file__).resolve().parent
AGREE = {"cnn": 2e-3}  # largest difference between weights after a round; float errors grow chaotically in a CNN:
AGREE_DENSE = 1e-5  # starting weights that differ by one part in ten million end 6e-4 apart


def main() -> int:
    a = arguments()
    arms = [arm for arm in a.arms if usable(arm, a.peers)]
    record: dict[str, Any] = {
        "benchmark": "simulation", "machine": describe(), "rounds": a.rounds,
        "repetitions": a.repetitions, "runs": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        for model in a.models:
            folder = Path(scratch) / model
            write_job(folder, model, a.rounds, a.data)
            for repetition in range(a.repetitions + (not a.quick)):
                memory = repetition == a.repetitions
                able = [arm for arm in arms if not (ARMS[arm].dense_only and model == "cnn")]
                for arm in random.sample(able, len(able)):
                    got = run(arm, a.peers, folder, memory, a.limit)
                    got |= {"model": model, "arm": arm, "repetition": repetition, "memory_run": memory}
                    record["runs"].append(got)
                    print(line(got), flush=True)
            mark_disagreement([r for r in record["runs"] if r["model"] == model])
    print(summary(record["runs"]))
    out = a.out or HERE / "results" / f"simulation-{time.strftime('%Y%m%d-%H%M%S')}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nrecord: {out}")
    return 1 if any("error" in r or r.get("disagrees") for r in record["runs"]) else 0


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arms", type=lambda s: s.split("+"), default=list(ARMS), help="e.g. 'bare loop+inline'")
    p.add_argument("--models", type=lambda s: s.split(","), default=list(MODELS))
    p.add_argument("--rounds", type=int, default=15, help="after the warm-up round")
    p.add_argument("--repetitions", type=int, default=5)
    p.add_argument("--quick", action="store_true", help="3 rounds, 2 repetitions, no memory run")
    p.add_argument("--data", help="folder with the Fashion-MNIST files")
    p.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="NAME: flwr or pfl")
    p.add_argument("--limit", type=float, default=900, help="seconds after which an arm is ended")
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    unknown = [x for x in a.arms if x not in ARMS] + [x for x in a.models if x not in MODELS]
    if unknown:
        p.error(f"unknown: {', '.join(unknown)}; arms: {', '.join(ARMS)}; models: {', '.join(MODELS)}")
    a.peers = dict(item.split("=", 1) for item in a.peer)
    if a.quick:
        a.rounds, a.repetitions = 3, 2
    return a


def usable(arm: str, peers: dict[str, str]) -> bool:
    """Whether an arm's framework can be imported; prints why not."""
    module = ARMS[arm].module
    if not module:
        return True
    python = peers.get(module, sys.executable)
    got = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    if got.returncode:
        reason = (got.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"skipped: {arm} ({reason}); `--peer {module}=PYTHON` names an interpreter that has it")
    return got.returncode == 0


def run(arm: str, peers: dict[str, str], folder: Path, memory: bool, limit: float) -> dict[str, Any]:
    """One fresh process of an arm; what it reported, or ``error``."""
    weights = folder / "first_round.pt"
    weights.unlink(missing_ok=True)
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "BENCH_WEIGHTS": str(weights),
        "BENCH_LAUNCHED": str(time.time()),
    }  # fmt: skip
    command = [peers.get(ARMS[arm].module, sys.executable), *ARMS[arm].script, str(folder)]
    process = subprocess.Popen(
        command, cwd=HERE, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    peak, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            peak[0] = max(peak[0], memory_mb(process.pid))

    if memory:
        threading.Thread(target=watch, daemon=True).start()
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        for pid in reversed(tree(process.pid)):
            os.kill(pid, 9)
        out, _ = process.communicate()
    over.set()
    found = re.findall(r"RESULT (\{.*\})", out)
    got: dict[str, Any] = json.loads(found[-1]) if found else {"error": out[-800:]}
    if memory:
        got["peak_mb"] = round(peak[0])
    if weights.exists():
        got["weights"] = torch.load(weights)
    return got | {"load": os.getloadavg()[0]}


def mark_disagreement(runs: list[dict[str, Any]]) -> None:
    """Replace weights by their largest difference from the bare loop's."""
    reference = next((r["weights"] for r in runs if r["arm"] == BASE and "weights" in r), None)
    for r in runs:
        weights = r.pop("weights", None)
        if weights is not None and reference is not None:
            r["weights_differ"] = float((weights - reference).abs().max())
            r["disagrees"] = r["weights_differ"] > AGREE.get(r["model"], AGREE_DENSE)


def line(r: dict[str, Any]) -> str:
    if "error" in r:
        return f"{r['model']:9} {r['arm']:20} FAILED: {r['error'][-200:]!r}"
    peak = f"  {r['peak_mb']} MB" if "peak_mb" in r else ""
    return (
        f"{r['model']:9} {r['arm']:20} {r['round_s'] * 1e3:8.1f} ms/round  first {r['first_round_s']:.2f} s  "
        f"start {r['start_up_s']:.2f} s  accuracy {r['accuracy']:.4f}{peak}"
    )


def summary(runs: list[dict[str, Any]]) -> str:
    """Ratios to the bare loop (for two processes: the bare pool), of wall and of processor time."""
    rows = [
        f"{r['model']:9} {r['arm']:20} {r['wall'][0]:5.2f}x {r['base']}  [{r['wall'][1]:.2f} to "
        f"{r['wall'][2]:.2f}]   processor {r['cpu'][0]:.2f}x"
        for r in ratios(runs)
    ]
    return "\n".join(["", *rows])


if __name__ == "__main__":
    sys.exit(main())
