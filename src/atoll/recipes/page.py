"""The look of a report: one self-contained page, and the blocks that it is made of.

The page requests nothing, and a content security policy forbids it to: styles and the one small script are inside, and
no other script can run, whatever a site calls itself. All that comes from data is escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape as e
from importlib.resources import files


def whole_page(name: str, body: str) -> str:
    """A page called ``name``; ``body`` is trusted markup."""
    style, script = _asset("report.css"), _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{e(name)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return files("atoll.recipes").joinpath(name).read_text(encoding="utf-8")


def tile(title: str, value: str, under: str) -> str:
    shown = f'<span class="value">{e(value)}</span><span class="under">{e(under)}</span>'
    return f'<div class="tile"><dt>{e(capital(title))}</dt><dd>{shown}</dd></div>\n'


def figure(caption: str, svg: str, kind: str = "chart") -> str:
    head = f'<figcaption><b>{e(caption)}</b><span class="readout"></span></figcaption>'
    return f'<figure class="{kind}">{head}\n{svg}</figure>\n'


def charts(figures: Sequence[str]) -> str:
    return f'<div class="charts">\n{"".join(figures)}</div>' if figures else ""


def table(
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


def label(metric: str) -> str:
    return metric.replace("_", " ")


def capital(metric: str) -> str:
    """The same, as the start of a line."""
    text = label(metric)
    return text[:1].upper() + text[1:]
