"""A run directory read back as numbers: totals by site, one small line a merge, and statistics over sites.

Events are read as a stream: memory grows with sites plus merges, not with their product. Nothing in the
directory is trusted to have the right type, since a report must not fail for a line that somebody else wrote.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from atoll.core.build import Deferred
from atoll.core.card import Card
from atoll.core.errors import AtollError, RunError
from atoll.core.files import read_json_lines
from atoll.federated.method import DeviceProfile, Method
from atoll.recipes.recipe import Recipe, read_recipe
from atoll.recipes.words import number

LOWER = ("loss", "perplexity", "bits_per_byte", "mae", "rmse", "mse", "error", "residual", "false_alarms")
HIGHER = ("accuracy", "r2", "f1", "auc")


@dataclass(slots=True)
class Merge:
    """One merge: what it moved and what came of it. Seconds are real, ``time`` is virtual."""

    round: int
    time: float
    seconds: float
    replies: float
    up: float
    down: float
    relayed: float
    """Bytes between aggregators."""
    flops: float
    metrics: dict[str, float]
    reported: dict[str, float]
    """Mean over the sites' visits of what they measured themselves."""
    epsilon: float
    refused: int


@dataclass(slots=True)
class Site:
    """One site over the whole run. ``seconds`` is virtual, of its device; NaN when that is not known."""

    name: str
    rows: float = math.nan
    visits: int = 0
    up: float = 0.0
    down: float = 0.0
    flops: float = 0.0
    seconds: float = math.nan
    refused: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Said:
    """A warning or a reason for refusal: how often, and who."""

    text: str
    times: int = 0
    sites: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Record:
    """All that a report needs. ``end`` is None for a run that is still going or was stopped."""

    folder: Path
    recipe_text: str
    config: dict[str, Any]
    recipe: Recipe | None
    method: Method | None
    plan: dict[str, Any]
    start: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    resumed: int = 0
    merges: list[Merge] = field(default_factory=list)
    sites: dict[str, Site] = field(default_factory=dict)
    refusals: dict[str, Said] = field(default_factory=dict)
    notes: dict[str, Said] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        """The metric that the run leads with; without a start event, the first that was ever measured."""
        measured = [name for m in self.merges for name in m.metrics]
        return str(self.start.get("headline") or next(iter(measured), ""))

    @property
    def evaluated(self) -> list[Merge]:
        """Merges after which the headline metric was measured (it may have been NaN)."""
        return [m for m in self.merges if self.headline in m.metrics]

    def higher_is_better(self, metric: str) -> bool | None:
        """None: nobody has said."""
        if metric == self.start.get("headline") and isinstance(self.start.get("higher_is_better"), bool):
            return bool(self.start["higher_is_better"])
        if metric.endswith(LOWER):
            return False
        return True if metric.endswith(HIGHER) else None

    def total(self, name: str) -> float:
        """Sum of ``up``, ``down``, ``relayed``, ``flops``, ``seconds`` or ``refused`` over the merges."""
        return math.fsum(v for m in self.merges if math.isfinite(v := float(getattr(m, name))))


def read_record(folder: Path) -> Record:
    """Read a run directory, finished or not.

    Raises:
        RunError: when there is no run, or a file in it is damaged.
    """
    try:
        text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    except OSError as e:
        raise RunError(f"{folder} holds no run (there is no recipe.yaml to read in it).") from e
    try:
        config = _mapping(yaml.safe_load(text))
        plan = _mapping(json.loads((folder / "plan.json").read_text())) if (folder / "plan.json").exists() else {}
    except (yaml.YAMLError, ValueError, OSError) as e:
        raise RunError(f"{folder} is damaged: recipe.yaml or plan.json cannot be read ({e}).") from e
    recipe, method = _recipe(config)
    record = Record(folder, text, config, recipe, method, plan)
    try:
        for event in read_json_lines(folder / "events.jsonl"):
            _take(record, _mapping(event))
    except ValueError as e:
        raise RunError(f"{folder / 'events.jsonl'} is damaged: a line is not JSON ({e}).") from e
    _device_seconds(record)
    return record


def _recipe(config: Mapping[str, Any]) -> tuple[Recipe | None, Method | None]:
    """The recipe as an object; None when it needs code that a reader may not run."""
    try:
        recipe = read_recipe(config)
        return recipe, recipe.make_method()
    except AtollError:
        return None, None


def _take(record: Record, event: Mapping[str, Any]) -> None:
    kind = event.get("event")
    if kind == "start":
        record.start = {**event, "sites": _list(event.get("sites"))}
        for i, rows in enumerate(record.start["sites"]):
            _site(record, str(i)).rows = number(rows)
    elif kind == "resume":
        record.resumed += 1
        record.end = None
    elif kind == "round":
        _take_merge(record, event)
    elif kind == "sites":
        for name, metrics in _mapping(event.get("metrics")).items():
            _site(record, name).metrics = _numbers(metrics)
    elif kind == "end":
        record.end = dict(event)


def _take_merge(record: Record, event: Mapping[str, Any]) -> None:
    up, down, flops = (_numbers(event.get(k)) for k in ("up_bytes", "down_bytes", "flops"))
    for name in down:
        _site(record, name).down += down[name]
    for name in up:
        _site(record, name).up += up[name]
    for name in flops:  # every visit that came back is here, and its reply may have been refused
        site = _site(record, name)
        site.flops, site.visits = site.flops + flops[name], site.visits + 1
    refused = _mapping(event.get("refused"))
    for name, reason in refused.items():
        _site(record, name).refused += 1
        _say(record.refusals, str(reason), name)
    for note in _list(event.get("notes")):
        _say(record.notes, str(note))
    reported: dict[str, list[float]] = {}
    for metrics in _mapping(event.get("site_metrics")).values():
        for name, value in _numbers(metrics).items():
            reported.setdefault(name, []).append(value)
    record.merges.append(
        Merge(
            round=len(record.merges) + 1,
            time=number(event.get("time")),
            seconds=number(event.get("seconds")),
            replies=number(event.get("replies")),
            up=_total(up),
            down=_total(down),
            relayed=number(event.get("relayed_bytes", 0)),
            flops=_total(flops),
            metrics=_numbers(event.get("metrics")),
            reported={name: mean(values) for name, values in reported.items()},
            epsilon=number(event.get("epsilon")),
            refused=len(refused),
        )
    )


def _say(where: dict[str, Said], text: str, site: str | None = None) -> None:
    """Texts that differ in their numbers alone are counted together, under the first of them."""
    said = where.setdefault(re.sub(r"\d[\d,.]*", "#", text), Said(text))
    said.times += 1
    if site is not None and site not in said.sites:
        said.sites.append(site)


def _device_seconds(record: Record) -> None:
    """Virtual seconds of each device: the clock's own arithmetic on the totals (``Engine._arrival``)."""
    if record.recipe is None or not record.start.get("sites"):
        return
    try:
        profiles = record.recipe.devices.profiles(len(record.start["sites"]), record.recipe.seed)
    except AtollError:
        return
    for i, p in enumerate(profiles):
        site = _site(record, str(i))
        site.seconds = _busy(site, p)


def _busy(site: Site, p: DeviceProfile) -> float:
    return site.down / p.down_bytes_per_second + site.flops / p.flops_per_second + site.up / p.up_bytes_per_second


def _site(record: Record, name: str) -> Site:
    return record.sites.setdefault(name, Site(name))


def _mapping(value: Any) -> dict[str, Any]:
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _numbers(value: Any) -> dict[str, float]:
    return {name: number(v) for name, v in _mapping(value).items()}


def _total(values: Mapping[str, float]) -> float:
    return math.fsum(v for v in values.values() if math.isfinite(v))


# ------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True, slots=True)
class Spread:
    """A metric over sites. ``worst_tenth`` is the mean of the worst tenth of the sites (rounded up)."""

    mean: float
    median: float
    worst_tenth: float
    worst: float
    worst_sites: tuple[str, ...]
    """Names of the worst tenth, the worst first."""
    missing: int
    """Sites without a finite number: left out of all of the above."""


def spread(values: Mapping[str, float], higher_is_better: bool | None) -> Spread:
    """Statistics over sites; the worst ones are NaN where nobody knows which end is the good one."""
    finite = {name: v for name, v in values.items() if math.isfinite(v)}
    missing = len(values) - len(finite)
    if not finite:
        return Spread(math.nan, math.nan, math.nan, math.nan, (), missing)
    middle, average = statistics.median(finite.values()), mean(finite.values())
    if higher_is_better is None:
        return Spread(average, middle, math.nan, math.nan, (), missing)
    ranked = sorted(finite, key=lambda name: finite[name] if higher_is_better else -finite[name])
    tenth = tuple(ranked[: -(-len(ranked) // 10)])
    return Spread(average, middle, mean([finite[n] for n in tenth]), finite[ranked[0]], tenth, missing)


def mean(values: Any) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def natural(name: str) -> tuple[int, int, str]:
    """Sort key: site 10 comes after site 9."""
    return (0, int(name), "") if name.isascii() and name.isdigit() else (1, 0, name)


# ------------------------------------------------------------------------------------------- cards


def cards_in(value: Any) -> Iterator[Card]:
    """The card of every published part inside a value, outermost first; a part's card is in its module."""
    if isinstance(value, Deferred):
        value = dict(value.arguments)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from cards_in(item)
    elif is_dataclass(value) and not isinstance(value, type | Card):
        own = value.card if isinstance(value, Method) else getattr(sys.modules[type(value).__module__], "CARD", None)
        if isinstance(own, Card):
            yield own
        for f in fields(value):
            yield from cards_in(getattr(value, f.name))
