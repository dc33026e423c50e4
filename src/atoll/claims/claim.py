"""A claim: a runnable comparison whose expectation is written down before the run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, MinLen

from atoll.core.build import Reader
from atoll.core.errors import RecipeError, did_you_mean

Metric = Literal["final", "mean_last", "time_to", "worst_site", "mean_sites", "sites_on_common", "bytes"]
COMPARISON = re.compile(r"^(\w+) (>=|>|<=|<) (\w+)(?: ([+-]) ([\d.]+))?$")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Arms that do the same work, and what is expected of them.

    Args:
        name: equal to the file's name.
        subject: the method (its card's name) that the claim is about.
        statement: what is claimed, in one sentence.
        source: the paper.
        headline: the paper's own figure.
        stage: what an arm is: a federated run, or the making of a few-step generator (``recipes/distil.py``), whose
            ``start`` may be a federated recipe: its model is the teacher.
        work: recipe fields that all arms share.
        arms: per arm, the recipe fields that differ.
        tune: per arm (or ``all``), fields and the values to try; chosen by the metric on ``tune_seed``.
        metric: ``final`` or ``mean_last`` (of the task's headline over the last fifth of the evaluations),
            ``time_to`` (virtual seconds until the headline reaches ``target``), ``worst_site`` (the worst decile
            of the sites' headline), ``bytes`` (up and down). For distillation: what the judge says at the
            first of an arm's ``calls``.
        measure: one of the task's metrics instead of its headline, e.g. ``residual``.
        target: for ``time_to``.
        seeds: each arm runs once per seed.
        tune_seed: for tuning only, never reported.
        expect: comparisons between arms such as ``fedprox > fedavg`` or ``frl >= fedavg - 0.02``. Only a difference
            beyond seed noise is called reproduced (``claims/verdict.py``); ``>=`` also counts arms that are equal.
        note: what a reader should know.
    """

    name: str
    subject: str
    statement: str
    source: str = ""
    headline: str = ""
    stage: Literal["federate", "distil"] = "federate"
    work: Mapping[str, Any] = field(default_factory=dict)
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tune: Mapping[str, Mapping[str, list[Any]]] = field(default_factory=dict)
    metric: Metric = "mean_last"
    measure: str | None = None
    target: float | None = None
    seeds: Annotated[tuple[int, ...], MinLen(1)] = (0, 1, 2)
    tune_seed: Annotated[int, Ge(0)] = 1000
    expect: tuple[str, ...] = ()
    note: str = ""


def load_claim(path: Path) -> Claim:
    """Read and check a claim file; raises :class:`RecipeError` with all problems."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as e:
        raise RecipeError([f"{path} cannot be read as YAML"], str(path)) from e
    if not isinstance(value, dict):
        raise RecipeError(["a claim is a mapping with name, subject, statement, arms, expect"], str(path))
    reader = Reader()
    claim = reader.call(Claim, value, "")
    problems = list(reader.problems)
    if isinstance(claim, Claim):
        if claim.name != path.stem:
            problems.append(f"`name` is {claim.name}, but the file is {path.name}")
        if claim.metric == "time_to" and claim.target is None:
            problems.append("`target` is missing; time_to needs it")
        if not claim.arms or not claim.expect:
            problems.append("a claim has `arms` and says what it `expect`s of them")
        for arm in sorted(claim.tune.keys() - claim.arms.keys() - {"all"}):
            problems.append(f"`tune.{arm}`: there is no such arm.{did_you_mean(arm, [*claim.arms, 'all'])}")
        for text in claim.expect:
            match = COMPARISON.match(text)
            if not match or not {match[1], match[3]} <= set(claim.arms):
                problems.append(f"`expect`: {text!r} is not a comparison of two arms such as `a > b`")
    if problems:
        raise RecipeError(problems, str(path))
    assert isinstance(claim, Claim)
    return claim
