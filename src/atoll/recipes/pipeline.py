"""Several stages as one run: sites adapt models together, a server makes them fast, one page tells the story.

A stage is a federated recipe or, with ``stage: distil``, the making of a few-step generator. Each has a run directory
of its own inside the run's, so each is resumed, reported and repeated as if it stood alone. A stage names an earlier
one where it wants its model (``start: generator``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from atoll.core.build import Deferred, describe, schema
from atoll.core.errors import RecipeError, RunError, did_you_mean
from atoll.core.files import write_atomic
from atoll.diffusion.as_denoiser import AsDenoiser
from atoll.diffusion.teacher import make_denoiser
from atoll.models.export import about_model, save_model
from atoll.recipes.distil import Distil, read_distil
from atoll.recipes.distil_ready import foresee_making, prepare
from atoll.recipes.distil_run import DistilRun
from atoll.recipes.recipe import Recipe, edit, from_python, load_recipe, located, read_recipe, read_yaml, recipe_schema
from atoll.recipes.run import Run, finished, reopen
from atoll.recipes.run import start as start_run

Stage = Recipe | Distil
KINDS = {"federate": Recipe, "distil": Distil}


@dataclass(frozen=True)
class Pipeline:
    """Stages in their order.

    Args:
        name: of the run and its directory.
        stages: by name; each is a recipe of its own.
    """

    name: str
    stages: Mapping[str, Stage]


def read_pipeline(value: Mapping[str, Any], where: str = "recipe") -> Pipeline:
    """``{name, shared, stages}`` -> a pipeline; ``shared`` has fields for every stage that knows them.

    Raises:
        RecipeError: all problems of all stages at once.
    """
    problems = [f"`{k}`: a recipe with stages has `name`, `shared` and `stages`" for k in value if k not in TOP]
    shared, stages = value.get("shared") or {}, value.get("stages")
    if not isinstance(stages, Mapping) or not stages:
        raise RecipeError([*problems, "`stages` must be a mapping of names to stages"], where)
    if not isinstance(shared, Mapping):
        raise RecipeError([*problems, "`shared` must be a mapping of fields"], where)
    everywhere = {f.name for kind in KINDS.values() for f in fields(kind)}
    problems += [
        f"`shared.{k}`: no stage has such a field.{did_you_mean(k, everywhere)}" for k in shared.keys() - everywhere
    ]
    read: dict[str, Stage] = {}
    for name, own in stages.items():
        try:
            read[str(name)] = _read_stage(str(name), own, shared)
        except RecipeError as e:
            problems += [f"stage `{name}`: {p}" for p in e.problems]
            continue
        made = read[str(name)]
        before = list(map(str, stages))[: list(stages).index(name)]
        begins = start_of(made)
        if begins and "/" not in begins and begins not in before:
            problems.append(f"stage `{name}`: `start` names no earlier stage.{did_you_mean(begins, before)}")
    if problems:
        raise RecipeError(problems, where)
    return Pipeline(str(value.get("name", "run")), read)


TOP = ("name", "shared", "stages")


def start_of(stage: Stage) -> str | None:
    """The folder or the earlier stage whose model a stage begins with."""
    if isinstance(stage, Distil):
        return stage.start
    task: Any = stage.task
    return str(task.arguments.get("start", "")) or None if isinstance(task, Deferred) else None


def starting(stage: Stage, folder: Path) -> Stage:
    """The stage with a model's folder in the place of an earlier stage's name."""
    if isinstance(stage, Distil):
        return replace(stage, start=str(folder))
    task: Any = stage.task
    return replace(stage, task=replace(task, arguments={**task.arguments, "start": str(folder)}))


def _read_stage(name: str, own: Any, shared: Mapping[str, Any]) -> Stage:
    if not isinstance(own, Mapping):
        raise RecipeError(["a stage is a mapping of fields"])
    kind = str(own.get("stage", "federate"))
    if kind not in KINDS:
        raise RecipeError([f"`stage`: there is no stage `{kind}`.{did_you_mean(kind, KINDS)}"])
    known = {f.name for f in fields(KINDS[kind])}
    value = {"name": name, **{k: v for k, v in shared.items() if k in known}, **own}
    value.pop("stage", None)
    return read_distil(value) if kind == "distil" else read_recipe(value)


def load_any(reference: str, changes: Sequence[str] = ()) -> Recipe | Distil | Pipeline:
    """What a file holds: a federated recipe, one distillation, or a pipeline of stages."""
    path, _, function = reference.partition(":")
    if path.endswith(".py"):
        made: Stage | Pipeline = from_python(Path(path), function or "recipe", (Distil, Pipeline))
        if changes and not isinstance(made, Recipe):
            raise RecipeError(["`--set` changes YAML recipes and federated ones; change the function"], reference)
        return load_recipe(reference, changes) if isinstance(made, Recipe) else made
    value = edit(read_yaml(Path(reference)), changes)
    if "stages" in value:
        return read_pipeline(value, reference)
    if value.get("stage", "federate") == "distil":
        return read_distil(value, reference)
    return load_recipe(reference, changes)


def whole_schema() -> dict[str, Any]:
    """JSON schema of everything that ``atoll run`` takes, generated from the builders' signatures."""
    federated, making = recipe_schema(), schema(Distil)
    dialect = federated.pop("$schema")
    defs = {**federated.pop("$defs"), **making.pop("$defs"), "federate": federated, "distil": making}
    making["properties"]["stage"] = {"const": "distil"}
    either = [{"$ref": f"#/$defs/{name}"} for name in KINDS]
    pipeline = {
        "type": "object", "title": "Pipeline", "required": ["stages"], "additionalProperties": False,
        "properties": {
            "name": {"type": "string"}, "shared": {"type": "object"},
            "stages": {"type": "object", "additionalProperties": {"anyOf": either}},
        },
    }  # fmt: skip
    return {"$schema": dialect, "$defs": defs, "anyOf": [*either, pipeline]}


def as_config(chosen: Distil | Pipeline) -> dict[str, Any]:
    """The resolved recipe as plain values, every default spelled out."""
    if isinstance(chosen, Distil):
        return {"stage": "distil", **describe(chosen)}
    return {"name": chosen.name, "stages": {n: _stage_config(s) for n, s in chosen.stages.items()}}


def as_yaml(chosen: Distil | Pipeline, with_places: bool = False) -> str:
    """The same as YAML; ``with_places`` makes paths absolute."""
    config, stages = as_config(chosen), () if isinstance(chosen, Distil) else chosen.stages
    config = located(config, stages) if with_places else config
    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def _stage_config(stage: Stage) -> dict[str, Any]:
    config = dict(describe(stage))
    config.pop("name")
    return {"stage": "distil", **config} if isinstance(stage, Distil) else config


def foreseen(chosen: Recipe | Distil | Pipeline) -> dict[str, Any]:
    """What each stage will cost, by its name (a single recipe's is empty): a :class:`Plan`, or facts of a
    distillation."""
    from atoll.recipes.run import plan
    from atoll.recipes.run import prepare as prepare_run

    if isinstance(chosen, Pipeline):
        return {name: _foreseen(stage, chosen.stages) for name, stage in chosen.stages.items()}
    if isinstance(chosen, Distil):
        return {"": foresee_making(chosen)}
    return {"": plan(prepare_run(chosen))}


def _foreseen(stage: Stage, stages: Mapping[str, Stage]) -> Any:
    earlier = stages.get(start_of(stage) or "")
    if earlier is None:
        return foreseen(stage)[""]
    with tempfile.TemporaryDirectory() as folder:
        return foreseen(starting(stage, _untrained(earlier, stages, Path(folder))))[""]


def _untrained(stage: Stage, stages: Mapping[str, Stage], folder: Path) -> Path:
    """A model such as a stage will have made, with the weights that it begins with: written to ``folder``, or where it
    is already."""
    from atoll.recipes.run import export_model
    from atoll.recipes.run import prepare as prepare_run

    earlier = stages.get(start_of(stage) or "")
    if earlier is not None:
        stage = starting(stage, _untrained(earlier, stages, folder / "before"))
    if isinstance(stage, Recipe):
        setup = prepare_run(stage).setup
        export_model(setup.task.model(stage.seed), folder, stage, setup, None)
    elif stage.start is not None:
        return Path(stage.start)
    else:
        t, info = stage.teacher, stage.data.load().train.info
        about = about_model(t.model, info, info.num_classes or 1, t.seed, AsDenoiser(t.kind, 0.5))
        save_model(make_denoiser(t.model, info, t.seed, t.kind), folder, about)
    return folder


@dataclass
class StageRun:
    """A directory in which one distillation or a pipeline is run."""

    folder: Path
    chosen: Distil | Pipeline

    def go(self, say: Callable[[str, Any], None] = lambda _n, _s: None, on_row: Any = None) -> dict[str, Any]:
        """Run all that is not finished. ``say(stage, what)`` hears each stage's run before it starts, and its summary.

        Returns:
            the summary of the last stage, and for a pipeline those of all of them under ``stages``.
        """
        from atoll.recipes.pipeline_report import write_pipeline_report

        if isinstance(self.chosen, Distil):
            summary = finished(self.folder) or self._distil(self.folder, self.chosen)
            say("", summary)
            return summary
        summaries: dict[str, Any] = {}
        for name, stage in self.chosen.stages.items():
            folder = self.folder / name
            done = finished(folder) if (folder / "recipe.yaml").exists() else None
            if done is None:
                done = self._stage(name, folder, stage, say, on_row)
            summaries[name] = done
            say(name, done)
            write_pipeline_report(self.folder, self.chosen)
        return {"event": "end", "stages": summaries}

    def stages(self) -> dict[str, tuple[Path, Stage]]:
        """Folder and recipe by name; a single distillation has the empty one."""
        if isinstance(self.chosen, Distil):
            return {"": (self.folder, self.chosen)}
        return {name: (self.folder / name, stage) for name, stage in self.chosen.stages.items()}

    def finished(self) -> dict[str, dict[str, Any] | None]:
        """Each stage's summary; None where it has not ended."""
        return {n: finished(folder) if folder.exists() else None for n, (folder, _) in self.stages().items()}

    def models(self) -> list[Path]:
        return [folder / "model" for folder, _ in self.stages().values() if (folder / "model").is_dir()]

    def report(self) -> Path:
        """Write the page again."""
        from atoll.recipes.distil_report import write_distil_report
        from atoll.recipes.pipeline_report import write_pipeline_report

        if isinstance(self.chosen, Distil):
            return write_distil_report(self.folder)
        return write_pipeline_report(self.folder, self.chosen)

    def _stage(self, name: str, folder: Path, stage: Stage, say: Any, on_row: Any) -> dict[str, Any]:
        begins = start_of(stage)
        if begins and begins in getattr(self.chosen, "stages", {}):
            model = (self.folder / begins / "model").resolve()
            if any(model.glob("site*")):
                raise RunError(
                    f"Stage `{begins}` left a model at each site, and `{name}` starts from one; choose a method that "
                    "makes one for all."
                )
            stage = starting(stage, model)
        if isinstance(stage, Distil):
            say(name, stage)
            return self._distil(folder, stage)
        from atoll.data.picture import partition_svg
        from atoll.recipes.report import write_report

        run, plan = (reopen(folder, stage), None) if (folder / "recipe.yaml").exists() else start_run(stage, folder)
        assert isinstance(run, Run)
        say(name, plan or stage)
        summary = run.go(on_row)
        write_report(folder, partition_svg(run.prepared.setup.federation))
        return summary

    def _distil(self, folder: Path, stage: Distil) -> dict[str, Any]:
        from atoll.recipes.distil_report import write_distil_report

        ready = prepare(stage)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "recipe.yaml", as_yaml(stage, with_places=True).encode())
        summary = DistilRun(folder, ready).go()
        write_distil_report(folder)
        return summary


def start_stages(chosen: Distil | Pipeline, folder: Path) -> StageRun:
    """Make the run directory: refuses one that already holds a run."""
    if (folder / "recipe.yaml").exists():
        raise RunError(f"{folder} already holds a run; `atoll resume {folder}` goes on with it, or give another --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "recipe.yaml", as_yaml(chosen, with_places=True).encode())
    except OSError as e:
        raise RunError(f"The run directory {folder} cannot be written ({e.strerror}).") from e
    return StageRun(folder, chosen)


def reopen_stages(folder: Path) -> StageRun | None:
    """The stages that a run directory holds; None when it holds a single federated run."""
    chosen = load_any(str(folder / "recipe.yaml")) if (folder / "recipe.yaml").exists() else None
    return StageRun(folder, chosen) if isinstance(chosen, Distil | Pipeline) else None
