"""The list of everything implemented, made from the cards; and the papers behind a recipe."""

from __future__ import annotations

import inspect
import typing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atoll.core.build import describe, find, parameters
from atoll.core.card import Cite, all_cards
from atoll.core.errors import RecipeError
from atoll.recipes.distil import Distil
from atoll.recipes.pipeline import Pipeline
from atoll.recipes.recipe import Recipe
from atoll.recipes.record import cards_in


def catalogue(claims: Path = Path("claims")) -> list[dict[str, Any]]:
    """One JSON-able entry per card: name, area, summary, source, parameters, card, claims with verdicts."""
    from atoll.claims.table import records

    verdicts: dict[str, list[dict[str, str]]] = {}
    for record in records(claims):
        for c in record["comparisons"]:
            entry = {"claim": record["name"], "expect": c["expect"], "verdict": c["verdict"]}
            verdicts.setdefault(subject(record, c["expect"]), []).append(entry)
    out = []
    for name, (card, module) in all_cards().items():
        out.append({
            "name": name, "area": card.area, "summary": card.summary, "source": [str(c) for c in card.cites],
            "parameters": _parameters(module), "card": asdict(card),
            "claims": verdicts.get(name, verdicts.get(module.rpartition(".")[2], [])),
        })  # fmt: skip
    return out


PARTS = (
    "method",
    "combine",
    "uplink",
    "downlink",
    "schedule",
    "select",
    "partition",
    "share",
    "local",
    "server",
    "topology",
)


def subject(record: dict[str, Any], expect: str) -> str:
    """The name of the part that a comparison is about: what its left arm has and its right arm has not."""
    left, _, right = expect.split()[:3]
    ours, theirs = (record["arms"][arm]["recipe"] for arm in (left, right))
    for part in PARTS:
        names = _names(ours.get(part))
        if names and ours.get(part) != theirs.get(part):
            return names[0]
    return str(record["subject"])


def _names(part: Any) -> list[str]:
    several = part if isinstance(part, list) else [part]
    return [p["name"] for p in several if isinstance(p, dict) and "name" in p]


def _parameters(module: str) -> dict[str, Any]:
    package, _, name = module.rpartition(".")
    try:
        builder = find(package, name)
    except RecipeError:
        return {}
    return {
        p.name: {
            "type": _type(p.annotation), "required": p.required, "help": p.help,
            "default": None if p.required else describe(p.default),
        }
        for p in parameters(builder).values()
    }  # fmt: skip


def _type(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Annotated:
        base, *bounds = typing.get_args(annotation)
        return f"{_type(base)} ({', '.join(str(b) for b in bounds)})"
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation).replace("typing.", "")


def cites_of(recipe: Recipe | Distil | Pipeline) -> list[tuple[str, Cite]]:
    """(part, paper) for each card that the recipe (or one of its stages) uses, each paper once."""
    if isinstance(recipe, Pipeline):
        return list({str(c): (part, c) for stage in recipe.stages.values() for part, c in cites_of(stage)}.values())
    found: dict[str, tuple[str, Cite]] = {}
    made = recipe.make_method() if isinstance(recipe, Recipe) else None
    for card in (*cards_in(made), *cards_in(recipe)):
        for c in card.cites:
            found.setdefault(str(c), (card.name, c))
    return list(found.values())
