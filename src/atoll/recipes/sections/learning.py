"""How the metrics moved, round by round."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from html import escape as e

from atoll.recipes.charts import Format, Series, line_chart
from atoll.recipes.page import capital, charts, figure, label
from atoll.recipes.record import Merge, Record
from atoll.recipes.words import count, metric_text

Line = tuple[str, Callable[[Merge], float]]


def curve(merges: Sequence[Merge], caption: str, lines: Sequence[Line], form: Format, zero: bool = False) -> str:
    """Lines over rounds."""
    rounds = [float(m.round) for m in merges]
    series = [Series(name, rounds, [value(m) for m in merges]) for name, value in lines]
    svg = line_chart(series, title=caption, x_label="round", x_format=count, whole_x=True, y_format=form, zero=zero)
    return figure(caption, svg)


def _of(metric: str) -> Callable[[Merge], float]:
    return lambda m: m.metrics.get(metric, math.nan)


def in_words(metric: str) -> Format:
    return partial(metric_text, metric)


def learning(r: Record) -> str:
    if not r.merges:
        return ""
    figures, name, seen = [], r.headline, r.evaluated
    if seen:
        figures.append(curve(seen, capital(name), [(name, _of(name))], in_words(name)))
        if r.method is not None and not r.method.schedule.synchronous:
            line = Series(name, [m.time for m in seen], [m.metrics[name] for m in seen])
            caption = f"{capital(name)} over device time"
            svg = line_chart([line], title=caption, x_label="virtual seconds", y_format=in_words(name))
            figures.append(figure(caption, svg))
    others = {k for m in r.merges for k in m.metrics} - {name}
    for other in sorted(others, key=lambda k: (k != "loss", k))[:5]:
        measured = [m for m in r.merges if other in m.metrics]
        figures.append(curve(measured, capital(other), [(other, _of(other))], in_words(other)))
    for own in sorted({k for m in r.merges for k in m.reported})[:4]:
        measured = [m for m in r.merges if own in m.reported]
        caption = f"{capital(own)} during visits, mean"
        figures.append(curve(measured, caption, [(own, lambda m, k=own: m.reported[k])], in_words(own)))  # type: ignore[misc]
    lead = _trend(r) if seen else "The model has not been evaluated yet."
    return f'<h2>Learning</h2>\n<p class="lead">{e(lead)}</p>\n{charts(figures)}'


def _trend(r: Record) -> str:
    """When the headline metric was best."""
    name, better = r.headline, r.higher_is_better(r.headline)
    seen = [m for m in r.evaluated if math.isfinite(m.metrics[name])]
    if better is None or not seen:
        return "What was measured after each round."
    best, last = (max if better else min)(seen, key=_of(name)), seen[-1]
    text = f"The best {label(name)} was {metric_text(name, best.metrics[name])}, after round {best.round}"
    if best.metrics[name] == last.metrics[name]:
        return f"{text}." if best is last else f"{text}, and the last is as good."
    return f"{text}; the last is {metric_text(name, last.metrics[name])}."
