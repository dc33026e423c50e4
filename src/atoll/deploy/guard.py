"""A site's rules at work: each function lets something pass, or refuses it with a sentence (:mod:`.policy`)."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from atoll.core.errors import AtollError
from atoll.core.imports import trust
from atoll.core.message import Message
from atoll.data.dataset import SiteData
from atoll.deploy import policy as rules
from atoll.deploy.meter import Meter
from atoll.deploy.policy import Policy, read_policy
from atoll.federated.method import Method
from atoll.recipes.recipe import Recipe, recipe_config


class Refused(AtollError):
    """The site's rules do not allow it."""


@dataclass(frozen=True, slots=True)
class Guard:
    """Rules, and the book of what has left."""

    policy: Policy
    meter: Meter

    def recipe(self, recipe: Recipe, sites: int) -> None:
        """Before anything is read. All that speaks against it, at once."""
        if recipe.attack is not None:
            raise Refused("The recipe makes sites hostile, which is for simulations only.")
        if recipe.labelled < 1:
            raise Refused("The recipe hides labels of a site's rows (`labelled`), which is for simulations only.")
        method = recipe.make_method(sites)
        named = (getattr(recipe.data, name, None) for name in ("target", "site"))
        columns = [*(getattr(recipe.data, "features", None) or ()), *(c for c in named if c)]
        refused = (
            rules.recipe_refusal(self.policy, method.card.name, method.local.produces, sites),
            rules.columns_refusal(self.policy, columns),
            rules.files_refusal(self.policy, recipe_config(recipe)),
        )
        if found := [r for r in refused if r]:
            raise found_all(found)

    def rows(self, recipe: Recipe, own: SiteData) -> None:
        """What has been read, before anything about it leaves."""
        info, source = own.train.info, recipe.data
        columns = rules.columns_read(info, getattr(source, "target", None), getattr(source, "site", None))
        _pass(rules.columns_refusal(self.policy, columns if info.kind == "table" else ()))
        _pass(rules.description_refusal(self.policy, info))

    def model(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        size = sum(t.numel() * t.element_size() for t in [*parameters, *model.buffers()])
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        _pass(rules.model_refusal(self.policy, sum(p.numel() for p in parameters), size, machine))

    def sums(self, own: SiteData) -> None:
        _pass(rules.sums_refusal(self.policy, len(own.train)))

    def evaluation(self, own: SiteData, part: str | None) -> None:
        rows: Any = getattr(own, part or "", own.test)
        _pass(rules.evaluation_refusal(self.policy, len(rows)))

    def cohort(self, cohort: int, sites: int) -> None:
        """Before a visit: whether enough others take part."""
        _pass(rules.cohort_refusal(self.policy, cohort, sites))

    def seconds(self, asked: float | None) -> float | None:
        return rules.visit_seconds(self.policy, asked)

    def reply(self, method: Method, kind: str, cohort: int, sites: int, size: int, about: str) -> None:
        """Book a reply that is about to leave for the first time."""
        _pass(rules.kind_refusal(self.policy, kind))
        event = rules.participation(self.policy, method, cohort, sites)
        _pass(self.meter.book(self.policy, size, event, about))

    def without_metrics(self, outcome: Message) -> Message:
        """Under an epsilon budget, a visit's metrics stay here: they carry no noise. (Its work and its time say how
        many rows there are, which the server has been told.)"""
        return (
            outcome if self.policy.epsilon_per_day is None else replace(outcome, facts={**outcome.facts, "metrics": {}})
        )

    def again(self, size: int, about: str) -> None:
        """Book other bytes that leave: a reply that was sent before, a description, sums, metrics."""
        _pass(self.meter.book(self.policy, size, None, about))


def make_guard(policy: Path | None, folder: Path) -> Guard:
    """The guard of a site whose folder keeps the book. The packages that the rules name may be imported."""
    found = read_policy(policy)
    trust(*found.packages)
    return Guard(found, Meter(folder / "book.jsonl"))


def found_all(problems: list[str]) -> Refused:
    return Refused(" ".join(problems))


def _pass(refusal: str | None) -> None:
    if refusal is not None:
        raise Refused(refusal)
