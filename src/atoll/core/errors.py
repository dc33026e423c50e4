"""What can go wrong, as one small family.

Every message says what was wrong, where, what was allowed, and the next step, in a sentence or two. The
command line prints the message alone; a traceback is only ever shown for our own slips.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class AtollError(ValueError):
    """Base of every error that a user can cause and mend."""


class DataError(AtollError):
    """Data is missing, of the wrong type, or unusable."""


class MessageError(AtollError):
    """Bytes that are not a well-formed message, or a message over its limits."""


class BadReply(AtollError):
    """A site's reply that must not be merged (wrong shape, NaN, too large, replayed)."""


class SiteFailed(AtollError):
    """A site raised, hung or died during its work."""


class RunError(AtollError):
    """A run directory that cannot be read, resumed or written."""


class RecipeError(AtollError):
    """One or more problems in a recipe, reported together."""

    def __init__(self, problems: Sequence[str], where: str = "recipe") -> None:
        self.problems = tuple(problems)
        head = f"{len(self.problems)} problem{'s' * (len(self.problems) > 1)} in {where}"
        super().__init__(head + ":\n" + "\n".join(f" {i}. {p}" for i, p in enumerate(self.problems, 1)))


def one_line(text: object, most: int = 1000) -> str:
    """What a stranger said, fit for a log or a terminal: one line, printable characters, not endless."""
    line = " ".join(str(text)[: 2 * most].split())
    return "".join(c if c.isprintable() else "?" for c in line)[:most]


def did_you_mean(word: object, allowed: Iterable[str]) -> str:
    """`` Did you mean `x`?`` with a leading space, or the choices when nothing is close."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(str(word), allowed, n=1, cutoff=0.6)
    if close:
        return f" Did you mean `{close[0]}`?"
    return f" Choose from: {', '.join(allowed)}." if allowed else ""


def first_line(e: BaseException) -> str:
    """What a library's exception says, without its advice."""
    return next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)[:300]
