"""What a record says, in the few numbers that several parts of a report need."""

from __future__ import annotations

import math
from typing import Any

from atoll.recipes.record import Record, Spread, spread
from atoll.recipes.words import number, plain


def headline_spread(r: Record) -> Spread | None:
    values = site_values(r, r.headline)
    return spread(values, r.higher_is_better(r.headline)) if values else None


def site_values(r: Record, metric: str) -> dict[str, float]:
    return {s.name: s.metrics[metric] for s in r.sites.values() if metric in s.metrics}


def epsilon_of(r: Record) -> float | None:
    found = [m.epsilon for m in r.merges if not math.isnan(m.epsilon)]
    return found[-1] if found else None


def at_delta(r: Record) -> str:
    sources = ((r.end or {}).get("delta"), r.plan.get("delta"), r.config.get("delta"))
    delta = next((d for d in map(number, sources) if math.isfinite(d)), None)
    return f" at delta {plain(delta, 3)}" if delta is not None else ""


def privacy_unit(r: Record) -> str:
    return str((r.end or r.plan).get("privacy_unit", "site"))


def part_name(part: Any) -> str:
    """The name of a part in a resolved recipe, where a part is a mapping or a bare name."""
    return str(part.get("name") or "") if isinstance(part, dict) else str(part or "")


def rows_of(r: Record) -> float:
    return math.fsum(s.rows for s in r.sites.values() if math.isfinite(s.rows))


def visits_of(r: Record) -> int:
    return sum(s.visits for s in r.sites.values())


def seconds_of(r: Record) -> float:
    """Real seconds. The end event only knows its own process, so a resumed run adds up its merges."""
    return number((r.end or {}).get("seconds")) if r.end and not r.resumed else r.total("seconds")


def called(r: Record, number_: str) -> str:
    """A site's own name where the data has one, else ``site 3``."""
    names = r.start.get("site_names")
    if isinstance(names, list) and number_.isdigit() and int(number_) < len(names):
        return str(names[int(number_)])
    return f"site {number_}"


def measured_on(r: Record) -> str:
    """Whose model, on which rows. Before the end only the method can tell."""
    if r.end is not None and r.end.get("personal"):
        return "personal models, each on its own site's test rows"
    if r.end is None:
        return "at the last evaluation"
    own = r.start.get("common_test_rows") == 0  # older runs do not say
    return "global model, mean over the sites' own test rows" if own else "global model, common test rows"
