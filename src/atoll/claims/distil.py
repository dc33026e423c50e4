"""Arms of a claim that make few-step generators."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import OrderedDict
from typing import Any

from atoll.core.build import describe
from atoll.diffusion.evaluate import Reference, judge_generator, make_judge
from atoll.diffusion.trainer import Trainer
from atoll.recipes.distil import Distil, Ready, prepare, steps_of

HIGHER = ("precision", "recall", "agreement", "diversity")
KEPT = 4
"""Trainings that are kept: arms that differ in ``calls`` alone judge one student."""

_trained: OrderedDict[str, tuple[Ready, Trainer]] = OrderedDict()


def measure_distil(measure: str, recipe: Distil) -> dict[str, Any]:
    """Train (or find) the arm's student and judge it at the first of its ``calls``."""
    started = time.perf_counter()
    ready, trainer = trained(recipe)
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
        "cpu_seconds": bill.cpu_seconds + bill.material_cpu_seconds, "up_bytes": 0, "down_bytes": 0,
        "virtual_seconds": 0.0, "seconds": time.perf_counter() - started, "refused": 0, "curve": [],
    }  # fmt: skip


def trained(recipe: Distil) -> tuple[Ready, Trainer]:
    """The arm's training, done once for all arms that differ in what is judged."""
    key = json.dumps(describe(dataclasses.replace(recipe, name="arm", calls=None, samples=20, compare=())), default=str)
    if key in _trained:
        return _trained[key]
    ready = prepare(recipe)
    trainer = Trainer(
        recipe.method, ready.teacher, ready.work, recipe.steps or 0, None, recipe.precision, recipe.compiled
    )  # fmt: skip
    trainer.steps = steps_of(recipe, trainer)
    trainer.go(label=recipe.name)
    _trained[key] = ready, trainer
    while len(_trained) > KEPT:
        _trained.popitem(last=False)
    return ready, trainer
