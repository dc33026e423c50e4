"""Cards: what a published method is, whom to cite, and what it exposes. One source for every listing.

A module that implements something publishable has a module-level ``CARD``. The method table, the validator, the
docs and ``atoll cite`` read these and nothing else, so they cannot disagree.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Cite:
    """A paper. ``arxiv`` is an id such as ``"1602.05629"`` (empty when there is none)."""

    authors: str
    year: int
    title: str
    arxiv: str = ""
    venue: str = ""

    def __str__(self) -> str:
        where = ", ".join(x for x in (self.venue, f"arXiv {self.arxiv}" if self.arxiv else "") if x)
        return f"{self.authors} ({self.year}). {self.title}." + (f" {where}." if where else "")

    def bibtex(self) -> str:
        first = "".join(c for c in self.authors.split(",")[0].split()[-1] if c.isalpha()).lower()
        authors = self.authors.replace(", ", " and ")
        lines = [f"  title = {{{self.title}}}", f"  author = {{{authors}}}", f"  year = {{{self.year}}}"]
        if self.venue:
            lines.append(f"  booktitle = {{{self.venue}}}")
        if self.arxiv:
            lines += [f"  eprint = {{{self.arxiv}}}", "  archivePrefix = {arXiv}"]
        return f"@misc{{{first}{self.year},\n" + ",\n".join(lines) + "\n}"


Want = Literal[
    "less traffic", "few rounds", "late sites", "many sites", "no server",
    "sites differ in labels", "sites differ in features", "sites differ in hardware", "weak devices",
    "a model per site", "few examples a site", "no labels", "tiny batches", "sparse features", "badly scaled models",
    "hostile sites", "a privacy guarantee", "hiding updates from the server",
    "language models", "pretrained models", "graphs", "tables and series", "tasks that arrive in turn",
    "generative models", "few calls a sample", "distilling without data",
    "statistics without training", "a baseline",
]  # fmt: skip
"""What a user may be looking for, in the order of ``docs/methods.md``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Facts about a method that users choose by.

    Attributes:
        area: the part of the toolkit, e.g. ``"federated method"``, ``"codec"``, ``"combiner"``, ``"partitioner"``.
        summary: one line, lower case, without a full stop.
        server_sees: what a curious server learns from one site's reply.
        additive: the merge is a weighted sum, so secure aggregation can run underneath.
        privacy_unit: what one unit of privacy is (``"site"``, ``"example"``) or empty when nothing is promised.
        threat_model: what a protection assumes; empty when nothing is promised.
        suits: what a user wants that this helps with, e.g. ``"less traffic"``.
    """

    name: str
    area: str
    summary: str
    cites: tuple[Cite, ...] = ()
    server_sees: str = ""
    additive: bool | None = None
    needs_public_data: bool = False
    privacy_unit: str = ""
    threat_model: str = ""
    suits: tuple[Want, ...] = ()


@cache
def all_cards(root: str = "atoll") -> dict[str, tuple[Card, str]]:
    """Every card of the package by name, with the module that holds it."""
    found: dict[str, tuple[Card, str]] = {}
    for name in _modules(root):
        card = getattr(importlib.import_module(name), "CARD", None)
        if isinstance(card, Card):
            if card.name in found:
                raise AssertionError(f"two cards are named {card.name}: {found[card.name][1]} and {name}")
            found[card.name] = (card, name)
    return dict(sorted(found.items()))


def _modules(root: str) -> Iterator[str]:
    package = importlib.import_module(root)
    for info in pkgutil.walk_packages(package.__path__, root + "."):
        if not info.name.rsplit(".", 1)[-1].startswith("__"):
            yield info.name
