"""What the run's method is made of, what it promises, and whom to cite."""

from __future__ import annotations

import dataclasses
from html import escape as e
from typing import Any

from atoll.federated.method import Method
from atoll.federated.secure.secure_sum import CARD as SECURE
from atoll.recipes.page import table
from atoll.recipes.readings import at_delta, epsilon_of, part_name, privacy_unit
from atoll.recipes.record import Record, cards_in
from atoll.recipes.words import plain

PARTS = {
    "share": "what travels",
    "local": "work at a site",
    "uplink": "codecs up",
    "downlink": "codecs down",
    "combine": "how replies are merged",
    "server": "step at the server",
    "select": "who takes part",
    "schedule": "when to merge",
    "topology": "who talks to whom",
    "secure": "secure aggregation",
}


def method(r: Record) -> str:
    name = str(r.start.get("method") or part_name(r.config.get("method")))
    if r.method is None:
        why = "The recipe names code that a report does not load; its parts are in the resolved recipe below."
        return f'<h2>Method</h2>\n<p><b>{e(name)}</b></p>\n<p class="lead">{why}</p>' if name else ""
    card = r.method.card
    facts = {
        "What the server sees": card.server_sees if r.method.secure is None else SECURE.server_sees,
        "The merge": _merge(r.method),
        "Privacy": _privacy(r),
        "Threat model": card.threat_model,
    }
    listed = "".join(f"<dt>{k}</dt><dd>{e(v)}</dd>" for k, v in facts.items() if v)
    out = [f"<h2>Method</h2>\n<p><b>{e(card.name)}</b>: {e(card.summary)}.</p>"]
    out += [f'<dl class="facts">{listed}</dl>', _composition(r.method)]
    cites: dict[str, str] = {}
    for own in (*cards_in(r.method), *cards_in(r.recipe)):
        for c in own.cites:
            cites.setdefault(str(c), own.name)
    if cites:
        items = "".join(f"<li><b>{e(who)}</b>: {e(what)}</li>\n" for what, who in cites.items())
        out.append(f"<h3>Please cite</h3>\n<ul>\n{items}</ul>")
    return "\n".join(out)


def _merge(method: Method) -> str:
    if method.secure is not None:
        return "a sum under masks: the server saw no single update"
    if method.combine.additive:
        return "a weighted sum, so secure aggregation can run underneath"
    return "looks at single replies, so secure aggregation cannot run underneath"


def _privacy(r: Record) -> str:
    epsilon = epsilon_of(r)
    if epsilon is not None:
        whose = "for all rows of a site together" if privacy_unit(r) == "site" else f"for each {privacy_unit(r)}"
        return f"epsilon {plain(epsilon, 3)}{at_delta(r)}, {whose}"
    return "no noise was added, so there is no formal guarantee"


def _composition(method: Method) -> str:
    """A method is FedAvg with named differences: the table says which."""
    usual, rows = Method(), []
    for field, label in PARTS.items():
        own = getattr(method, field)
        rows.append([label, brief(own), "the same" if own == getattr(usual, field) else "differs"])
    caption = "Its parts. Settings that are not shown have their default."
    tinted = [row[2] == "differs" for row in rows]
    return table(["part", "in this run", "FedAvg's is"], rows, caption, tinted, kind="words")


def brief(value: Any) -> str:
    """A part with those settings that differ from their defaults, e.g. ``Apply(lr=0.5)``."""
    if value is None:
        return "none"
    if isinstance(value, tuple | list):
        return ", ".join(brief(v) for v in value) or "none"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return f"{value:g}" if isinstance(value, float) else str(value)
    shown = []
    for f in dataclasses.fields(value):
        own = getattr(value, f.name)
        default = f.default_factory() if callable(f.default_factory) else f.default
        if f.init and (default is dataclasses.MISSING or own != default):
            shown.append(f"{f.name}={brief(own)}")
    return type(value).__name__ + (f"({', '.join(shown)})" if shown else "")
