"""A run directory of a stage of distillation: ``recipe.yaml``, ``events.jsonl``, ``state/``, ``model/``,
``report.html``, as of every run. A killed stage goes on from its last checkpoint and ends with the same bits.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from atoll.core.files import read_json_lines, write_atomic
from atoll.diffusion.as_denoiser import AsDenoiser
from atoll.diffusion.evaluate import Reference, judge_generator, make_judge
from atoll.diffusion.student import facts_of, save_student
from atoll.diffusion.trainer import Trainer
from atoll.models.export import about_model
from atoll.recipes.distil import described
from atoll.recipes.distil_ready import Ready, trainer_of
from atoll.recipes.pictures import keep_samples
from atoll.recipes.words import calls as some_calls

EVENTS = 50
"""Lines of losses that a run writes, however many steps it takes."""


class DistilRun:
    """A run directory that is being written."""

    def __init__(self, folder: Path, ready: Ready) -> None:
        self.folder, self.ready = folder, ready
        self.events = folder / "events.jsonl"

    def go(self, on_step: Callable[[int, dict[str, float]], None] | None = None) -> dict[str, Any]:
        """Train to the end, judge, export. Returns the summary (the ``end`` event)."""
        recipe = self.ready.recipe
        trainer = trainer_of(self.ready, self.folder / "state")
        resumed = trainer.load()
        kept = [e for e in self._read() if e.get("step", 0) <= trainer.step] if resumed else []
        write_atomic(self.events, *(json.dumps(e).encode() + b"\n" for e in kept), durable=False)
        if not resumed:
            self._append(self._start(trainer))
        every = max(1, trainer.steps // EVENTS)

        def note(step: int, losses: dict[str, float]) -> None:
            if step % every == 0 or step == trainer.steps:
                self._append({"event": "step", "step": step, "losses": losses})
            if on_step is not None:
                on_step(step, losses)

        bill = trainer.go(note, f"{recipe.name}: {described(recipe.method)}")
        judged = self._judge(trainer)
        self._export(trainer)
        end = {
            "event": "end", "at": _now(), "steps": trainer.steps, "judged": judged, "samples": bill.samples,
            "cpu_seconds": bill.cpu_seconds, "seconds": bill.seconds, "teacher_seconds": bill.material_cpu_seconds,
            "trained_parameters": sum(
                p.numel() for r in trainer.roles.values() if r.lr for p in r.module.parameters() if p.requires_grad
            ),
        }  # fmt: skip
        self._append(end)
        return end

    def _judge(self, trainer: Trainer) -> list[dict[str, Any]]:
        """One entry per way of sampling: what, calls, metrics; a few samples of each go into ``state/``."""
        ready, recipe = self.ready, self.ready.recipe
        reference = Reference.of(ready.images, make_judge(ready.images)) if ready.images is not None else None
        samples = recipe.samples if reference is not None else min(recipe.samples, 20)
        ways: list[tuple[str, int, Any]] = [
            (f"teacher, {s.solver} {s.steps}", s.calls, lambda z, c, g, s=s: s(ready.teacher, z, c))
            for s in recipe.compare
        ]
        for calls in recipe.calls or recipe.method.few:
            ways.append((
                f"{described(recipe.method)}", calls,
                lambda z, c, g, n=calls: recipe.method.generate(trainer.nets, z, c, n, g),
            ))  # fmt: skip
        out: list[dict[str, Any]] = []
        shown: list[tuple[str, Tensor]] = []
        for label, calls, generate in ways:
            metrics, x = judge_generator(
                reference, generate, ready.work.shape, ready.conditions, samples=samples, device=ready.device
            )
            finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            out.append({"way": label, "calls": calls, "metrics": finite})
            several = 2 * len(ready.conditions) if reference is not None else samples
            shown.append((f"{label}: {some_calls(calls)}", x[:several]))
        if len(ready.work.shape) == 3:
            keep_samples(self.folder, ready.info, ready.sigma_data, shown)
        return out

    def _export(self, trainer: Trainer) -> None:
        ready, recipe = self.ready, self.ready.recipe
        if recipe.start:
            built = facts_of(recipe.start)
        else:
            t, info = recipe.teacher, ready.info
            built = about_model(t.model, info, info.num_classes or 1, t.seed, AsDenoiser(t.kind, ready.sigma_data))
        save_student(
            self.folder / "model", recipe.method, trainer.nets, ready.teacher, ready.info, ready.sigma_data, built,
            {"method": described(recipe.method)},
        )  # fmt: skip

    def _start(self, trainer: Trainer) -> dict[str, Any]:
        ready = self.ready
        info = ready.info
        return {
            "event": "start", "at": _now(), "name": ready.recipe.name, "method": described(ready.recipe.method),
            "needs": ready.recipe.method.needs, "data": info.name, "steps": trainer.steps,
            "shape": list(info.shape),
            "parameters": sum(p.numel() for p in ready.teacher.parameters()),
        }  # fmt: skip

    def _read(self) -> list[dict[str, Any]]:
        return [e for e in read_json_lines(self.events) if e.get("event") != "end"]

    def _append(self, event: Mapping[str, Any]) -> None:
        with open(self.events, "ab") as f:
            f.write(json.dumps(event, default=float).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
