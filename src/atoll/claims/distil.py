"""Arms of a claim that make few-step generators."""

from __future__ import annotations

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
        sites: the federated run whose model is the teacher; None where ``distil`` says which it is.
    """

    distil: Distil
    sites: Recipe | None = None

    def config(self) -> dict[str, Any]:
        """Every default spelled out, as a record keeps it."""
        config = dict(describe(self.distil))
        return config if self.sites is None else {**config, "start": recipe_config(self.sites)}


def read_making(value: Mapping[str, Any], where: str) -> Making:
    """An arm from plain mappings: a stage of distillation, whose ``start`` may be a whole federated recipe (of the
    arm's seed, unless it names another).

    Raises:
        RecipeError: all problems at once.
    """
    sites = value.get("start")
    if not isinstance(sites, Mapping):
        return Making(read_distil(value, where))
    recipe = read_recipe({"name": "teacher", "seed": value.get("seed", 0), **sites}, f"{where}, start")
    return Making(read_distil({**value, "start": str(_folder(recipe) / "model")}, where), recipe)


def _folder(recipe: Recipe) -> Path:
    """Where a federated run is kept, whoever asks for it."""
    said = json.dumps([EDITION, recipe_config(replace(recipe, name="teacher"))], sort_keys=True, default=str)
    return user_cache() / "runs" / hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


def federated(recipe: Recipe) -> dict[str, Any]:
    """The summary of a federated run: from the cache, or run now (an interrupted one goes on where it was)."""
    folder = _folder(recipe)
    begun = (folder / "recipe.yaml").exists()
    summary = finished(folder) if begun else None
    if summary is None:
        summary = (reopen(folder) if begun else start(recipe, folder)[0]).go()
        shutil.rmtree(folder / "state", ignore_errors=True)  # what is asked of it is its model
    if summary["personal"]:
        raise RunError("A student needs one teacher, and this method leaves a model at each site; choose another.")
    return summary


def measure_distil(measure: str, making: Making) -> dict[str, Any]:
    """Train (or find) the arm's student and judge it at the first of its ``calls``."""
    started, recipe = time.perf_counter(), making.distil
    before = federated(making.sites) if making.sites is not None else {"up_bytes": 0, "down_bytes": 0}
    ready, trainer = trained(recipe)
    if ready.images is None:
        raise RunError("Samples of a claim are judged by rows; leave `texts` out.")
    calls = (recipe.calls or recipe.method.few)[0]
    reference = Reference.of(ready.images, make_judge(ready.images))
    found, _ = judge_generator(
        reference, lambda z, c, g: recipe.method.generate(trainer.nets, z, c, calls, g), ready.work.shape,
        ready.conditions, samples=recipe.samples, seed=recipe.seed, device=ready.device,
    )  # fmt: skip
    bill = trainer.bill
    learned = sum(p.numel() for r in trainer.roles.values() if r.lr for p in r.module.parameters() if p.requires_grad)
    return {
        "value": found[measure], "higher_is_better": measure in HIGHER, "final": found[measure], "judged": found,
        "calls": calls, "needs": recipe.method.needs, "steps": trainer.step, "trained_parameters": learned,
        "cpu_seconds": bill.cpu_seconds + bill.material_cpu_seconds, "up_bytes": before["up_bytes"],
        "down_bytes": before["down_bytes"], "epsilon": before.get("epsilon"),
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
