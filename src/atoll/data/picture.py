"""A picture of who owns what: an SVG for reports, a table for the terminal.

The SVG stands alone, needs no script, and takes text colour from where it is put (``currentColor``). A page
can set ``--atoll-accent``; without it the mark colour follows the reader's light or dark setting. One hue,
told apart by area or strength, so it reads the same for colour-blind readers and in print.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from atoll.data.dataset import Federation
from atoll.data.heterogeneity import Histogram, heterogeneity, histogram
from atoll.data.tokenizers import Tokenizer

WIDTH = 480.0
"""Of the drawing, in its own units; close to a phone's, so that text stays readable there."""
LEFT, RIGHT = 78.0, 376.0
"""Where the columns begin and end; site names to the left, sizes to the right."""
BUBBLES = 25
"""With more sites, circles give way to a strip."""
STRIP = 440.0
"""Height of a strip."""
MOST_ROWS, MOST_COLUMNS, TOKENS = 110, 120, 20
STRENGTHS = (1.0, 0.55, 0.28)
"""Of training, validation and test rows."""

STYLE = """
.atoll-partition{--a:var(--atoll-accent,#0072b2);width:100%;max-width:720px;height:auto;
font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;font-size:12px}
@media(prefers-color-scheme:dark){.atoll-partition{--a:var(--atoll-accent,#56b4e9)}}
.atoll-partition text{fill:currentColor}
.atoll-partition .t{font-size:16px;font-weight:600}
.atoll-partition .q{opacity:.72}
.atoll-partition .m{fill:var(--a)}
.atoll-partition .g{stroke:currentColor;stroke-opacity:.13}
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """What is drawn: training rows by site and column, and each site's three parts."""

    found: Histogram
    names: tuple[str, ...]
    parts: NDArray[np.int64]
    """``[S, 3]``: training, validation, test rows."""


def picture(federation: Federation) -> Picture:
    """Count what there is to draw."""
    tokenizer = cast("Tokenizer | None", federation.tokenizer)
    sites = federation.sites
    parts = np.array([[len(s.train) + len(s.unlabelled or ()), len(s.validation), len(s.test)] for s in sites])
    unknown = federation.labels.get("elsewhere") or any(s.unlabelled for s in sites)
    if unknown:  # of rows that never come here, or whose labels nobody has, only the numbers are known
        found = Histogram("rows", ("rows",), parts[:, :1], parts[:, 0])
    else:
        found = histogram([s.train for s in federation.sites], federation.info, tokenizer)
    names = cast("Sequence[str]", federation.labels.get("site_names") or ())
    return Picture(found, tuple(names) or tuple(f"site {i}" for i in range(len(parts))), parts)


def partition_svg(federation: Federation) -> str:
    """A standalone SVG of all sites: circles up to 25 sites, a strip of shades beyond.

    Circle area is the number of training rows of a class at a site (for text, a token's share of the site).
    In a strip each line is a site, or the mean of neighbours when there are very many, sorted by largest
    class; strength is the class's share of the site. Bars at the right are training, validation, test rows.
    """
    p = picture(federation)
    lines = [part for line in _headline(federation, p.found) for part in textwrap.wrap(line, 66)]
    top = 22.0 + 18 * len(lines)
    counts, columns = _fold_columns(p.found)
    centres = LEFT + (np.arange(len(columns)) + 0.5) * (RIGHT - LEFT) / len(columns)
    head, labels_height = _column_labels(columns, centres, p.found.of, top)
    start = top + labels_height
    draw = _bubbles if len(p.names) <= BUBBLES else _strip
    body, end = draw(p, counts, columns, centres, start)
    words = [_text(4, 18, lines[0], "t")]
    words += [_text(4, 20 + 18 * i, line, "q") for i, line in enumerate(lines[1:], 1)]
    legend = _legend(len(p.names) <= BUBBLES, p.found.of, end + 20)
    box = f'viewBox="0 0 {WIDTH:g} {end + 30:.0f}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" class="atoll-partition" {box} role="img">'
    about = f"<title>{escape(lines[0])}</title><desc>{escape(' '.join(lines[1:]))}</desc>"
    return "\n".join([opening, about, f"<style>{STYLE}</style>", *words, *head, *body, *legend, "</svg>\n"])


def partition_text(federation: Federation, most: int = 20) -> str:
    """The same as a plain text table of at most ``most`` sites (the rest in a last line), for a terminal.

    The last column has one character for each class, from blank (no rows) over ``.:-=+*#`` to ``@`` (all
    rows).
    """
    p = picture(federation)
    counts, columns = _fold_columns(p.found, 40)
    shown = range(len(p.names)) if len(p.names) <= most else range(most - 1)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    width = max(4, max(len(_short(p.names[i], 16)) for i in shown))
    out = [*_headline(federation, p.found), ""]
    out.append(f"{'site':<{width}}  {'train':>7} {'valid':>6} {'test':>6}  {p.found.of}{_range(columns)}")
    for i in shown:
        train, validation, test = p.parts[i]
        ramp = "".join(_shade(v) for v in share[i])
        out.append(f"{_short(p.names[i], 16):<{width}}  {train:>7,} {validation:>6,} {test:>6,}  |{ramp}|")
    left = len(p.names) - len(shown)
    if left:
        rest = p.parts[len(shown) :].sum(0)
        out.append(f"and {left:,} more sites with {rest[0]:,} training rows")
    common = f"common test rows: {len(federation.test):,}"
    public = f", public rows at the server: {len(federation.public):,}" if federation.public is not None else ""
    return "\n".join([*out, common + public])


# ------------------------------------------------------------------------------------------------- the words


def _headline(federation: Federation, found: Histogram) -> list[str]:
    h, rows, sites = heterogeneity(found), int(found.rows.sum()), len(found.rows)
    settings = cast("dict[str, object]", federation.labels.get("partition_settings") or {})
    shown = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items() if v is not None]
    how = f"{federation.labels['partition']}" if "partition" in federation.labels else "sites as given"
    held = f"{len(federation.test):,} common test rows"
    sizes = f"{h.size_min:,}" if h.size_min == h.size_max else f"{h.size_min:,} to {h.size_max:,}"
    lines = [
        f"{federation.info.name}: {rows:,} training rows at {sites:,} site{'s' * (sites > 1)}",
        how + (f" ({', '.join(shown)})" if shown else ""),
        f"{sizes} rows a site; {held}",
    ]
    if len(found.names) > 1:
        lines.append(f"Jensen-Shannon distance {h.js_distance:.2f} (0: all alike, 1: nothing shared)")
        lines.append(f"effective {_noun(found.of)} at a site: {h.effective_classes:.1f} of {len(found.names)}")
    return lines


def _noun(of: str) -> str:
    return {"target quantiles": "quantiles"}.get(of, of)


def _range(columns: Sequence[str]) -> str:
    return f": {columns[0]} .. {columns[-1]}" if len(columns) > 1 else ""


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 2] + ".."


def _shade(share: float) -> str:
    return " .:-=+*#%@"[0 if share <= 0 else min(9, 1 + int(share * 9))]


# ----------------------------------------------------------------------------------------------- the drawing


def _fold_columns(found: Histogram, most: int = MOST_COLUMNS) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The columns to show: neighbours added up when there are more than can be told apart."""
    if found.of == "tokens":  # there are hundreds: show the most frequent
        top = np.sort(np.argsort(-found.counts.sum(0), kind="stable")[:TOKENS])
        return found.counts[:, top], tuple(found.names[i] for i in top)
    step = -(-len(found.names) // most)
    if step == 1:
        return found.counts, found.names
    groups = [found.names[i : i + step] for i in range(0, len(found.names), step)]
    folded = np.add.reduceat(found.counts, np.arange(0, len(found.names), step), axis=1)
    return folded, tuple(f"{g[0]} to {g[-1]}" for g in groups)


def _text(x: float, y: float, words: str, style: str = "", anchor: str = "start", turn: float = 0) -> str:
    at = f'x="{x:.1f}" y="{y:.1f}"'
    kind = f' class="{style}"' if style else ""
    where = f' text-anchor="{anchor}"' if anchor != "start" else ""
    turned = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn else ""
    return f"<text {at}{kind}{where}{turned}>{escape(words)}</text>"


def _rect(x: float, y: float, width: float, height: float, strength: float) -> str:
    at = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    return f'<rect class="m" shape-rendering="crispEdges" {at} fill-opacity="{strength:.2f}"/>'


def _column_labels(
    columns: Sequence[str], centres: NDArray[np.float64], of: str, top: float
) -> tuple[list[str], float]:
    """Names above the columns, slanted when long, thinned out when many; and the height that they take."""
    if len(columns) == 1:
        return [], 12.0
    pitch = float(centres[1] - centres[0])
    longest = max(len(name) for name in columns)
    slanted = longest * 6.6 > pitch
    every = max(1, int(np.ceil(13 / pitch))) if slanted else 1
    height = 14 + (min(longest, 12) * 4.6 if slanted else 8)
    y = top + height - 8
    out = []
    for name, x in list(zip(columns, map(float, centres), strict=True))[::every]:
        if slanted:
            out.append(_text(x, y, _short(name, 12), turn=-45))
        else:
            out.append(_text(x, y, name, anchor="middle"))
    return [*out, _text(LEFT - 8, y, _noun(of), "q", "end")], height


def _bubbles(
    p: Picture, counts: NDArray[np.int64], columns: Sequence[str], centres: NDArray[np.float64], start: float
) -> tuple[list[str], float]:
    pitch = 30.0 if len(p.names) <= 12 else 22.0
    radius = min(pitch, (RIGHT - LEFT) / len(columns)) / 2 * 0.94
    area: NDArray[Any] = counts  # of a circle
    if p.found.of == "tokens":  # texts differ far more in length than in letters
        area = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    biggest, longest_bar = area.max() or 1, int(p.parts.sum(1).max())
    out = []
    for i, name in enumerate(p.names):
        y = start + (i + 0.5) * pitch
        out.append(f'<line class="g" x1="{LEFT:g}" x2="{RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(_text(LEFT - 8, y + 4, _short(name, 11), anchor="end"))
        for j, (x, n, column) in enumerate(zip(centres, counts[i], columns, strict=True)):
            if n:
                r = max(radius * (area[i, j] / biggest) ** 0.5, 0.7)
                tip = f"<title>{escape(name)}, {escape(column)}: {n:,}</title>"
                out.append(f'<circle class="m" cx="{x:.1f}" cy="{y:.1f}" r="{r:.2f}">{tip}</circle>')
        out += _bar(p.parts[i], longest_bar, y - pitch / 4, pitch / 2, f"{int(p.parts[i].sum()):,}")
    return out, start + len(p.names) * pitch


def _strip(
    p: Picture, counts: NDArray[np.int64], columns: Sequence[str], centres: NDArray[np.float64], start: float
) -> tuple[list[str], float]:
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    order = np.lexsort((-share.max(1), share.argmax(1)))
    per_line = -(-len(order) // MOST_ROWS)
    lines = [order[i : i + per_line] for i in range(0, len(order), per_line)]
    pitch, width = STRIP / len(lines), (RIGHT - LEFT) / len(columns)
    shares = np.array([share[line].mean(0) for line in lines])
    sizes = np.array([p.parts[line].mean(0) for line in lines])
    longest_bar = float(sizes.sum(1).max())
    out = [_rect(LEFT, start, RIGHT - LEFT, STRIP, 0.05)]
    for i, y in enumerate(start + pitch * np.arange(len(lines))):
        for x, v in zip(centres, shares[i] / shares.max(), strict=True):
            if v >= 0.01:
                out.append(_rect(x - width / 2, y, width, pitch, v))
        out += _bar(sizes[i], longest_bar, y, pitch)
    what = f"{len(order):,} sites, sorted by largest share"
    what += f"; a line is {per_line} sites" if per_line > 1 else ""
    out.append(_text(LEFT - 14, start + STRIP / 2, what, "q", "middle", -90))
    out.append(_text(WIDTH - 2, start - 6, f"up to {longest_bar:,.0f}", "q", "end"))
    return out, start + STRIP


def _bar(parts: NDArray[Any], longest: float, y: float, height: float, label: str = "") -> list[str]:
    """A site's training, validation and test rows, one after the other, at the right edge."""
    room, x, out = WIDTH - RIGHT - 12 - (48 if label else 0), RIGHT + 10, []
    for n, strength in zip(parts, STRENGTHS, strict=True):
        w = room * float(n) / longest
        if w:
            out.append(_rect(x, y, w, height, strength))
        x += w
    return [*out, _text(WIDTH - 2, y + height / 2 + 4, label, anchor="end")] if label else out


def _legend(bubbles: bool, of: str, y: float) -> list[str]:
    unit = "share of the site" if of == "tokens" else "training rows"
    out = [_text(LEFT, y, f"circle area: {unit}" if bubbles else "strength: share of the site", "q")]
    names = (("training", 266.0), ("validation", 334.0), ("test", 414.0))
    for (name, x), strength in zip(names, STRENGTHS, strict=True):
        out += [_rect(x, y - 9, 10, 10, strength), _text(x + 14, y, name, "q")]
    return out
