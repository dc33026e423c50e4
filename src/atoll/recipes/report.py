"""The report of a run: one HTML file that can be mailed, printed and read on a phone.

It is made from the run directory alone, so that it can be written again at any time, and for an unfinished run as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape as e
from pathlib import Path
from typing import Any

from atoll.core.errors import RunError
from atoll.core.files import write_atomic
from atoll.recipes import words
from atoll.recipes.page import label, tile, whole_page
from atoll.recipes.pictures import gallery, sample_figures
from atoll.recipes.readings import (
    at_delta,
    epsilon_of,
    headline_spread,
    measured_on,
    part_name,
    privacy_unit,
    rows_of,
    seconds_of,
    visits_of,
)
from atoll.recipes.record import Record, read_record
from atoll.recipes.sections.cost import cost
from atoll.recipes.sections.learning import learning
from atoll.recipes.sections.method import method
from atoll.recipes.sections.remarks import remarks
from atoll.recipes.sections.sites import across
from atoll.recipes.sections.use import behind, use
from atoll.recipes.words import count, duration, metric_text, number, plain, size, some

NAME = "report.html"


def write_report(folder: Path, partition_svg: str | None = None) -> Path:
    """Write ``report.html`` into a run directory, atomically.

    Args:
        folder: the run directory; the run may be unfinished.
        partition_svg: a picture of who has which rows, as trusted markup (``atoll.data.picture``).

    Returns:
        The page's path.

    Raises:
        RunError: when the folder holds no run, or cannot be written.
    """
    folder = Path(folder)
    page = report_html(read_record(folder), partition_svg)
    try:
        write_atomic(folder / NAME, page.encode(errors="replace"), durable=False)
    except OSError as error:
        raise RunError(f"The report cannot be written to {folder} ({error.strerror}).") from error
    return folder / NAME


def report_html(r: Record, partition_svg: str | None = None) -> str:
    """The whole page."""
    name = str(r.config.get("name") or r.start.get("name") or "run")
    sections = [_header(r), tiles(r), samples(r), learning(r), across(r, partition_svg), cost(r), remarks(r)]
    sections += [method(r), use(r), behind(r)]
    body = "\n\n".join(section for section in sections if section)
    return whole_page(f"{name}: run report", body)


def samples(r: Record) -> str:
    """What a model that generates draws, before and after."""
    lead = "Two samples of each class, from the same noise; nothing was picked."
    return gallery(sample_figures(r.folder), lead)


def _header(r: Record) -> str:
    name = str(r.config.get("name") or r.start.get("name") or "run")
    state = '<span class="chip">finished</span>' if r.end else '<span class="chip warn">not finished</span>'
    when = [_when(r.start.get("at")), _when(r.end.get("at")) if r.end else ""]
    spans = " to ".join(w for w in when if w)
    return (
        f'<header>\n<p class="kicker">Run report</p>\n<h1>{e(name)}</h1>\n'
        f'<p class="meta">{state}{" &nbsp;" + e(spans) if spans else ""}</p>\n'
        f'<p class="verdict">{" ".join(verdict(r))}</p>\n</header>'
    )


def _when(stamp: Any) -> str:
    """``2025-01-31T10:00:00Z`` -> ``2025-01-31 10:00 UTC``."""
    text = str(stamp or "")
    return f"{text[:10]} {text[11:16]} UTC" if len(text) == 20 and text.endswith("Z") else text


def verdict(r: Record) -> list[str]:
    """The run in a few plain sentences (HTML), each one made from its numbers."""
    model, data, sites = (
        part_name(r.config.get("model")),
        r.start.get("data"),
        len(r.start.get("sites") or ()),
    )
    what = f"the <b>{e(model)}</b> model" if model else "a model"
    on = f" to <b>{e(str(data))}</b>" if data else ""
    across = f" across <b>{some(sites, 'site')}</b>" if sites else ""
    verb = "adapted" if r.end else "has been adapting"
    task = r.config.get("task")
    if isinstance(task, Mapping) and task.get("name") == "distilling":
        verb, on = "made" if r.end else "has been making", on.replace(" to ", " for ", 1)
        what = f"a fast generator by <b>{e(str(part_name(task.get('method'))))}</b>"
    method = str(r.start.get("method") or part_name(r.config.get("method")) or "The run")
    said = [f"<b>{e(method)}</b> {verb} {what}{on}{across}."]
    if not r.merges:
        return [*said, "No round has been completed yet, so there is nothing to judge."]
    planned = number(r.config.get("rounds"))
    if r.end is None and math.isfinite(planned):
        said.append(f"It stands at {len(r.merges):,} of {count(planned)} rounds.")
    said += _outcome(r)
    said.append(f"<b>{size(r.total('up'))}</b> went up from the sites and <b>{size(r.total('down'))}</b> came down.")
    epsilon = epsilon_of(r)
    if epsilon is not None:
        said.append(f"The privacy spent is <b>epsilon {plain(epsilon, 3)}</b>{at_delta(r)}, per {privacy_unit(r)}.")
    refused = int(r.total("refused"))
    were = "was" if refused == 1 else "were"
    said.append(f"<b>{some(refused, 'reply')}</b> {were} refused." if refused else "No reply was refused.")
    return said


def _outcome(r: Record) -> list[str]:
    name, seen = r.headline, r.evaluated
    if not seen:
        return ["The model has not been evaluated."]
    last, first = seen[-1].metrics[name], seen[0].metrics[name]
    if not math.isfinite(last):
        return [f"Its {e(label(name))} is <b>not a finite number</b>: training has diverged."]
    text = f"After {some(seen[-1].round, 'round')} its {e(label(name))} is <b>{metric_text(name, last)}</b>"
    if len(seen) > 1 and math.isfinite(first) and first != last:
        better = r.higher_is_better(name)
        word = "from" if better is None else ("up from" if last > first else "down from")
        text += f", {word} {metric_text(name, first)} after round {seen[0].round}"
    said = [text + f" ({measured_on(r)})."]
    s = headline_spread(r)
    if s is not None and math.isfinite(s.worst_tenth):
        middle, worst = metric_text(name, s.median), metric_text(name, s.worst_tenth)
        said.append(f"At the sites' own test rows the median is {middle}, and the worst tenth has {worst}.")
    return said


def tiles(r: Record) -> str:
    name, seen, refused, epsilon = r.headline, r.evaluated, count(r.total("refused")), epsilon_of(r)
    up, down, planned = r.total("up"), r.total("down"), number(r.config.get("rounds"))
    shown = []
    if seen:
        good = r.higher_is_better(name)
        under = "" if good is None else "higher is better" if good else "lower is better"
        shown.append((label(name), metric_text(name, seen[-1].metrics[name]), under))
    s = headline_spread(r)
    if s is not None and math.isfinite(s.worst_tenth):
        median = f"median {metric_text(name, s.median)}"
        shown.append(("worst tenth of sites", metric_text(name, s.worst_tenth), median))
    shown.append(("sites", count(len(r.start.get("sites") or r.sites)), f"{count(rows_of(r))} training rows"))
    of = f"of {count(planned)} planned; " if r.end is None and math.isfinite(planned) else ""
    shown.append(("rounds", count(len(r.merges)), f"{of}{some(visits_of(r), 'visit')}, {refused} refused"))
    shown.append(("bytes moved", size(up + down), f"{size(up)} up, {size(down)} down"))
    shown.append(("work at the sites", words.flops(r.total("flops")), "in all visits"))
    if r.merges:
        here = f"virtual; {duration(seconds_of(r))} on this machine"
        shown.append(("device time", duration(r.merges[-1].time), here))
    if epsilon is not None:
        shown.append(("privacy spent", f"epsilon {plain(epsilon, 3)}", f"{at_delta(r).strip()}, per {privacy_unit(r)}"))
    else:
        shown.append(("replies refused", refused, f"of {count(visits_of(r))}"))
    return '<dl class="tiles">\n' + "".join(tile(*t) for t in shown) + "</dl>"
