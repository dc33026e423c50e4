"""Arms of a claim that make few-step generators."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atoll.core.build import describe
from atoll.core.errors import RunError
from atoll.core.files import user_cache
from atoll.diffusion.evaluate import Reference, judge_generator, make_judge
from atoll.diffusion.trainer import Trainer
from atoll.federated.local._around import Around
from atoll.federated.local.distil_steps import DistilSteps
from atoll.recipes.distil import Distil, read_distil
from atoll.recipes.distil_ready import Ready, prepare, trainer_of
from atoll.recipes.recipe import Recipe, read_recipe, recipe_config
from atoll.recipes.run import finished, reopen, start

HIGHER = ("precision", "recall", "agreement", "diversity")
KEPT = 8
"""Trainings that are kept: arms that differ in ``calls`` alone judge one student."""

EDITION = 1
"""Of federated training: another one gives other weights, and so another name in the cache."""

_trained: OrderedDict[str, tuple[Ready, Trainer]] = OrderedDict()


@dataclass(frozen=True)
class Making:
    """An arm.

    Args:
        distil: how the student is made and judged.
        sites: federated runs, each of which begins with the model of the one before; ``distil`` begins with the last
            one's. Empty where it says itself what it begins with.
    """

    distil: Distil
    sites: tuple[Recipe, ...] = ()

    def config(self) -> dict[str, Any]:
        """Every default spelled out, as a record keeps it."""
        config = dict(describe(self.distil))
        return {**config, "start": _config(self.sites)} if self.sites else config


def read_making(value: Mapping[str, Any], where: str) -> Making:
    """An arm from plain mappings: a stage of distillation, whose ``start`` may be a whole federated recipe (of the
    arm's seed, unless it names another), as may be the ``start`` of that one's task.

    Raises:
        RecipeError: all problems at once.
    """
    sites = value.get("start")
    if not isinstance(sites, Mapping):
        return Making(read_distil(value, where))
    runs = _runs(sites, value.get("seed", 0), f"{where}, start")
    return Making(read_distil({**value, "start": str(_folder(runs) / "model")}, where), runs)


def _runs(value: Mapping[str, Any], seed: int, where: str) -> tuple[Recipe, ...]:
    task: Any = value.get("task")
    inner = task.get("start") if isinstance(task, Mapping) else None
    if not isinstance(inner, Mapping):
        return (read_recipe({"name": "teacher", "seed": seed, **value}, where),)
    before = _runs(inner, seed, f"{where}, start")
    own = {**value, "task": {**task, "start": str(_folder(before) / "model")}}
    return (*before, read_recipe({"name": "teacher", "seed": seed, **own}, where))


def _config(runs: tuple[Recipe, ...]) -> dict[str, Any]:
    """The last run's recipe, with that of the one before in the place of its folder."""
    *before, last = runs
    config = recipe_config(replace(last, name="teacher"))
    return {**config, "task": {**config["task"], "start": _config(tuple(before))}} if before else config


def _folder(runs: tuple[Recipe, ...]) -> Path:
    """Where a federated run is kept, whoever asks for it."""
    said = json.dumps([EDITION, _config(runs)], sort_keys=True, default=str)
    return user_cache() / "runs" / hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


def federated(runs: tuple[Recipe, ...]) -> list[dict[str, Any]]:
    """The summaries of federated runs: from the cache, or run now (an interrupted one goes on where it was)."""
    return [_federated(runs[: i + 1]) for i in range(len(runs))]


def _federated(runs: tuple[Recipe, ...]) -> dict[str, Any]:
    folder = _folder(runs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "a") as lock:  # another claim may want the same one
        fcntl.flock(lock, fcntl.LOCK_EX)
        begun = (folder / "recipe.yaml").exists()
        summary = finished(folder) if begun else None
        if summary is None:
            summary = (reopen(folder) if begun else start(runs[-1], folder)[0]).go()
            shutil.rmtree(folder / "state", ignore_errors=True)  # what is asked of it is its model
    if summary["personal"]:
        raise RunError("A student needs one teacher, and this method leaves a model at each site; choose another.")
    return summary


def measure_distil(measure: str, making: Making) -> dict[str, Any]:
    """Train (or find) the arm's student and judge it at the first of its ``calls``."""
    started, recipe = time.perf_counter(), making.distil
    before = federated(making.sites)
    ready, trainer = trained(recipe)
    if ready.images is None:
        raise RunError("Samples of a claim are judged by rows; leave `texts` out.")
    calls = (recipe.calls or recipe.method.few)[0]
    reference = Reference.of(ready.images, make_judge(ready.images))
    found, _ = judge_generator(
        reference, lambda z, c, g: recipe.method.generate(trainer.nets, z, c, calls, g), ready.work.shape,
        ready.conditions, samples=recipe.samples, seed=recipe.seed, device=ready.device,
    )  # fmt: skip
    steps, cpu = trainer.step, trainer.bill.cpu_seconds + trainer.bill.material_cpu_seconds
    last: Any = making.sites[-1].make_method().local if making.sites else None
    while isinstance(last, Around):
        last = last.inner
    spent = [b.get("epsilon") for b in before]
    if isinstance(last, DistilSteps):  # the student is there already
        steps, cpu = steps + last.steps * making.sites[-1].rounds, cpu + before[-1]["seconds"]
    learned = sum(p.numel() for r in trainer.roles.values() if r.lr for p in r.module.parameters() if p.requires_grad)
    return {
        "value": found[measure], "higher_is_better": measure in HIGHER, "final": found[measure], "judged": found,
        "calls": calls, "needs": recipe.method.needs, "steps": steps, "trained_parameters": learned, "cpu_seconds": cpu,
        "up_bytes": sum(b["up_bytes"] for b in before), "down_bytes": sum(b["down_bytes"] for b in before),
        "epsilon": sum(spent) if spent and None not in spent else None,
        "virtual_seconds": 0.0, "seconds": time.perf_counter() - started, "refused": 0, "curve": [],
    }  # fmt: skip


def trained(recipe: Distil) -> tuple[Ready, Trainer]:
    """The arm's training, done once for all arms that differ in what is judged."""
    key = json.dumps(describe(replace(recipe, name="arm", calls=None, samples=20, compare=())), default=str)
    if key in _trained:
        return _trained[key]
    ready = prepare(recipe)
    trainer = trainer_of(ready)
    trainer.go(label=recipe.name)
    _trained[key] = ready, trainer
    while len(_trained) > KEPT:
        _trained.popitem(last=False)
    return ready, trainer
