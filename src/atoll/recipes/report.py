"""The report of a run: one HTML file that can be mailed, printed and read on a phone.

It is made from the run directory alone, so that it can be written again at any time, and for an unfinished
run as well. The page requests nothing, and a content security policy forbids it to: styles and the one small
script are inside, and no other script can run, whatever a site calls itself. All that comes from data is
escaped.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from html import escape as e
from importlib.resources import files
from pathlib import Path
from typing import Any

from atoll.core.errors import RunError
from atoll.core.files import write_atomic
from atoll.federated.method import Method
from atoll.federated.secure.secure_sum import CARD as SECURE
from atoll.recipes import words
from atoll.recipes.charts import Format, Series, bars, line_chart, strip_plot
from atoll.recipes.record import Merge, Record, Said, Site, Spread, cards_in, natural, read_record, spread
from atoll.recipes.words import MISSING, count, duration, metric_text, number, plain, size, some

NAME = "report.html"
MOST_ROWS = 50
"""Tables of more sites than this are folded away, behind the worst ones."""
MOST_ROUNDS = 200
"""Rounds in the table behind the curves; ``events.jsonl`` has all of them."""
MOST_SAID = 12


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
    style, script = _asset("report.css"), _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    sections = [_header(r), _tiles(r), _learning(r), _across(r, partition_svg), _cost(r), _remarks(r)]
    sections += [_method(r), _use(r), _behind(r)]
    body = "\n\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{e(name)}: run report</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return files("atoll.recipes").joinpath(name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------- the outcome


def _header(r: Record) -> str:
    name = str(r.config.get("name") or r.start.get("name") or "run")
    state = '<span class="chip">finished</span>' if r.end else '<span class="chip warn">not finished</span>'
    when = [_when(r.start.get("at")), _when(r.end.get("at")) if r.end else ""]
    spans = " to ".join(w for w in when if w)
    return (
        f'<header>\n<p class="kicker">Run report</p>\n<h1>{e(name)}</h1>\n'
        f'<p class="meta">{state}{" &nbsp;" + e(spans) if spans else ""}</p>\n'
        f'<p class="verdict">{" ".join(_verdict(r))}</p>\n</header>'
    )


def _when(stamp: Any) -> str:
    """``2025-01-31T10:00:00Z`` -> ``2025-01-31 10:00 UTC``."""
    text = str(stamp or "")
    return f"{text[:10]} {text[11:16]} UTC" if len(text) == 20 and text.endswith("Z") else text


def _verdict(r: Record) -> list[str]:
    """The run in a few plain sentences (HTML), each one made from its numbers."""
    model, data, sites = (
        _part_name(r.config.get("model")),
        r.start.get("data"),
        len(r.start.get("sites") or ()),
    )
    what = f"the <b>{e(model)}</b> model" if model else "a model"
    on = f" to <b>{e(str(data))}</b>" if data else ""
    across = f" across <b>{some(sites, 'site')}</b>" if sites else ""
    verb = "adapted" if r.end else "has been adapting"
    method = str(r.start.get("method") or _part_name(r.config.get("method")) or "The run")
    said = [f"<b>{e(method)}</b> {verb} {what}{on}{across}."]
    if not r.merges:
        return [*said, "No round has been completed yet, so there is nothing to judge."]
    planned = number(r.config.get("rounds"))
    if r.end is None and math.isfinite(planned):
        said.append(f"It stands at {len(r.merges):,} of {count(planned)} rounds.")
    said += _outcome(r)
    said.append(f"<b>{size(r.total('up'))}</b> went up from the sites and <b>{size(r.total('down'))}</b> came down.")
    epsilon = _epsilon(r)
    if epsilon is not None:
        said.append(f"The privacy spent is <b>epsilon {plain(epsilon, 3)}</b>{_at_delta(r)}, per {_unit(r)}.")
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
        return [f"Its {e(_label(name))} is <b>not a finite number</b>: training has diverged."]
    text = f"After {some(seen[-1].round, 'round')} its {e(_label(name))} is <b>{metric_text(name, last)}</b>"
    if len(seen) > 1 and math.isfinite(first) and first != last:
        better = r.higher_is_better(name)
        word = "from" if better is None else ("up from" if last > first else "down from")
        text += f", {word} {metric_text(name, first)} after round {seen[0].round}"
    said = [text + f" ({_measured_on(r)})."]
    s = _headline_spread(r)
    if s is not None and math.isfinite(s.worst_tenth):
        middle, worst = metric_text(name, s.median), metric_text(name, s.worst_tenth)
        said.append(f"At the sites' own test rows the median is {middle}, and the worst tenth has {worst}.")
    return said


def _measured_on(r: Record) -> str:
    """Whose model, on which rows. Before the end only the method can tell."""
    if r.end is not None and r.end.get("personal"):
        return "personal models, each on its own site's test rows"
    if r.end is None:
        return "at the last evaluation"
    own = r.start.get("common_test_rows") == 0  # older runs do not say
    return "global model, mean over the sites' own test rows" if own else "global model, common test rows"


def _headline_spread(r: Record) -> Spread | None:
    values = _site_values(r, r.headline)
    return spread(values, r.higher_is_better(r.headline)) if values else None


def _site_values(r: Record, metric: str) -> dict[str, float]:
    return {s.name: s.metrics[metric] for s in r.sites.values() if metric in s.metrics}


def _epsilon(r: Record) -> float | None:
    found = [m.epsilon for m in r.merges if not math.isnan(m.epsilon)]
    return found[-1] if found else None


def _at_delta(r: Record) -> str:
    sources = ((r.end or {}).get("delta"), r.plan.get("delta"), r.config.get("delta"))
    delta = next((d for d in map(number, sources) if math.isfinite(d)), None)
    return f" at delta {plain(delta, 3)}" if delta is not None else ""


def _unit(r: Record) -> str:
    return str((r.end or r.plan).get("privacy_unit", "site"))


def _part_name(part: Any) -> str:
    """The name of a part in a resolved recipe, where a part is a mapping or a bare name."""
    return str(part.get("name") or "") if isinstance(part, dict) else str(part or "")


def _label(metric: str) -> str:
    return metric.replace("_", " ")


def _tiles(r: Record) -> str:
    name, seen, refused, epsilon = r.headline, r.evaluated, count(r.total("refused")), _epsilon(r)
    up, down, planned = r.total("up"), r.total("down"), number(r.config.get("rounds"))
    tiles = []
    if seen:
        good = r.higher_is_better(name)
        under = "" if good is None else "higher is better" if good else "lower is better"
        tiles.append((_label(name), metric_text(name, seen[-1].metrics[name]), under))
    s = _headline_spread(r)
    if s is not None and math.isfinite(s.worst_tenth):
        median = f"median {metric_text(name, s.median)}"
        tiles.append(("worst tenth of sites", metric_text(name, s.worst_tenth), median))
    tiles.append(("sites", count(len(r.start.get("sites") or r.sites)), f"{count(_rows(r))} training rows"))
    of = f"of {count(planned)} planned; " if r.end is None and math.isfinite(planned) else ""
    tiles.append(("rounds", count(len(r.merges)), f"{of}{some(_visits(r), 'visit')}, {refused} refused"))
    tiles.append(("bytes moved", size(up + down), f"{size(up)} up, {size(down)} down"))
    tiles.append(("work at the sites", words.flops(r.total("flops")), "in all visits"))
    if r.merges:
        here = f"virtual; {duration(_seconds(r))} on this machine"
        tiles.append(("device time", duration(r.merges[-1].time), here))
    if epsilon is not None:
        tiles.append(("privacy spent", f"epsilon {plain(epsilon, 3)}", f"{_at_delta(r).strip()}, per {_unit(r)}"))
    else:
        tiles.append(("replies refused", refused, f"of {count(_visits(r))}"))
    return '<dl class="tiles">\n' + "".join(_tile(*t) for t in tiles) + "</dl>"


def _tile(title: str, value: str, under: str) -> str:
    shown = f'<span class="value">{e(value)}</span><span class="under">{e(under)}</span>'
    return f'<div class="tile"><dt>{e(_title(title))}</dt><dd>{shown}</dd></div>\n'


def _rows(r: Record) -> float:
    return math.fsum(s.rows for s in r.sites.values() if math.isfinite(s.rows))


def _visits(r: Record) -> int:
    return sum(s.visits for s in r.sites.values())


def _seconds(r: Record) -> float:
    """Real seconds. The end event only knows its own process, so a resumed run adds up its merges."""
    return number((r.end or {}).get("seconds")) if r.end and not r.resumed else r.total("seconds")


# ------------------------------------------------------------------------------------------- curves


def _figure(caption: str, svg: str, kind: str = "chart") -> str:
    head = f'<figcaption><b>{e(caption)}</b><span class="readout"></span></figcaption>'
    return f'<figure class="{kind}">{head}\n{svg}</figure>\n'


def _charts(figures: Sequence[str]) -> str:
    return f'<div class="charts">\n{"".join(figures)}</div>' if figures else ""


Line = tuple[str, Callable[[Merge], float]]


def _curve(merges: Sequence[Merge], caption: str, lines: Sequence[Line], form: Format, zero: bool = False) -> str:
    """Lines over rounds."""
    rounds = [float(m.round) for m in merges]
    series = [Series(name, rounds, [value(m) for m in merges]) for name, value in lines]
    svg = line_chart(series, title=caption, x_label="round", x_format=count, whole_x=True, y_format=form, zero=zero)
    return _figure(caption, svg)


def _of(metric: str) -> Callable[[Merge], float]:
    return lambda m: m.metrics.get(metric, math.nan)


def _as(metric: str) -> Format:
    return partial(metric_text, metric)


def _learning(r: Record) -> str:
    if not r.merges:
        return ""
    figures, name, seen = [], r.headline, r.evaluated
    if seen:
        figures.append(_curve(seen, _title(name), [(name, _of(name))], _as(name)))
        if r.method is not None and not r.method.schedule.synchronous:
            line = Series(name, [m.time for m in seen], [m.metrics[name] for m in seen])
            caption = f"{_title(name)} over device time"
            svg = line_chart([line], title=caption, x_label="virtual seconds", y_format=_as(name))
            figures.append(_figure(caption, svg))
    others = {k for m in r.merges for k in m.metrics} - {name}
    for other in sorted(others, key=lambda k: (k != "loss", k))[:5]:
        measured = [m for m in r.merges if other in m.metrics]
        figures.append(_curve(measured, _title(other), [(other, _of(other))], _as(other)))
    for own in sorted({k for m in r.merges for k in m.reported})[:4]:
        measured = [m for m in r.merges if own in m.reported]
        caption = f"{_title(own)} during visits, mean"
        figures.append(_curve(measured, caption, [(own, lambda m, k=own: m.reported[k])], _as(own)))  # type: ignore[misc]
    lead = _trend(r) if seen else "The model has not been evaluated yet."
    return f'<h2>Learning</h2>\n<p class="lead">{e(lead)}</p>\n{_charts(figures)}'


def _title(metric: str) -> str:
    label = _label(metric)
    return label[:1].upper() + label[1:]


def _trend(r: Record) -> str:
    """When the headline metric was best."""
    name, better = r.headline, r.higher_is_better(r.headline)
    seen = [m for m in r.evaluated if math.isfinite(m.metrics[name])]
    if better is None or not seen:
        return "What was measured after each round."
    best, last = (max if better else min)(seen, key=_of(name)), seen[-1]
    text = f"The best {_label(name)} was {metric_text(name, best.metrics[name])}, after round {best.round}"
    if best.metrics[name] == last.metrics[name]:
        return f"{text}." if best is last else f"{text}, and the last is as good."
    return f"{text}; the last is {metric_text(name, last.metrics[name])}."


# ------------------------------------------------------------------------------------------- sites


def _across(r: Record, picture: str | None) -> str:
    if not r.sites:
        return ""
    sites, metrics = sorted(r.sites.values(), key=lambda s: natural(s.name)), _site_metrics(r)
    s = _headline_spread(r)
    worst = s.worst_sites if s is not None else ()
    figures = []
    if s is not None:
        caption = f"{_title(r.headline)} at each site"
        svg = strip_plot(
            [(_called(r, n), v) for n, v in _site_values(r, r.headline).items()],
            title=caption,
            x_label=_label(r.headline),
            x_format=_as(r.headline),
            marked=frozenset(_called(r, n) for n in worst),
            lines=[("median", s.median)],
        )
        figures.append(_figure(caption, svg, "strip"))
    if picture is None and any(math.isfinite(s.rows) for s in sites):
        caption, rows = "Training rows at each site", [(_called(r, s.name), s.rows) for s in sites]
        svg = bars(rows, title=caption, x_label="sites in order", y_format=count)
        figures.append(_figure(caption, svg, "bars"))
    out = [
        "<h2>Across sites</h2>",
        f'<p class="lead">{e(_sites_lead(r, metrics, picture is None))}</p>',
        _spread_table(r, metrics),
        _charts(figures),
    ]
    if picture is not None:
        out.append(_figure("Who has which rows", picture, "picture"))
    if len(sites) <= MOST_ROWS:
        caption = "Every site; the worst tenth is tinted." if worst else "Every site."
        out.append(_site_table(r, sites, metrics, caption, worst))
    else:
        if worst:
            first = [r.sites[n] for n in worst[:10]]
            caption = f"The {len(first)} sites with the worst {_label(r.headline)}, worst first."
            out.append(_site_table(r, first, metrics, caption))
        table = _site_table(r, sites, metrics, "", worst)
        out.append(f"<details><summary>All {len(sites):,} sites</summary>\n{table}</details>")
    return "\n".join(out)


def _called(r: Record, number_: str) -> str:
    """A site's own name where the data has one, else ``site 3``."""
    names = r.start.get("site_names")
    if isinstance(names, list) and number_.isdigit() and int(number_) < len(names):
        return str(names[int(number_)])
    return f"site {number_}"


def _site_metrics(r: Record) -> list[str]:
    found = {k for s in r.sites.values() for k in s.metrics}
    return sorted(found, key=lambda k: (k != r.headline, k))[:6]


def _sites_lead(r: Record, metrics: Sequence[str], labelled: bool) -> str:
    labels, facts = r.start.get("partition") if labelled else None, []
    for name, value in labels.items() if isinstance(labels, dict) else ():
        facts.append(f"{_label(str(name))} {value if isinstance(value, str) else plain(number(value))}")
    split = f"How rows were split over sites: {', '.join(facts)}. " if facts else ""
    if not metrics:
        return split + "Sites are evaluated once the run has ended."
    return split + "Metrics are of each site's final model, on the test rows that it kept for itself."


def _spread_table(r: Record, metrics: Sequence[str]) -> str:
    if not metrics:
        return ""
    head = ["metric", "mean", "median", "worst tenth", "worst site", "which"]
    spreads = {m: spread(_site_values(r, m), r.higher_is_better(m)) for m in metrics}
    incomplete = any(s.missing for s in spreads.values())
    rows = []
    for m, s in spreads.items():
        numbers = [metric_text(m, v) for v in (s.mean, s.median, s.worst_tenth, s.worst)]
        where = _called(r, s.worst_sites[0]) if s.worst_sites else MISSING
        rows.append([_label(m), *numbers, where, *([count(s.missing)] if incomplete else [])])
    head += ["without a number"] if incomplete else []
    return _table(head, rows, "Every site counts the same. Worst tenth: the mean of the worst 10 % of sites.")


def _site_table(
    r: Record, sites: Sequence[Site], metrics: Sequence[str], caption: str, marked: Sequence[str] = ()
) -> str:
    timed = any(math.isfinite(s.seconds) for s in sites)
    head = ["site", "rows", *(_label(m) for m in metrics), "visits", "up", "down", "work"]
    head += ["device time", "refused"] if timed else ["refused"]
    rows = []
    for s in sites:
        row = [
            _called(r, s.name).removeprefix("site "),
            count(s.rows),
            *(metric_text(m, s.metrics.get(m, math.nan)) for m in metrics),
        ]
        row += [count(s.visits), size(s.up), size(s.down), words.flops(s.flops)]
        row += [duration(s.seconds), count(s.refused)] if timed else [count(s.refused)]
        rows.append(row)
    tinted = set(marked)
    return _table(head, rows, caption, [s.name in tinted for s in sites])


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str,
    tinted: Sequence[bool] = (),
    kind: str = "numbers",
) -> str:
    """Cells are text and are escaped. The box scrolls by itself, so that the page never does."""
    top = "".join(f'<th scope="col">{e(h)}</th>' for h in head)
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td>{e(c)}</td>" for c in row[1:])
        tint = ' class="tint"' if tinted and tinted[i] else ""
        lines.append(f'<tr{tint}><th scope="row">{e(row[0])}</th>{cells}</tr>\n')
    title = f'<p class="caption">{e(caption)}</p>' if caption else ""  # a <caption> would scroll out of sight
    return (
        f'<div class="tabled card">{title}<div class="scroll" role="region" tabindex="0" '
        f'aria-label="{e(caption or head[0])}"><table class="{kind}"><thead><tr>{top}</tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody></table></div></div>"
    )


# ------------------------------------------------------------------------------------------- cost


def _cost(r: Record) -> str:
    out = ["<h2>Cost</h2>"]
    if r.merges:
        out.append('<p class="lead">Bytes are those of the encoded messages, as a network would carry them.</p>')
        up, down, work = (_running(r.merges, name) for name in ("up", "down", "flops"))
        moved: list[Line] = [("down", lambda m: down[m.round - 1]), ("up", lambda m: up[m.round - 1])]
        done: list[Line] = [("work", lambda m: work[m.round - 1])]
        figures = [
            _curve(r.merges, "Bytes moved, running total", moved, size, zero=True),
            _curve(r.merges, "Work at the sites, running total", done, words.flops, zero=True),
        ]
        private = [m for m in r.merges if not math.isnan(m.epsilon)]
        if private:
            caption = f"Privacy spent: epsilon{_at_delta(r)}"
            figures.append(_curve(private, caption, [("epsilon", lambda m: m.epsilon)], plain, zero=True))
        out.append(_charts(figures))
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
    epsilon = _epsilon(r)
    measured: list[tuple[str, str, float, Format]] = [
        ("bytes up", "up_bytes", r.total("up"), size),
        ("bytes down", "down_bytes", r.total("down"), size),
        ("bytes between aggregators", "relayed_bytes", r.total("relayed"), size),
        ("work at the sites", "flops", r.total("flops"), words.flops),
        ("device time", "virtual_seconds", r.merges[-1].time if r.merges else math.nan, duration),
        ("time on this machine", "seconds", _seconds(r) if r.merges else math.nan, duration),
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
    return _table(["", "foreseen", "measured", "ratio"], rows, caption)


# ------------------------------------------------------------------------------------------- remarks


def _remarks(r: Record) -> str:
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
        out.append(_table(["reason", "replies", "sites"], rows, caption, kind="words"))
    if len(out) == 1:
        out.append('<p class="lead">No warnings, and no reply was refused.</p>')
    return "\n".join(out)


def _observations(r: Record) -> Iterator[str]:
    """What the numbers themselves warn of."""
    skipped, name = r.start.get("skipped"), _label(r.headline)
    for reason, rows in skipped.items() if isinstance(skipped, dict) else ():
        yield f"{count(number(rows))} rows were skipped when the data was read: {reason}"
    if r.resumed:
        yield f"The run was stopped and resumed {'once' if r.resumed == 1 else f'{r.resumed} times'}."
    odd = [m.round for m in r.evaluated if not math.isfinite(m.metrics[r.headline])]
    if odd:
        yield f"The {name} was not a finite number after {some(len(odd), 'round')}, first after {odd[0]}."
    s = _headline_spread(r)
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


# ------------------------------------------------------------------------------------------- method


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


def _method(r: Record) -> str:
    name = str(r.start.get("method") or _part_name(r.config.get("method")))
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
    epsilon = _epsilon(r)
    if epsilon is not None:
        whose = "for all rows of a site together" if _unit(r) == "site" else f"for each {_unit(r)}"
        return f"epsilon {plain(epsilon, 3)}{_at_delta(r)}, {whose}"
    return "no noise was added, so there is no formal guarantee"


def _composition(method: Method) -> str:
    """A method is FedAvg with named differences: the table says which."""
    usual, rows = Method(), []
    for field, label in PARTS.items():
        own = getattr(method, field)
        rows.append([label, brief(own), "the same" if own == getattr(usual, field) else "differs"])
    caption = "Its parts. Settings that are not shown have their default."
    tinted = [row[2] == "differs" for row in rows]
    return _table(["part", "in this run", "FedAvg's is"], rows, caption, tinted, kind="words")


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


# ------------------------------------------------------------------------------------------- use and repeat


def _use(r: Record) -> str:
    out = []
    if (r.folder / "model").is_dir():
        out.append(f"<h2>Load the model</h2>\n<pre><code>{e(_loading(r.folder / 'model'))}</code></pre>")
    same = "From the run directory. The same seed, versions and machine give the same result."
    out.append(f"<h2>Repeat the run</h2>\n<p>{same}</p>")
    out.append("<pre><code>atoll run recipe.yaml --out repeated</code></pre>")
    versions = r.start.get("versions")
    made = ", ".join(f"{k} {v}" for k, v in versions.items()) + ", " if isinstance(versions, dict) else ""
    out.append(f'<p class="note">{e(made)}seed {e(str(r.config.get("seed", MISSING)))}</p>')
    return "\n".join(out)


def _loading(model: Path) -> str:
    """Three lines of Python, by the files that are there (``atoll.models.export`` wrote them)."""
    try:
        about = json.loads((model / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = {}
    about = about if isinstance(about, dict) else {}
    if (model / "adapter_config.json").exists():
        lines = ["from peft import PeftModel", "base = ...  # the model that was adapted"]
        return "\n".join([*lines, 'model = PeftModel.from_pretrained(base, "model")'])
    if (model / "config.json").exists():
        kind = str(about.get("class", "")).rpartition(".")[2] or "AutoModel"
        load = f'model = transformers.{kind}.from_pretrained("model")'
        lines = ["import transformers", load, "model.eval()"]
    elif "builder" in about:
        lines = ["from atoll.models.export import load_model", 'model = load_model("model")']
        lines.append('# or, without Atoll: safetensors.torch.load_file("model/model.safetensors")')
        lines.append("# inputs: (raw * unit - mean) / scale, with the numbers under `data` in model/model.json")
    else:
        lines = ["from safetensors.torch import load_file", 'weights = load_file("model/model.safetensors")']
        lines.append("network.load_state_dict(weights)  # network: the one that the recipe names")
    return "\n".join(lines)


def _behind(r: Record) -> str:
    out = ["<h2>Details</h2>"]
    if r.merges:
        out.append(f"<details><summary>Numbers behind the curves</summary>\n{_rounds_table(r)}</details>")
    recipe = f"<pre><code>{e(r.recipe_text)}</code></pre>"
    out.append(f"<details><summary>Resolved recipe</summary>\n{recipe}</details>")
    out.append("<footer>Made by Atoll from the run's own record.</footer>")
    return "\n".join(out)


def _rounds_table(r: Record) -> str:
    metrics = sorted({k for m in r.merges for k in m.metrics}, key=lambda k: (k != r.headline, k))[:6]
    private = _epsilon(r) is not None
    every = -(-len(r.merges) // MOST_ROUNDS)
    head = ["round", *(_label(m) for m in metrics), "replies", "refused", "up", "down", "work"]
    head += ["device time", "time here", *(["epsilon"] if private else [])]
    rows = []
    for m in r.merges:
        if m.round % every and m.round not in (1, len(r.merges)):
            continue
        row = [count(m.round), *(metric_text(k, m.metrics.get(k, math.nan)) for k in metrics)]
        row += [count(m.replies), count(m.refused), size(m.up), size(m.down), words.flops(m.flops)]
        row += [duration(m.time), duration(m.seconds), *([plain(m.epsilon, 3)] if private else [])]
        rows.append(row)
    caption = "" if every == 1 else f"Every {every} rounds; events.jsonl has all of them."
    return _table(head, rows, caption)
