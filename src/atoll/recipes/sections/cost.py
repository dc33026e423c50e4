"""Bytes, work and privacy, foreseen and measured."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

from atoll.recipes import words
from atoll.recipes.charts import Format
from atoll.recipes.page import charts, table
from atoll.recipes.readings import at_delta, epsilon_of, seconds_of
from atoll.recipes.record import Merge, Record
from atoll.recipes.sections.learning import Line, curve
from atoll.recipes.words import MISSING, count, duration, number, plain, size


def cost(r: Record) -> str:
    out = ["<h2>Cost</h2>"]
    if r.merges:
        out.append('<p class="lead">Bytes are those of the encoded messages, as a network would carry them.</p>')
        up, down, work = (_running(r.merges, name) for name in ("up", "down", "flops"))
        moved: list[Line] = [("down", lambda m: down[m.round - 1]), ("up", lambda m: up[m.round - 1])]
        done: list[Line] = [("work", lambda m: work[m.round - 1])]
        figures = [
            curve(r.merges, "Bytes moved, running total", moved, size, zero=True),
            curve(r.merges, "Work at the sites, running total", done, words.flops, zero=True),
        ]
        private = [m for m in r.merges if not math.isnan(m.epsilon)]
        if private:
            caption = f"Privacy spent: epsilon{at_delta(r)}"
            figures.append(curve(private, caption, [("epsilon", lambda m: m.epsilon)], plain, zero=True))
        out.append(charts(figures))
    if r.plan:
        out.append(f"<h3>Plan and truth</h3>\n{_plan_table(r)}")
    return "\n".join(out) if len(out) > 1 else ""


def _running(merges: Iterable[Merge], name: str) -> list[float]:
    total, out = 0.0, []
    for m in merges:
        total += getattr(m, name)
        out.append(total)
    return out


def _plan_table(r: Record) -> str:
    """What was foreseen against what was measured."""
    epsilon = epsilon_of(r)
    measured: list[tuple[str, str, float, Format]] = [
        ("bytes up", "up_bytes", r.total("up"), size),
        ("bytes down", "down_bytes", r.total("down"), size),
        ("bytes between aggregators", "relayed_bytes", r.total("relayed"), size),
        ("work at the sites", "flops", r.total("flops"), words.flops),
        ("device time", "virtual_seconds", r.merges[-1].time if r.merges else math.nan, duration),
        ("time on this machine", "seconds", seconds_of(r) if r.merges else math.nan, duration),
        ("peak memory", "memory_bytes", number((r.end or {}).get("memory_bytes")), size),
        ("epsilon", "epsilon", math.nan if epsilon is None else epsilon, partial(plain, digits=3)),
    ]
    rows = []
    for label, key, true, form in measured:
        foreseen = number(r.plan.get(key))
        absent = math.isnan(foreseen) and math.isnan(true) if key == "epsilon" else key == "relayed_bytes" and not true
        if absent:
            continue
        ratio = true / foreseen if foreseen else (1.0 if true == foreseen else math.nan)
        rows.append([label, form(foreseen), form(true), f"{ratio:.2f}" if math.isfinite(ratio) else MISSING])
    first = count(number(r.plan.get("foreseen")))
    caption = "Every merge was foreseen." if r.plan.get("exact") else f"Foreseen from the first {first} merges."
    if r.plan.get("at_most"):
        caption += " Replies depend on what was learned: foreseen bytes, work and device time are upper bounds."
    if r.end is None:
        caption += " Measured so far: the run is not finished."
    return table(["", "foreseen", "measured", "ratio"], rows, caption)
