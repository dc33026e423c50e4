"""Charts as SVG: small pure functions from numbers to a string.

Colours come from the page's style sheet (``report.css``), so that one picture serves light, dark and print.
Series differ in dash as well as in colour. A chart is 440 units wide and is scaled by the page. Every text is
escaped here; numbers that are not finite leave a gap.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

from atoll.recipes.words import plain

WIDTH, HEIGHT = 440, 250
RIGHT, TOP, BOTTOM = 14, 14, 40
MOST_POINTS = 400
"""A line with more points than this is thinned; peaks and dips stay."""

Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """One line: points in the order of ``x``."""

    name: str
    x: Sequence[float]
    y: Sequence[float]

    def points(self) -> list[tuple[float, float]]:
        """Points whose x is finite; y may be NaN, which is a gap."""
        return [
            (x, y if math.isfinite(y) else math.nan) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(x)
        ]


@dataclass(frozen=True, slots=True)
class Axis:
    """From values to positions: ``low`` is at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        part = (value - self.low) / (self.high - self.low)
        return self.start + min(max(part, 0.0), 1.0) * (self.end - self.start)


def nice_ticks(low: float, high: float, most: int = 6, whole: bool = False) -> tuple[float, ...]:
    """Round numbers inside ``[low, high]``, 1, 2 or 5 times a power of ten apart; at most ``most + 1``."""
    span = high - low
    if not (math.isfinite(span) and span / most > 0):
        return (low,)
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(m for m in (1, 2, 5, 10, 20) if span / (step * m) <= most)
    step = max(1.0, step) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(i * step for i in range(first, last + 1)) or (low,)


def axis(values: Sequence[float], start: float, end: float, *, zero: bool = False, pad: float = 0.0) -> Axis:
    """An axis that holds all values (absurd ones at its ends); equal ones get room on both sides."""
    finite = [v for v in values if abs(v) < 1e300] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    low = min(low, 0.0) if zero else low
    if high <= low:
        room = abs(low) * 0.1 or 0.5
        low, high = (low, low + room) if zero and low >= 0 else (low - room, low + room)
    room = (high - low) * pad
    low, high = (low if zero and low >= 0 else low - room), high + room
    return Axis(low, high, start, end, nice_ticks(low, high))


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_format: Format = plain,
    x_format: Format = plain,
    whole_x: bool = False,
    zero: bool = False,
) -> str:
    """Up to three lines over a common x. Each point can be read off by the page's script (``data-readout``).

    Args:
        title: what a screen reader says first.
        whole_x: ticks on whole numbers (rounds).
        zero: the y axis starts at 0.
    """
    lines = [s.points() for s in series]
    xs = [x for line in lines for x, _ in line]
    ys = [y for line in lines for _, y in line]
    top = TOP + (18 if len(series) > 1 else 0)
    up = axis(ys, HEIGHT - BOTTOM, top + 4, zero=zero, pad=0.06)
    left = _margin(up, y_format)
    across = axis(xs, left, WIDTH - RIGHT - 8)
    if len(set(xs)) <= 1:
        across = replace(across, ticks=tuple(set(xs)))
    elif whole_x:
        across = replace(across, ticks=nice_ticks(across.low, across.high, whole=True))
    floor = HEIGHT - BOTTOM
    out = [_y_axis(up, y_format, left), _x_axis(across, x_format, x_label, HEIGHT), _base(left, floor)]
    for i, (s, line) in enumerate(zip(series, lines, strict=True)):
        thin = _thin(line)
        out.append(f'<path class="line s{i % 3}" d="{_path(thin, across, up)}"/>')
        drawn = [(x, y) for x, y in thin if math.isfinite(y)]
        for x, y in drawn if len(drawn) <= 12 else drawn[-1:]:
            out.append(f'<circle class="dot s{i % 3}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>')
        if len(series) > 1:
            at = left + i * (WIDTH - left) // len(series)
            out.append(f'<path class="line s{i % 3}" d="M{at} 11h22"/>')
            out.append(f'<text x="{at + 28}" y="15">{escape(s.name)}</text>')
    out.append(f'<line class="guide" x1="0" x2="0" y1="{top}" y2="{floor}"/>')
    last = [f"{s.name}: {y_format(_last(line))}" for s, line in zip(series, lines, strict=True)]
    readout = {
        "at": [round(across(x), 1) for x, _ in _thin(lines[0])] if lines else [],
        "text": _readouts(series, [dict(line) for line in lines], x_label, x_format, y_format),
    }
    return _svg(out, HEIGHT, title, f"Last value of {'; '.join(last)}.", json.dumps(readout))


def strip_plot(
    values: Sequence[tuple[str, float]],
    *,
    title: str,
    x_label: str,
    x_format: Format = plain,
    marked: frozenset[str] = frozenset(),
    lines: Sequence[tuple[str, float]] = (),
) -> str:
    """One dot a site along the axis, stacked where they are close.

    Args:
        marked: names whose dots are rings in the second colour.
        values: (name, value); values that are not finite are left out.
        lines: (name, value) of vertical lines, e.g. the median.
    """
    dots = sorted((v, name) for name, v in values if math.isfinite(v))
    radius = 5.0 if len(dots) <= 60 else 3.5 if len(dots) <= 250 else 2.2
    across = axis([v for v, _ in dots], 32, WIDTH - RIGHT - 10, pad=0.03)
    columns: dict[int, list[tuple[float, str]]] = {}
    for value, name in dots:
        columns.setdefault(round(across(value) / (2 * radius)), []).append((value, name))
    tallest = max((len(c) for c in columns.values()), default=1)
    top, height = 30, min(HEIGHT, max(130, round(30 + 2 * radius * (tallest + 1) + BOTTOM)))
    floor = height - BOTTOM
    out = [_x_axis(across, x_format, x_label, height, grid_top=top)]
    step = min(2 * radius + 0.5, (floor - top - 2 * radius) / max(1, tallest - 1))
    for column in columns.values():
        for level, (value, name) in enumerate(column):
            y = floor - radius - 1 - level * step
            kind = "ring" if name in marked else "dot s0"
            out.append(
                f'<circle class="{kind}" cx="{across(value):.1f}" cy="{y:.1f}" r="{radius:g}">'
                f"<title>{escape(name)}: {escape(x_format(value))}</title></circle>"
            )
    for i, (name, value) in enumerate((n, v) for n, v in lines if math.isfinite(v)):
        x = across(value)
        side = "end" if x > WIDTH * 0.6 else "start"
        shift = -5 if side == "end" else 5
        out.append(f'<path class="mark" d="M{x:.1f} {top - 16 + 13 * i}V{floor}"/>')
        out.append(f'<text x="{x + shift:.1f}" y="{top - 7 + 13 * i}" text-anchor="{side}">{escape(name)}</text>')
    about = f"{len(dots)} dots"
    if dots:
        about += f" from {x_format(dots[0][0])} to {x_format(dots[-1][0])}"
    return _svg(out, height, title, about + ".")


def bars(values: Sequence[tuple[str, float]], *, title: str, x_label: str, y_format: Format = plain) -> str:
    """One bar a value, from zero, in the given order; many bars touch each other."""
    height = 190
    up = axis([v for _, v in values], height - BOTTOM, TOP + 4, zero=True, pad=0.04)
    left = _margin(up, y_format)
    room = (WIDTH - left - RIGHT) / max(1, len(values))
    width = min(28.0, room * (0.72 if len(values) <= 60 else 1.0))
    out = [_y_axis(up, y_format, left)]
    for i, (name, value) in enumerate(values):
        if not math.isfinite(value):
            continue
        x, y = left + (i + 0.5) * room - width / 2, up(value)
        top, tall = min(y, up(0)), abs(up(0) - y)
        out.append(
            f'<rect class="bar" x="{x:.2f}" y="{top:.1f}" width="{width:.2f}" height="{tall:.1f}">'
            f"<title>{escape(name)}: {escape(y_format(value))}</title></rect>"
        )
    middle = (left + WIDTH - RIGHT) / 2
    out.append(_base(left, up(0)))
    out.append(f'<text x="{middle}" y="{height - 14}" text-anchor="middle">{escape(x_label)}</text>')
    finite = [v for _, v in values if math.isfinite(v)]
    span = f" from {y_format(min(finite))} to {y_format(max(finite))}" if finite else ""
    return _svg(out, height, title, f"{len(values)} bars{span}.")


# ------------------------------------------------------------------------------------------- pieces


def _svg(parts: Sequence[str], height: int, title: str, about: str, readout: str = "") -> str:
    data = f' data-readout="{escape(readout)}"' if readout else ""
    label = escape(f"{title}. {about}")
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}"{data}>'
        f"{''.join(parts)}</svg>"
    )


def _base(left: float, y: float) -> str:
    return f'<path class="axis" d="M{left:.0f} {y:.1f}H{WIDTH - RIGHT}"/>'


def _margin(up: Axis, y_format: Format) -> int:
    """Room for the longest label at the y axis, also where the page sets charts in larger type."""
    return 14 + round(8.3 * max(len(text) for text in _labels(up.ticks, y_format)))


def _y_axis(up: Axis, y_format: Format, left: float) -> str:
    labels = _labels(up.ticks, y_format)
    return "".join(
        f'<path class="grid" d="M{left} {up(t):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{left - 8}" y="{up(t) + 4:.1f}" text-anchor="end">{escape(label)}</text>'
        for t, label in zip(up.ticks, labels, strict=True)
    )


def _x_axis(across: Axis, x_format: Format, label: str, height: int, grid_top: float | None = None) -> str:
    floor = height - BOTTOM
    out = []
    for t, text in zip(across.ticks, _labels(across.ticks, x_format), strict=True):
        if grid_top is not None:
            out.append(f'<path class="grid" d="M{across(t):.1f} {grid_top}V{floor}"/>')
        out.append(f'<path class="axis" d="M{across(t):.1f} {floor}v4"/>')
        out.append(f'<text x="{across(t):.1f}" y="{floor + 17}" text-anchor="middle">{escape(text)}</text>')
    middle = (across.start + across.end) / 2
    out.append(f'<text class="name" x="{middle:.0f}" y="{height - 5}" text-anchor="middle">{escape(label)}</text>')
    return "".join(out)


def _labels(ticks: Sequence[float], format_: Format) -> list[str]:
    """Tick labels of one precision: ``1.5, 2.0`` rather than ``1.5, 2``; ``20 %`` rather than ``20.0 %``."""
    texts = [format_(t) for t in ticks]
    if all(t.endswith(".0 %") for t in texts):
        return [t.replace(".0 %", " %") for t in texts]
    if all(re.fullmatch(r"-?\d+(\.\d+)?", t) for t in texts):
        decimals = max(len(t.partition(".")[2].rstrip("0")) for t in texts)
        return [f"{float(t):.{decimals}f}" for t in texts]
    return texts


def _path(points: Sequence[tuple[float, float]], across: Axis, up: Axis) -> str:
    out, pen = [], "M"
    for x, y in points:
        if math.isnan(y):
            pen = "M"
            continue
        out.append(f"{pen}{across(x):.1f} {up(y):.1f}")
        pen = "L"
    return "".join(out)


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """About :data:`MOST_POINTS`: lowest and highest of each run of neighbours, and both ends."""
    if len(points) <= MOST_POINTS:
        return points
    each = math.ceil(2 * len(points) / MOST_POINTS)
    keep = {0, len(points) - 1}
    for at in range(0, len(points), each):
        group = [i for i in range(at, min(at + each, len(points))) if math.isfinite(points[i][1])]
        keep |= {min(group, key=lambda i: points[i][1]), max(group, key=lambda i: points[i][1])} if group else {at}
    return [points[i] for i in sorted(keep)]


def _last(points: Sequence[tuple[float, float]]) -> float:
    return next((y for _, y in reversed(points) if math.isfinite(y)), math.nan)


def _readouts(
    series: Sequence[Series],
    lines: Sequence[dict[float, float]],
    x_label: str,
    x_format: Format,
    y_format: Format,
) -> list[str]:
    """What the page shows at each x of the first line."""
    out = []
    for x, y in _thin(series[0].points()) if series else []:
        values = [y_format(y), *(y_format(line.get(x, math.nan)) for line in lines[1:])]
        named = [f"{s.name} {v}" for s, v in zip(series, values, strict=True)] if len(series) > 1 else values
        out.append(f"{x_label} {x_format(x)}: {', '.join(named)}")
    return out
