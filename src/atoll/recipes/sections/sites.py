"""What each site has, does and gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape as e

from atoll.recipes import words
from atoll.recipes.charts import bars, strip_plot
from atoll.recipes.page import capital, charts, figure, label, table
from atoll.recipes.readings import called, headline_spread, site_values
from atoll.recipes.record import Record, Site, natural, spread
from atoll.recipes.sections.learning import in_words
from atoll.recipes.words import MISSING, count, duration, metric_text, number, plain, size

MOST_ROWS = 50
"""Tables of more sites than this are folded away, behind the worst ones."""


def across(r: Record, picture: str | None) -> str:
    if not r.sites:
        return ""
    sites, metrics = sorted(r.sites.values(), key=lambda s: natural(s.name)), _site_metrics(r)
    s = headline_spread(r)
    worst = s.worst_sites if s is not None else ()
    figures = []
    if s is not None:
        caption = f"{capital(r.headline)} at each site"
        svg = strip_plot(
            [(called(r, n), v) for n, v in site_values(r, r.headline).items()],
            title=caption,
            x_label=label(r.headline),
            x_format=in_words(r.headline),
            marked=frozenset(called(r, n) for n in worst),
            lines=[("median", s.median)],
        )
        figures.append(figure(caption, svg, "strip"))
    if picture is None and any(math.isfinite(s.rows) for s in sites):
        caption, rows = "Training rows at each site", [(called(r, s.name), s.rows) for s in sites]
        svg = bars(rows, title=caption, x_label="sites in order", y_format=count)
        figures.append(figure(caption, svg, "bars"))
    out = [
        "<h2>Across sites</h2>",
        f'<p class="lead">{e(_sites_lead(r, metrics, picture is None))}</p>',
        _spread_table(r, metrics),
        charts(figures),
    ]
    if picture is not None:
        out.append(figure("Who has which rows", picture, "picture"))
    if len(sites) <= MOST_ROWS:
        caption = "Every site; the worst tenth is tinted." if worst else "Every site."
        out.append(_site_table(r, sites, metrics, caption, worst))
    else:
        if worst:
            first = [r.sites[n] for n in worst[:10]]
            caption = f"The {len(first)} sites with the worst {label(r.headline)}, worst first."
            out.append(_site_table(r, first, metrics, caption))
        table = _site_table(r, sites, metrics, "", worst)
        out.append(f"<details><summary>All {len(sites):,} sites</summary>\n{table}</details>")
    return "\n".join(out)


def _site_metrics(r: Record) -> list[str]:
    found = {k for s in r.sites.values() for k in s.metrics}
    return sorted(found, key=lambda k: (k != r.headline, k))[:6]


def _sites_lead(r: Record, metrics: Sequence[str], labelled: bool) -> str:
    labels, facts = r.start.get("partition") if labelled else None, []
    for name, value in labels.items() if isinstance(labels, dict) else ():
        facts.append(f"{label(str(name))} {value if isinstance(value, str) else plain(number(value))}")
    split = f"How rows were split over sites: {', '.join(facts)}. " if facts else ""
    if not metrics:
        return split + "Sites are evaluated once the run has ended."
    return split + "Metrics are of each site's final model, on the test rows that it kept for itself."


def _spread_table(r: Record, metrics: Sequence[str]) -> str:
    if not metrics:
        return ""
    head = ["metric", "mean", "median", "worst tenth", "worst site", "which"]
    spreads = {m: spread(site_values(r, m), r.higher_is_better(m)) for m in metrics}
    incomplete = any(s.missing for s in spreads.values())
    rows = []
    for m, s in spreads.items():
        numbers = [metric_text(m, v) for v in (s.mean, s.median, s.worst_tenth, s.worst)]
        where = called(r, s.worst_sites[0]) if s.worst_sites else MISSING
        rows.append([label(m), *numbers, where, *([count(s.missing)] if incomplete else [])])
    head += ["without a number"] if incomplete else []
    return table(head, rows, "Every site counts the same. Worst tenth: the mean of the worst 10 % of sites.")


def _site_table(
    r: Record, sites: Sequence[Site], metrics: Sequence[str], caption: str, marked: Sequence[str] = ()
) -> str:
    timed = any(math.isfinite(s.seconds) for s in sites)
    head = ["site", "rows", *(label(m) for m in metrics), "visits", "up", "down", "work"]
    head += ["device time", "refused"] if timed else ["refused"]
    rows = []
    for s in sites:
        row = [
            called(r, s.name).removeprefix("site "),
            count(s.rows),
            *(metric_text(m, s.metrics.get(m, math.nan)) for m in metrics),
        ]
        row += [count(s.visits), size(s.up), size(s.down), words.flops(s.flops)]
        row += [duration(s.seconds), count(s.refused)] if timed else [count(s.refused)]
        rows.append(row)
    tinted = set(marked)
    return table(head, rows, caption, [s.name in tinted for s in sites])
