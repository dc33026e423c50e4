"""A site's rules at work: each function either lets something pass or refuses it with a sentence."""

from __future__ import annotations

from pathlib import Path

from atoll.data.dataset import SiteData
from atoll.federated.method import Method
from atoll.federated.visit import Job
from atoll.recipes.recipe import Recipe


class Guard:
    def recipe(self, recipe: Recipe, sites: int) -> None: ...

    def rows(self, own: SiteData) -> None: ...

    def sums(self, rows: int) -> None: ...

    def evaluate(self) -> None: ...

    def question(self, kind: str) -> None: ...

    def seconds(self, asked: float | None) -> float | None:
        return asked

    def visit(self, recipe: Recipe, method: Method, job: Job, sites: int) -> None: ...

    def leave(self, recipe: Recipe, method: Method, sites: int, kind: str, size: int) -> None: ...


def make_guard(policy: Path | None, folder: Path) -> Guard:
    return Guard()
