"""What a reader should know: warnings, and replies that were refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape as e

from atoll.recipes.page import label, table
from atoll.recipes.readings import headline_spread
from atoll.recipes.record import Record, Said, natural
from atoll.recipes.words import count, number, some

MOST_SAID = 12


def remarks(r: Record) -> str:
    items = list(_observations(r))
    for said in sorted(r.notes.values(), key=lambda s: -s.times)[:MOST_SAID]:
        items.append(_cut(said.text) + (f" ({said.times:,} times)" if said.times > 1 else ""))
    if len(r.notes) > MOST_SAID:
        items.append(f"and {len(r.notes) - MOST_SAID:,} other warnings, in events.jsonl")
    out = ["<h2>Remarks</h2>"]
    if items:
        out.append(f"<ul>{''.join(f'<li>{e(i)}</li>' for i in items)}</ul>")
    if r.refusals:
        ranked = sorted(r.refusals.values(), key=lambda s: -s.times)
        rows = [[_cut(s.text), count(s.times), _who(s)] for s in ranked[:MOST_SAID]]
        if rest := ranked[MOST_SAID:]:
            rows.append([some(len(rest), "other reason"), count(sum(s.times for s in rest)), ""])
        caption = "Replies that were refused, and so not merged."
        out.append(table(["reason", "replies", "sites"], rows, caption, kind="words"))
    if len(out) == 1:
        out.append('<p class="lead">No warnings, and no reply was refused.</p>')
    return "\n".join(out)


def _observations(r: Record) -> Iterator[str]:
    """What the numbers themselves warn of."""
    skipped, name = r.start.get("skipped"), label(r.headline)
    for reason, rows in skipped.items() if isinstance(skipped, dict) else ():
        yield f"{count(number(rows))} rows were skipped when the data was read: {reason}"
    if r.resumed:
        yield f"The run was stopped and resumed {'once' if r.resumed == 1 else f'{r.resumed} times'}."
    odd = [m.round for m in r.evaluated if not math.isfinite(m.metrics[r.headline])]
    if odd:
        yield f"The {name} was not a finite number after {some(len(odd), 'round')}, first after {odd[0]}."
    s = headline_spread(r)
    if s is not None and s.missing:
        yield f"{some(s.missing, 'site')} without a finite {name}: left out of means and ranks."
    unseen = sum(not s.visits for s in r.sites.values())
    if r.merges and unseen:
        yield f"{some(unseen, 'site')} of {len(r.sites):,} never took part."


def _cut(text: str, most: int = 300) -> str:
    return text if len(text) <= most else text[:most] + " ..."


def _who(said: Said) -> str:
    names = sorted(said.sites, key=natural)
    return ", ".join(names[:8]) + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")
