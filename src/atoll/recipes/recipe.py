"""A recipe is a value: everything that a run depends on. YAML is one way to write it, a Python function another."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
import traceback
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Le, Lt

from atoll.core.build import Deferred, Reader, describe, find, schema
from atoll.core.errors import AtollError, DataError, RecipeError, did_you_mean
from atoll.core.imports import trust
from atoll.core.streams import numpy_stream
from atoll.data.dataset import Federation, Info
from atoll.data.federation import make_federation
from atoll.data.partition import Partitioner
from atoll.data.partitions.dirichlet import Dirichlet
from atoll.data.source import Source
from atoll.data.sources.digits import Digits
from atoll.federated.backends.inline import Inline
from atoll.federated.device_profiles.uniform import Uniform
from atoll.federated.devices import Devices
from atoll.federated.method import Backend, Codec, Combine, Method, Schedule, Select, Topology
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.secure.secure_sum import SecureSum
from atoll.federated.simulate.attacks import Attack, Hostile
from atoll.models.mlp import MLP
from atoll.models.model import ModelBuilder
from atoll.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run.

    Args:
        name: of the run and its directory: letters, digits, spaces and ``._+-``.
        seed: root of all random streams (privacy noise apart).
        data: where the rows come from.
        partition: how a simulation gives them to sites.
        sites: number of sites; None takes as many as the data has owners, and 10 where it names none.
        validation, test: fractions of each site's rows that it keeps for itself.
        public: fraction of the training rows that the server owns.
        labelled: fraction of each site's training rows that have a label; a method that cannot learn from inputs alone
            does not see the others.
        limit: use at most so many rows.
        task: what is learned; None takes what fits the data.
        model: the network.
        site_models: networks for sites with different hardware, given in turn.
        method: the federated method.
        rounds: merges.
        uplink, downlink: codecs, instead of the method's.
        combine, select, schedule, topology: parts instead of the method's.
        secure: masks under which the server learns only the sum of the updates.
        devices: hardware of the sites.
        attack: what hostile sites do; for simulations that measure a defence.
        hostile: fraction of the sites that are hostile.
        backend: where visits run.
        device: where tensors live; auto takes a GPU when there is one and the backend is inline.
        threads: of each process, for one operator.
        evaluate_every: merges between evaluations of the global model; 0 only evaluates the last.
        timeout: seconds after which a visit counts as failed.
        max_reply_bytes: largest reply that is accepted.
        delta: of the (epsilon, delta) that the ledger reports when noise is added; None takes 1 / (10 sites).
        tensorboard: also write TensorBoard scalars.
    """

    name: str = "run"
    seed: int = 0
    data: Source = field(default_factory=Digits)
    partition: Partitioner = field(default_factory=Dirichlet)
    sites: Annotated[int, Ge(1)] | None = None
    validation: Annotated[float, Ge(0), Lt(1)] = 0.0
    test: Annotated[float, Ge(0), Lt(1)] = 0.2
    public: Annotated[float, Ge(0), Lt(1)] = 0.0
    labelled: Annotated[float, Ge(0), Le(1)] = 1.0
    limit: Annotated[int, Ge(1)] | None = None
    task: Task | None = None
    model: ModelBuilder = field(default_factory=MLP)
    site_models: tuple[ModelBuilder, ...] = ()
    method: Method = field(default_factory=fedavg)
    rounds: Annotated[int, Ge(1), Le(10**9)] = 20
    uplink: tuple[Codec, ...] | None = None
    downlink: tuple[Codec, ...] | None = None
    combine: Combine | None = None
    select: Select | None = None
    schedule: Schedule | None = None
    topology: Topology | None = None
    secure: SecureSum | None = None
    devices: Devices = field(default_factory=Uniform)
    attack: Attack | None = None
    hostile: Annotated[float, Ge(0), Lt(1)] = 0.2
    backend: Backend = field(default_factory=Inline)
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    threads: Annotated[int, Ge(1), Le(256)] = 1
    evaluate_every: Annotated[int, Ge(0)] = 1
    timeout: Annotated[float, Gt(0)] | None = None
    max_reply_bytes: Annotated[int, Ge(1)] = 4 << 30
    delta: Annotated[float, Gt(0), Le(1)] | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w .+-]*", self.name):
            raise AtollError(
                f"`name` also names the run's directory: letters, digits, spaces and `._+-`; got {self.name!r}."
            )

    def federation(self) -> Federation:
        """Load the data and give it to sites."""
        return make_federation(
            self.data, self.partition, sites=self.sites, otherwise=DEFAULT_SITES, seed=self.seed,
            validation=self.validation, test=self.test, public=self.public, limit=self.limit,
            labelled=self.labelled,
        )  # fmt: skip

    def make_task(self, info: Info) -> Task:
        """The task, knowing the data and the networks."""
        task: Any = self.task
        if task is None:
            of_series = "anomaly_detection" if info.num_classes else "forecasting"
            kinds = {"text": "language", "graph": "node_classification", "series": of_series}
            usual = "classification" if info.num_classes else "regression"
            task = Deferred(find("atoll.tasks", kinds.get(info.kind, usual)))
        if not isinstance(task, Deferred):
            return task  # type: ignore[no-any-return]  # a Python recipe gave a finished task
        name = str(task.builder.__module__.rsplit(".", 1)[-1])
        if name == "classification" and not info.num_classes:
            raise DataError(f"`{info.name}` has no classes to tell apart; use `task: regression`.")
        made: Task = task(info=info, network=self.model, site_networks=self.site_models)
        return made

    def make_method(self, num_sites: int | None = None) -> Method:
        """The method with the recipe's own parts in place. ``num_sites``: of the federation, once it is known."""
        own = {name: getattr(self, name) for name in PARTS}
        parts = {name: part for name, part in own.items() if part is not None}
        made = self.method.but(local=self.method.local.over(self.rounds), **parts)
        if self.attack is None:
            return made
        sites = num_sites or self.sites or DEFAULT_SITES
        drawn = numpy_stream(self.seed, "hostile").permutation(sites)[: round(self.hostile * sites)]
        return made.but(local=Hostile(made.local, tuple(sorted(int(i) for i in drawn)), self.attack))


DEFAULT_SITES = 10
PARTS = ("uplink", "downlink", "combine", "select", "schedule", "topology", "secure")


def read_recipe(value: Any, where: str = "recipe") -> Recipe:
    """A recipe from plain mappings; raises :class:`RecipeError` with all problems at once."""
    if not isinstance(value, Mapping):
        raise RecipeError(["a recipe is a mapping such as `method: fedavg`"], where)
    reader = Reader()
    recipe = reader.call(Recipe, value, "")
    if reader.problems:
        raise RecipeError(reader.problems, where)
    assert isinstance(recipe, Recipe)
    return recipe


def load_recipe(reference: str, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from ``file.yaml`` or ``file.py:function``, with ``a.b=c`` changes on top.

    A YAML file is data: reading it never runs code. A Python file is the caller's own program.

    Raises:
        RecipeError: all problems at once, each with its place.
    """
    path, _, function = reference.partition(":") if ".py" in reference else (reference, "", "")
    if function or path.endswith(".py"):
        recipe: Recipe = from_python(Path(path), function or "recipe")
        return read_recipe(edit(describe(recipe), changes), reference) if changes else recipe
    whole = edit(read_yaml(Path(path)), changes)
    if "stages" in whole or "stage" in whole:
        raise RecipeError(["it has stages; this works with a single federated recipe"], reference)
    return read_recipe(whole, reference)


class _OnceEach(yaml.SafeLoader):
    """Plain data only, and no key twice: the last one would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"`{key.value}` stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str = "a recipe is a mapping such as `method: fedavg`") -> dict[str, Any]:
    """The mapping in a YAML file; plain data only, and no key twice. ``what``: it should hold, for the error."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_OnceEach)
    except FileNotFoundError as e:
        near = sorted(str(p) for p in Path().glob("recipes/*.yaml"))
        raise RecipeError([f"there is no file {path}.{did_you_mean(str(path), near)}"], str(path)) from e
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError([f"{path} cannot be read as text ({e})"], str(path)) from e
    except yaml.YAMLError as e:
        where = getattr(e, "problem_mark", None)
        line = f" in line {where.line + 1}" if where is not None else ""
        why = getattr(e, "problem", None) or "it cannot be parsed"
        raise RecipeError([f"{path} is not YAML{line}: {why}"], str(path)) from e
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError([what], str(path))
    return value


def from_python(path: Path, function: str, kinds: tuple[type, ...] = ()) -> Any:
    """What a function of the user's own file returns: a recipe, or one of ``kinds``."""
    if not path.exists():
        raise RecipeError([f"there is no file {path}"], f"{path}:{function}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # worker processes and dataclasses look their module up
    trust(path.stem)  # the caller named this file: the models in it are the caller's too
    try:
        spec.loader.exec_module(module)
        build = getattr(module, function, None)
        if not callable(build):
            own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
            raise RecipeError([f"{path} has no function `{function}`.{did_you_mean(function, own)}"])
        recipe = build()
    except AtollError:
        raise
    except Exception as e:  # the user's own program: say where it went wrong
        here = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == spec.origin]
        line = f" in line {here[-1]}" if here else ""
        raise RecipeError([f"{path} cannot be run: {type(e).__name__}{line}: {e}"], f"{path}:{function}") from e
    if not isinstance(recipe, (Recipe, *kinds)):
        raise RecipeError([f"{path}:{function} must return a Recipe, not {type(recipe).__name__}"])
    return recipe


def edit(value: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Apply ``a.b=c``; values are YAML. A name that stands for a part becomes a mapping when a field of it is set."""
    for change in changes:
        place, equals, text = change.partition("=")
        if not equals or not all(place.split(".")):
            raise RecipeError([f"`--set {change}` is not of the form a.b=c"])
        *path, last = place.split(".")
        at: Any = value
        for step in path:
            if isinstance(at, list):
                if not step.isdigit() or int(step) >= len(at):
                    raise RecipeError([f"`--set {change}`: there is no item {step} to set"])
                if isinstance(at[int(step)], str):
                    at[int(step)] = {"name": at[int(step)]}
                at = at[int(step)]
                continue
            if isinstance(at.get(step), str):
                at[step] = {"name": at[step]}
            elif at.get(step) is None:
                at[step] = _default_of(step) if at is value else {}
            at = at[step]
            if not isinstance(at, dict | list):
                raise RecipeError([f"`--set {change}`: `{step}` is a value and has no fields"])
        try:
            new = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise RecipeError([f"`--set {change}`: {text!r} is not a YAML value"]) from e
        if isinstance(at, list):
            if not last.isdigit() or int(last) >= len(at):
                raise RecipeError([f"`--set {change}`: there is no item {last} to set"])
            at[int(last)] = new
        else:
            at[last] = new
    return value


def _default_of(name: str) -> Any:
    """What a recipe has for ``name`` when it does not say, so that ``--set method.training.lr=...`` works."""
    default = describe(Recipe()).get(name)
    return {"name": default["name"]} if isinstance(default, dict) and "name" in default else {}


def recipe_config(recipe: Any) -> dict[str, Any]:
    """The resolved recipe: plain values, every default spelled out."""
    out: dict[str, Any] = describe(recipe)
    return out


PATHS = ("path", "edges", "test_path", "images", "labels", "test_images", "test_labels", "texts")
"""Fields that hold paths."""


def located(value: Any, stages: Container[str] = (), field_name: str = "") -> Any:
    """The same with each relative path to something that exists made absolute: good from any folder. ``stages``: what
    is not meant as a path where something starts."""
    if isinstance(value, dict):
        return {k: located(v, stages, k) for k, v in value.items()}
    a_path = field_name in PATHS or (field_name == "start" and value not in stages)
    if a_path and isinstance(value, str) and value and Path(value).exists():
        return str(Path(value).resolve())
    return value


def recipe_yaml(recipe: Recipe, with_places: bool = False) -> str:
    """The resolved recipe as YAML; ``with_places`` makes the paths of its data and models absolute."""
    config = recipe_config(recipe)
    return str(yaml.safe_dump(located(config) if with_places else config, sort_keys=False, allow_unicode=True))


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a YAML recipe, generated from the builders' signatures."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema(Recipe)}


def replace(recipe: Recipe, **fields: Any) -> Recipe:
    return dataclasses.replace(recipe, **fields)
