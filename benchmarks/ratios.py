"""The arms of the simulation benchmark, and how their runs are compared."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MODELS = ("logistic", "table", "small", "mlp", "cnn")
BASE = "bare loop"


@dataclass(frozen=True)
class Arm:
    """``script`` and its arguments; ``module`` must be importable; ``base`` is the arm to compare with."""

    script: tuple[str, ...]
    base: str = BASE
    module: str = ""
    dense_only: bool = False


ARMS = {
    "bare loop": Arm(("arms/bare.py", "loop")),
    "products alone": Arm(("arms/bare.py", "loop-floor"), dense_only=True),
    "inline, stock step": Arm(("arms/ours.py", "inline", "stock")),
    "inline": Arm(("arms/ours.py", "inline", "auto")),
    "pfl": Arm(("arms/pfl_research.py",), module="pfl"),
    "bare pool": Arm(("arms/bare.py", "pool"), "bare pool"),
    "products alone, pool": Arm(("arms/bare.py", "pool-floor"), "bare pool", dense_only=True),
    "pool, stock step": Arm(("arms/ours.py", "pool", "stock"), "bare pool"),
    "pool": Arm(("arms/ours.py", "pool", "auto"), "bare pool"),
    "flower": Arm(("arms/flower.py",), "bare pool", "flwr"),
    "atoll on flower, stock step": Arm(("arms/ours.py", "flower", "stock"), "bare pool", "flwr"),
    "atoll on flower": Arm(("arms/ours.py", "flower", "auto"), "bare pool", "flwr"),
}


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least, greatest."""
    return statistics.median(values), min(values), max(values)


def ratios(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per model and arm: wall and processor time over the base arm's, each within a repetition."""
    good = [r for r in runs if "error" not in r and not r["memory_run"]]
    found = {(r["model"], r["repetition"], r["arm"]): r for r in good}
    out = []
    for model in MODELS:
        for arm, about in ARMS.items():
            pairs = [
                (r, found[m, i, about.base])
                for (m, i, name), r in found.items()
                if m == model and name == arm and (m, i, about.base) in found
            ]
            if pairs:
                wall = spread([r["round_s"] / b["round_s"] for r, b in pairs])
                cpu = spread([r["round_cpu_s"] / max(b["round_cpu_s"], 1e-9) for r, b in pairs])
                out.append({"model": model, "arm": arm, "base": about.base, "wall": wall, "cpu": cpu})
    return out
