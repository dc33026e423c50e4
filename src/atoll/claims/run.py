"""Run claims and write down what happened."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atoll.claims.claim import COMPARISON, Claim, load_claim
from atoll.claims.distil import Making, measure_distil, read_making
from atoll.claims.verdict import judge
from atoll.core.errors import RecipeError, RunError, did_you_mean
from atoll.core.files import read_json_lines, write_atomic, write_json
from atoll.core.progress import progress
from atoll.federated.engine import Engine
from atoll.recipes.recipe import Recipe, read_recipe, recipe_config
from atoll.recipes.record import LOWER
from atoll.recipes.run import evaluate, prepare, versions

DIRTY = "-dirty"


def run_claims(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run the named claims (none: those without a record) and yield each record once it is written."""
    paths = {p.stem: p for p in sorted(folder.glob("*.yaml"))}
    if not paths:
        raise RunError(f"There is no claim in {folder}; give another --folder.")
    for name in names:
        if name not in paths:
            raise RecipeError([f"there is no claim `{name}` in {folder}.{did_you_mean(name, paths)}"], "claims")
    chosen = list(names) or [n for n in paths if not (folder / "results" / f"{n}.json").exists()]
    for name in chosen:
        journal = folder / "results" / f"{name}.partial.jsonl"
        record = run_claim(load_claim(paths[name]), journal)
        write_json(folder / "results" / f"{name}.json", record)
        journal.unlink(missing_ok=True)
        yield record


def run_claim(claim: Claim, journal: Path | None = None) -> dict[str, Any]:
    """Run every arm with every seed. Arms get the same work, the same seeds and the same number of tuning tries.

    Args:
        journal: each measurement is added to this file, and those that it already holds (of the same commit) are not
            made again: claims take hours, and may be interrupted.
    """
    started, commit = time.time(), _commit()  # of the code that runs, not of what is committed meanwhile
    arms: dict[str, Any] = {}
    tries = {arm: _tries(claim, arm) for arm in claim.arms}
    for arm, changes in tries.items():
        for change in changes:
            _recipe(claim, arm, change, claim.seeds[0])  # a mistake in the last arm is told now, not after hours
    measure = _Measure(claim, journal, commit)
    total = sum(len(claim.seeds) + (len(t) if len(t) > 1 else 0) for t in tries.values())
    with progress(total, f"claim {claim.name}") as bar:
        done = itertools.count(1)
        for arm in claim.arms:
            chosen, tuning = tries[arm][0], []
            if len(tries[arm]) > 1:
                for change in tries[arm]:
                    found = measure(_recipe(claim, arm, change, claim.tune_seed))
                    tuning.append({"change": change, "value": found["value"]})
                    bar.update(next(done), arm)
                chosen = best_try(tuning, found["higher_is_better"])["change"]
            seeds = []
            for seed in claim.seeds:
                seeds.append({"seed": seed, **measure(_recipe(claim, arm, chosen, seed))})
                bar.update(next(done), arm)
            config = _config(_recipe(claim, arm, chosen, claim.seeds[0]))
            arms[arm] = {"chosen": chosen, "tuning": tuning, "seeds": seeds, "recipe": config}
    comparisons = []
    for text in claim.expect:
        match = COMPARISON.match(text)
        assert match is not None
        left, right = ([s["value"] for s in arms[a]["seeds"]] for a in (match[1], match[3]))
        margin = float(f"{match[4]}{match[5]}") if match[4] else 0.0
        # `a >= b - 0.02` says that a may be 0.02 below b: the difference a - b is judged against -0.02.
        verdict = judge(left, right, relation=match[2], margin=margin if match[2][0] == ">" else -margin)
        comparisons.append({"expect": text, "verdict": verdict})
    return {
        "name": claim.name, "subject": claim.subject, "statement": claim.statement, "source": claim.source,
        "headline": claim.headline, "stage": claim.stage, "metric": claim.metric, "measure": claim.measure,
        "target": claim.target,
        "note": claim.note,
        "comparisons": comparisons, "arms": arms, "seconds": measure.before + time.time() - started, "commit": commit,
        "versions": versions(), "machine": machine(),
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip


def best_try(tuning: Sequence[Mapping[str, Any]], higher: bool) -> Mapping[str, Any]:
    """The entry with the best ``value``; one that is not a number never wins, of equal ones the first does."""
    worst = -math.inf if higher else math.inf
    return (max if higher else min)(tuning, key=lambda t: worst if math.isnan(t["value"]) else t["value"])


def _tries(claim: Claim, arm: str) -> list[dict[str, Any]]:
    grid = {**claim.tune.get("all", {}), **claim.tune.get(arm, {})}
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _recipe(claim: Claim, arm: str, change: Mapping[str, Any], seed: int) -> Recipe | Making:
    value = _merged(copy.deepcopy(dict(claim.work)), claim.arms[arm])
    for place, new in change.items():
        *path, last = place.split(".")
        at = value
        for step in path:
            if isinstance(at.get(step), str):
                at[step] = {"name": at[step]}
            at = at.setdefault(step, {})
        at[last] = new
    value.update(name=f"{claim.name}-{arm}", seed=seed)
    where = f"claim {claim.name}, arm {arm}"
    return read_making(value, where) if claim.stage == "distil" else read_recipe(value, where)


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), dict)
        base[key] = _merged(base[key], value) if both else copy.deepcopy(value)
    return base


def _config(recipe: Recipe | Making) -> dict[str, Any]:
    return recipe.config() if isinstance(recipe, Making) else recipe_config(recipe)


class _Measure:
    """Measures recipes, and remembers what it has measured where there is a journal.

    Attributes:
        before: seconds that an interrupted run took for what is not measured again.
    """

    def __init__(self, claim: Claim, journal: Path | None, commit: str) -> None:
        self.claim, self.journal, self.commit = claim, journal, commit
        known = commit and not commit.endswith(DIRTY)  # else nobody can tell whether the code is the same
        lines = [x for x in read_json_lines(journal) if known and x["commit"] == commit] if journal is not None else []
        if journal is not None:
            journal.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(journal, *(json.dumps(line).encode() + b"\n" for line in lines))  # without a half line
        self.found: dict[str, dict[str, Any]] = {line["key"]: line["found"] for line in lines}
        self.before = sum(found["seconds"] for found in self.found.values())

    def __call__(self, recipe: Recipe | Making) -> dict[str, Any]:
        key = json.dumps([self.claim.metric, self.claim.measure, self.claim.target, _config(recipe)], default=str)
        if key not in self.found:
            self.found[key] = _measure(self.claim, recipe)
            if self.journal is not None:
                with open(self.journal, "a", encoding="utf-8") as f:
                    f.write(json.dumps({"commit": self.commit, "key": key, "found": self.found[key]}) + "\n")
        return self.found[key]


def _measure(claim: Claim, recipe: Recipe | Making) -> dict[str, Any]:
    """One run of one arm: the claim's metric, and what it cost."""
    if isinstance(recipe, Making):
        return measure_distil(claim.measure or "fid", recipe)
    prepared = prepare(recipe)
    started = time.perf_counter()
    workers = recipe.backend.open(prepared.setup)
    headline, higher = prepared.setup.task.headline, prepared.setup.task.higher_is_better
    if claim.measure is not None:
        headline, higher = claim.measure, not claim.measure.endswith(LOWER)
    curve: list[tuple[int, float, float]] = []
    up = down = refused = 0
    try:
        engine = Engine(prepared.setup, workers)
        for _ in range(recipe.rounds):
            row = engine.step()
            engine.commit()
            up, down = up + sum(row.up_bytes.values()), down + sum(row.down_bytes.values())
            refused += len(row.refused)
            if engine.state.round % max(1, recipe.evaluate_every) == 0 or engine.state.round == recipe.rounds:
                found = evaluate(engine)
                curve.append((engine.state.round, engine.state.now, found[headline]))
                if claim.metric == "time_to" and _reached(claim, found[headline], higher):
                    break
        engine.conclude()
        part = {"worst_site": "test", "mean_sites": "test", "sites_on_common": "common"}.get(claim.metric)
        sites = [m[headline] for m in engine.evaluate_sites(part).values() if m] if part else []
    finally:
        workers.close()
    last = [v for _, _, v in curve]
    reached = claim.metric == "time_to" and _reached(claim, last[-1], higher)
    value = {
        "final": lambda: last[-1],
        "mean_last": lambda: float(np.mean(last[-max(1, len(last) // 5) :])),
        "time_to": lambda: curve[-1][1] if reached else math.inf,
        "worst_site": lambda: float(np.quantile(sites, 0.1 if higher else 0.9)),
        "mean_sites": lambda: float(np.mean(sites)),
        "sites_on_common": lambda: float(np.mean(sites)),
        "bytes": lambda: float(up + down),
    }[claim.metric]()
    return {
        "value": value, "higher_is_better": higher and claim.metric not in ("time_to", "bytes"),
        "final": last[-1], "up_bytes": up, "down_bytes": down, "virtual_seconds": curve[-1][1],
        "seconds": time.perf_counter() - started, "refused": refused,
        "curve": [[r, round(v, 5)] for r, _, v in curve],
    }  # fmt: skip


def _reached(claim: Claim, value: float, higher: bool) -> bool:
    assert claim.target is not None
    return value >= claim.target if higher else value <= claim.target


def _commit() -> str:
    """Short name of the code's commit, with ``-dirty`` where the package was changed since; empty outside git."""
    package = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=package, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (DIRTY if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine() -> dict[str, Any]:
    """What the numbers were measured on, in words that say nothing private."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"processor": model, "cores": os.cpu_count(), "system": platform.system()}
