"""A visit as two messages, for backends whose workers share no memory with the server.

The server packs what a site needs (the broadcasts that it has not received, content for it alone, the numbers of the
job), the site answers with what came of it, or that it lacks broadcasts that the server thinks it has. Both are
ordinary messages, so they cross any wire that messages cross. Whatever is read here may come from a stranger: it is
exactly what the other side would have written, or refused with a :class:`MessageError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from atoll.core.errors import BadReply, MessageError, one_line
from atoll.core.message import Message
from atoll.core.tree import Tree
from atoll.federated.secure.cohort import COHORT, Cohort
from atoll.federated.visit import Job, Outcome

VISIT, EVALUATE, OUTCOME, LACKS = "visit", "evaluate", "outcome", "lacks"
TOP = 1 << 53
"""Counts stay below it, so that JSON readers in any language agree on them."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A broadcast on its way to one site.

    Attributes:
        round: names it.
        message: encoded by the downlink codecs; for a snapshot, the replica itself.
        after: the broadcast before it, -1 for the first.
        snapshot: brings any site to this round.
    """

    round: int
    message: Message
    after: int = -1
    snapshot: bool = False


def pack(job: Job, deliveries: Iterable[Delivery], version: int, run: str, part: str | None = None) -> Message:
    """A request to do ``job``, or, with ``part``, to evaluate the site's model on that part of its rows.

    Args:
        version: the broadcast that the site must hold by then.
        run: names the run, so that nothing of another one is taken for it.
    """
    parts: dict[str, Tree] = {}
    about = [
        {"round": d.round, "after": d.after + 1, "snapshot": d.snapshot, **_put(parts, f"b{i}.", d.message)}
        for i, d in enumerate(deliveries)
    ]
    facts = {
        "run": run, "site": job.site, "round": job.round, "repeat": job.repeat, "cohort": job.cohort,
        "state_tag": job.state_tag, "version": version, "broadcasts": about,
        "own": _put(parts, "own.", job.message) if job.message is not None else None,
        "secure": _put(parts, "secure.", job.secure.message(COHORT)) if job.secure is not None else None,
    }  # fmt: skip
    return Message(VISIT, parts, facts) if part is None else Message(EVALUATE, parts, {**facts, "part": part})


@dataclass(frozen=True, slots=True)
class Request:
    """What a site reads from a request."""

    run: str
    job: Job
    version: int
    deliveries: tuple[Delivery, ...]
    part: str | None = None


def unpack(message: Message) -> Request:
    """Raises :class:`MessageError` for anything that :func:`pack` does not write."""
    if message.kind not in (VISIT, EVALUATE):
        raise MessageError(f"expected a request for a visit; got `{message.kind[:40]}`")
    f, used, deliveries = _Facts(message.facts), set[str](), []
    for i, about in enumerate(f.list("broadcasts")):
        content = _get(message, f"b{i}.", about, used)
        one = _Facts(about)
        deliveries.append(Delivery(one.count("round"), content, one.count("after") - 1, one.flag("snapshot")))
    own, tag, secure = f.facts.get("own"), f.tag("state_tag"), f.facts.get("secure")
    site = f.count("site")
    job = Job(
        site, f.count("round"), f.count("repeat"), f.count("cohort"),
        _get(message, "own.", own, used) if own is not None else None, tag,
        secure=Cohort.read(_get(message, "secure.", secure, used), site) if secure is not None else None,
    )  # fmt: skip
    _nothing_else(message, used)
    part = f.text("part") if message.kind == EVALUATE else None
    return Request(f.text("run"), job, f.count("version"), tuple(deliveries), part)


def pack_outcome(outcome: Outcome, job: Job, run: str) -> Message:
    """What a site answers."""
    parts: dict[str, Tree] = {}
    facts = {
        "run": run, "site": job.site, "round": job.round, "repeat": job.repeat, "state_tag": outcome.state_tag,
        "num_samples": outcome.num_samples, "flops": outcome.flops, "seconds": outcome.seconds, "error": outcome.error,
        "metrics": hexed(outcome.metrics),
        "message": _put(parts, "m.", outcome.message) if outcome.message is not None else None,
    }  # fmt: skip
    return Message(OUTCOME, parts, facts)


def unpack_outcome(message: Message, job: Job, run: str) -> Outcome:
    """What came of ``job``.

    Raises:
        MessageError: not what :func:`pack_outcome` writes.
        BadReply: it is, but of another visit (a late or repeated reply).
    """
    if message.kind != OUTCOME:
        raise MessageError(f"expected the outcome of a visit; got `{message.kind[:40]}`")
    f = _Facts(message.facts)
    said = f.text("run"), f.count("site"), f.count("round"), f.count("repeat")
    if said != (run, job.site, job.round, job.repeat):
        raise BadReply(
            f"the reply belongs to another visit (site {said[1]}, round {said[2]}, try {said[3]}), so it is late or "
            "was sent again"
        )
    about, used = f.facts.get("message"), set[str]()
    content = _get(message, "m.", about, used) if about is not None else None
    _nothing_else(message, used)
    return Outcome(
        job.site, content, f.tag("state_tag"), f.count("num_samples"), f.number("flops"), f.number("seconds"),
        f.metrics("metrics"), f.text("error", 2000),
    )  # fmt: skip


def _put(parts: dict[str, Tree], prefix: str, m: Message) -> dict[str, Any]:
    """Add a message's trees under a prefix; returns the rest of it."""
    parts |= {f"{prefix}{name}": tree for name, tree in m.parts.items()}
    return {"kind": m.kind, "facts": dict(m.facts), "parts": list(m.parts)}


def _get(message: Message, prefix: str, about: Any, used: set[str]) -> Message:
    """The message that was put there; an empty tree left nothing but its name."""
    if not isinstance(about, dict):
        raise MessageError("a message within a message is malformed")
    kind, facts, names = about.get("kind"), about.get("facts"), about.get("parts")
    if not isinstance(kind, str) or not isinstance(facts, dict) or not isinstance(names, list):
        raise MessageError("a message within a message is malformed")
    if not all(isinstance(n, str) and n and "/" not in n for n in names):
        raise MessageError("a message within a message has parts without a proper name")
    used |= {prefix + name for name in names}
    return Message(kind, {name: message.parts.get(prefix + name, {}) for name in names}, facts)


def _nothing_else(message: Message, used: set[str]) -> None:
    if odd := sorted(message.parts.keys() - used):
        raise MessageError(f"unknown part `{odd[0][:80]}`")


class _Facts:
    """Facts from a stranger, one at a time: each of its type, or refused."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = facts

    def count(self, name: str) -> int:
        value = self.facts.get(name)
        if type(value) is not int or not 0 <= value < TOP:
            raise MessageError(f"`{name}` must be a count")
        return value

    def flag(self, name: str) -> bool:
        value = self.facts.get(name)
        if not isinstance(value, bool):
            raise MessageError(f"`{name}` must be true or false")
        return value

    def number(self, name: str) -> float:
        value = self.facts.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise MessageError(f"`{name}` must be a number from 0")
        try:
            return float(value)
        except OverflowError as e:
            raise MessageError(f"`{name}` must be a number from 0") from e

    def text(self, name: str, most: int = 200) -> str:
        value = self.facts.get(name)
        if not isinstance(value, str) or len(value) > most:
            raise MessageError(f"`{name}` must be a text of at most {most} characters")
        return value

    def list(self, name: str) -> list[Any]:
        value = self.facts.get(name)
        if not isinstance(value, list):
            raise MessageError(f"`{name}` must be a list")
        return value

    def tag(self, name: str) -> str | None:
        """Tags name files at the site: two counts, and nothing else."""
        value = self.facts.get(name)
        if value is not None and not (isinstance(value, str) and re.fullmatch(r"[0-9]{1,16}-[0-9]{1,16}", value)):
            raise MessageError(f"`{name}` is not the name of a state")
        return value

    def metrics(self, name: str) -> dict[str, float]:
        """Numbers by name, as hexadecimal text: exact, and NaN is allowed."""
        value = self.facts.get(name)
        if not isinstance(value, dict) or len(value) > 1000:
            raise MessageError(f"`{name}` must be numbers by name")
        try:
            return {one_line(n, 200): float.fromhex(v) for n, v in value.items()}
        except (TypeError, ValueError, OverflowError) as e:
            raise MessageError(f"`{name}` must be numbers by name") from e


def hexed(metrics: Mapping[str, float]) -> dict[str, str]:
    return {n: float(v).hex() for n, v in metrics.items()}
