"""A run: a recipe in, a directory out. What is in the directory is described in ``docs/architecture.md``."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atoll.core.errors import RunError
from atoll.core.files import read_json_lines, write_atomic, write_json
from atoll.core.memory import PeakMemory
from atoll.core.progress import progress
from atoll.federated import checkpoint
from atoll.federated.check import check_method
from atoll.federated.engine import Engine
from atoll.federated.ledger import Row
from atoll.federated.method import Backend
from atoll.federated.privacy import spent, unit_of
from atoll.federated.visit import Setup
from atoll.models.export import about_model, save_model
from atoll.recipes.pictures import keep_samples
from atoll.recipes.plan import Plan, make_plan
from atoll.recipes.recipe import Recipe, load_recipe, recipe_yaml
from atoll.tasks.task import network_at

FINISHED = "end"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A recipe whose data is loaded and whose parts are checked."""

    recipe: Recipe
    setup: Setup
    workers: int

    @property
    def delta(self) -> float:
        if self.setup.method.local.epsilon is not None:
            return 0.0  # each row was hidden by itself, without a delta
        return self.recipe.delta or 0.1 / len(self.setup.federation.sites)


def prepare(recipe: Recipe, state_folder: Path | None = None) -> Prepared:
    """Load the data, build the task, arrange the topology."""
    if recipe.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise RunError("TensorBoard is not installed; `pip install atoll[tensorboard]`, or set `tensorboard: false`.")
    federation = recipe.federation()
    method = recipe.make_method(len(federation.sites))
    federation = method.topology.arrange(federation)
    task = recipe.make_task(federation.info)
    profiles = recipe.devices.profiles(len(federation.sites), recipe.seed)
    workers = getattr(recipe.backend, "workers", 1) or os.cpu_count() or 1
    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and workers == 1 else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("`device: cuda` needs a GPU that PyTorch can use, and there is none; use `device: auto`.")
    setup = Setup(
        task=task, federation=federation, method=method, profiles=profiles, seed=recipe.seed, device=device,
        threads=recipe.threads, timeout=recipe.timeout, state_folder=state_folder,
    )  # fmt: skip
    check_method(method, task, federation)
    return Prepared(recipe, setup, workers)


def plan(prepared: Prepared) -> Plan:
    recipe = prepared.recipe
    evaluations = recipe.rounds // recipe.evaluate_every if recipe.evaluate_every else 1
    return make_plan(
        prepared.setup, recipe.rounds, workers=prepared.workers, evaluations=evaluations, delta=prepared.delta
    )


class Run:
    """A run directory that is being written."""

    def __init__(self, folder: Path, prepared: Prepared, backend: Backend | None = None) -> None:
        self.folder, self.prepared, self.backend = folder, prepared, backend or prepared.recipe.backend
        self.events_path = folder / "events.jsonl"
        self.memory = PeakMemory()

    # ---------------------------------------------------------------- events

    def _append(self, event: dict[str, Any]) -> int:
        """Append one line, on the disk before the checkpoint that counts on it; returns the file's new length."""
        with open(self.events_path, "ab") as f:
            f.write(json.dumps(event, allow_nan=True, default=float).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
            return f.tell()

    def _cut_events(self, size: int) -> None:
        """Take back the lines of a round that never was."""
        there = self.events_path.stat().st_size if self.events_path.exists() else 0
        if there < size:
            raise RunError(
                f"{self.events_path} has {there:,} bytes, but the checkpoint counts on {size:,}; put the file back, "
                "or start the run again."
            )
        os.truncate(self.events_path, size)

    # ---------------------------------------------------------------- life

    def go(self, on_row: Callable[[Row], None] | None = None) -> dict[str, Any]:
        """Run to the end, from the checkpoint when there is one. Returns the summary (the ``end`` event)."""
        p, recipe = self.prepared, self.prepared.recipe
        state, resumed = None, False
        if (self.folder / "state" / checkpoint.NAME).exists():
            state, extra = checkpoint.load(self.folder / "state")
            self._cut_events(extra["events_bytes"])
            resumed = True
            if state.round > recipe.rounds:
                raise RunError(
                    f"{self.folder} has done {state.round} rounds, but its recipe.yaml asks for {recipe.rounds}; "
                    "put the recipe back, or start another run."
                )
        else:
            self.events_path.unlink(missing_ok=True)  # killed before its first checkpoint: nothing was committed
        started = time.perf_counter()
        workers = self.backend.open(p.setup)
        try:
            engine = Engine(p.setup, workers, state, recipe.max_reply_bytes)
            if resumed:
                self._append({"event": "resume", "round": engine.state.round, "at": _now()})
            else:
                self._append(self._start_event())
            with progress(recipe.rounds, recipe.name) as bar:
                for row in self._rounds(engine):
                    headline = p.setup.task.headline
                    note = f"{headline} {row.metrics[headline]:.4g}" if headline in row.metrics else ""
                    bar.update(row.round + 1, note)
                    if on_row is not None:
                        on_row(row)
            return self._finish(engine, time.perf_counter() - started)
        finally:
            workers.close()

    def _rounds(self, engine: Engine) -> Iterator[Row]:
        recipe = self.prepared.recipe
        board = _board(self.folder) if recipe.tensorboard else None
        while engine.state.round < recipe.rounds:
            row = engine.step()
            done = engine.state.round
            every = recipe.evaluate_every
            if done == recipe.rounds or (every and done % every == 0):
                row.metrics = evaluate(engine)
            event = {"event": "round", **row.as_dict()}
            epsilon = spent(engine.method, engine.state.cohorts, len(engine.sites), self.prepared.delta)
            if epsilon is not None:
                event["epsilon"] = epsilon
            size = self._append(event)
            checkpoint.save(engine.state, self.folder / "state", {"events_bytes": size})
            engine.commit()
            self.memory.sample()
            if board is not None:
                _scalars(board, row, epsilon)
            yield row
        if board is not None:
            board.close()

    def _start_event(self) -> dict[str, Any]:
        p = self.prepared
        federation = p.setup.federation
        return {
            "event": "start", "at": _now(), "name": p.recipe.name, "method": p.setup.method.card.name,
            "headline": p.setup.task.headline, "higher_is_better": p.setup.task.higher_is_better,
            "data": federation.info.name, "skipped": dict(federation.info.skipped),
            "partition": {k: v for k, v in federation.labels.items() if isinstance(v, str | int | float)},
            "sites": [len(s.train) for s in federation.sites], "versions": versions(),
            "site_names": federation.labels.get("site_names"), "test_rows": [len(s.test) for s in federation.sites],
            "common_test_rows": len(federation.test),
        }  # fmt: skip

    def _finish(self, engine: Engine, seconds: float) -> dict[str, Any]:
        engine.conclude()
        sites = engine.evaluate_sites()
        self._append({"event": "sites", "metrics": {str(s): m for s, m in sites.items()}})
        totals, refused, last = (
            dict[str, float](up_bytes=0, down_bytes=0, relayed_bytes=0, flops=0),
            0,
            dict[str, Any](),
        )
        for row in read_json_lines(self.events_path):  # one at a time: together they grow with sites times merges
            if row["event"] == "round":
                totals, refused, last = _added(totals, row), refused + len(row["refused"]), row
        memory = self.memory.peak()
        personal = self._export(engine)
        summary = {
            "event": FINISHED, "at": _now(), "rounds": engine.state.round, "metrics": dict(last["metrics"]), **totals,
            "virtual_seconds": engine.state.now, "seconds": seconds, "memory_bytes": memory, "refused": refused,
            "epsilon": last.get("epsilon"), "delta": self.prepared.delta if "epsilon" in last else None,
            "privacy_unit": unit_of(self.prepared.setup.method),
            "personal": personal, "replies": sum(replies for replies, *_ in engine.state.cohorts),
        }  # fmt: skip
        self._append(summary)
        return summary

    def _export(self, engine: Engine) -> bool:
        """Write the global model to ``model/``, or one model a site to ``model/site0/``, ... where sites keep parts
        of theirs. Returns whether they do."""
        recipe, setup, worker = self.prepared.recipe, self.prepared.setup, engine.workers.local
        personal = bool(worker.site_model(None).split.private)
        if not personal:
            model = engine.method.share.export(worker.site_model(None).model, engine.state.replica)
            export_model(model, self.folder / "model", recipe, setup, None)
            self._draw(model)
        if hasattr(engine.workers, "finish"):  # sites elsewhere save their own
            self._append({"event": "finished", **engine.workers.finish(engine.state.tags)})
            return personal
        for info in engine.sites if personal else ():
            at, _ = worker.place(info.site, engine.state.tags.get(info.site))
            model = engine.method.share.personal(at.model)
            export_model(model, self.folder / "model" / f"site{info.site}", recipe, setup, info.site)
        return personal

    def _draw(self, model: Any) -> None:
        """Samples of a model that generates, before and after the run."""
        setup, recipe = self.prepared.setup, self.prepared.recipe
        task: Any = setup.task
        if not hasattr(task, "draw") or len(setup.federation.info.shape) != 3:
            return
        ways = [("before any site was asked", task.model(recipe.seed)), ("after the last round", model)]
        test, shown = setup.federation.test, []
        for title, m in ways:
            found = f", {task.headline} {task.evaluate(m, test)[task.headline]:.3f}" if len(test) else ""
            shown.append((title + found, task.draw(m)))
        keep_samples(self.folder, setup.federation.info, task.sigma_data, shown)


def export_model(model: Any, folder: Path, recipe: Recipe, setup: Setup, site: int | None) -> None:
    """Write a model with the facts that let it load alone."""
    task: Any = setup.task
    facts: dict[str, Any] = {"method": setup.method.card.name}
    if hasattr(task, "save"):
        task.save(model, folder, facts)
        return
    if hasattr(task, "network"):  # a task of your own may build its model in its own way
        builder = setup.method.share.exported(network_at(site, task.network, task.site_networks), model)
        wrapper = getattr(task, "wrapper", None)
        facts |= about_model(builder, setup.federation.info, task.outputs, recipe.seed, wrapper)
    save_model(model, folder, facts)


def start(recipe: Recipe, folder: Path) -> tuple[Run, Plan]:
    """Make the run directory: refuses one that already holds a run. Nothing is written when the recipe is wrong."""
    if (folder / "recipe.yaml").exists():
        raise RunError(f"{folder} already holds a run; `atoll resume {folder}` goes on with it, or give another --out.")
    prepared = prepare(recipe, folder / "state" / "sites")
    foreseen = plan(prepared)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "plan.json", foreseen.as_dict())
        write_atomic(folder / "recipe.yaml", recipe_yaml(recipe, with_places=True).encode())
    except OSError as e:
        raise RunError(f"The run directory {folder} cannot be written ({e.strerror}).") from e
    return Run(folder, prepared), foreseen


def reopen(folder: Path, recipe: Recipe | None = None) -> Run:
    """An existing run directory, to go on from its last checkpoint."""
    if not (folder / "recipe.yaml").exists():
        raise RunError(f"{folder} holds no run (there is no recipe.yaml in it).")
    if recipe is None:
        recipe = load_recipe(str(folder / "recipe.yaml"))
    return Run(folder, prepare(recipe, folder / "state" / "sites"))


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run, else None."""
    found = None
    for event in read_events(folder):
        found = event if event["event"] == FINISHED else found
    return found


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's ``events.jsonl``."""
    path = folder / "events.jsonl"
    try:
        events = list(read_json_lines(path))
    except ValueError as e:
        raise RunError(f"{path} is damaged: a line is not JSON ({e}).") from e
    if not all(isinstance(e, dict) and "event" in e for e in events):
        raise RunError(f"{path} is damaged: a line is not an event.")
    return events


def evaluate(engine: Engine) -> dict[str, float]:
    """The global model on the common test set. Without a global model: the mean over the sites' own models, on each
    one's own test rows and weighted by them; or, where no site keeps test rows, on the common test set."""
    found = engine.evaluate_global()
    if found:
        return found
    federation = engine.setup.federation
    rows = {i: len(site.test) for i, site in enumerate(federation.sites) if len(site.test)}
    metrics = {i: m for i, m in engine.evaluate_sites("test" if rows else "common").items() if m}
    weights = {i: rows.get(i, 0) if rows else 1 for i in metrics}  # a site of its own may be away, or say nothing
    total, names = sum(weights.values()), {name for m in metrics.values() for name in m}
    return {n: sum(metrics[i][n] * w for i, w in weights.items()) / total for n in sorted(names)} if total else {}


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"atoll": version("atoll"), "torch": torch.__version__, "python": platform.python_version()}


def _added(totals: dict[str, float], row: dict[str, Any]) -> dict[str, float]:
    def of(value: Any) -> float:
        return sum(value.values()) if isinstance(value, dict) else value  # by site, or of all together

    return {name: total + of(row.get(name, 0)) for name, total in totals.items()}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _board(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))


def _scalars(board: Any, row: Row, epsilon: float | None) -> None:
    values = {**row.metrics, "up_bytes": sum(row.up_bytes.values()), "seconds": row.seconds}
    if epsilon is not None:
        values["epsilon"] = epsilon
    for name, value in values.items():
        board.add_scalar(name, value, row.round)
    board.flush()
