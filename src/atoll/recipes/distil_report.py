"""The report of a stage that makes a generator: pictures, what the judge says, what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape as e
from pathlib import Path
from typing import Any

import yaml

from atoll.core.card import Card, all_cards
from atoll.core.errors import RunError
from atoll.core.files import read_json_lines, write_atomic
from atoll.diffusion.student import NAME as STUDENT
from atoll.recipes.charts import Series, line_chart
from atoll.recipes.page import capital, charts, figure, label, table, tile, whole_page
from atoll.recipes.pictures import gallery, sample_figures
from atoll.recipes.words import calls, count, duration, number, plain

NAME = "report.html"
SHOWN = ("fid", "precision", "recall", "agreement", "diversity")
MEANINGS = {
    "fid": "Frechet distance to the real rows; 0 is the same distribution",
    "precision": "share of samples that lie among real rows",
    "recall": "share of real rows that lie among samples",
    "agreement": "share that the judge takes for the class that was asked for",
    "diversity": "variety within a class, real rows having 1",
}


@dataclass
class Made:
    """A stage's directory, read back."""

    folder: Path
    config: dict[str, Any]
    text: str
    start: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    losses: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def judged(self) -> list[dict[str, Any]]:
        return list((self.end or {}).get("judged", ()))

    @property
    def card(self) -> Card | None:
        found = all_cards().get(str(self.start.get("method")))
        return found[0] if found else None


def read_made(folder: Path) -> Made:
    """Raises :class:`RunError` when the folder holds no such stage."""
    try:
        text = (folder / "recipe.yaml").read_text(encoding="utf-8")
        made = Made(folder, dict(yaml.safe_load(text)), text)
        for event in read_json_lines(folder / "events.jsonl"):
            if event.get("event") == "start":
                made.start = event
            elif event.get("event") == "step":
                for name, value in event["losses"].items():
                    made.losses.setdefault(name, []).append((number(event["step"]), number(value)))
            elif event.get("event") == "end":
                made.end = event
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise RunError(f"{folder} cannot be read as a run ({error}).") from error
    return made


def write_distil_report(folder: Path) -> Path:
    """Write ``report.html`` from the directory alone."""
    made = read_made(folder)
    body = "\n".join(x for x in (_header(made), *sections(made), _use(made), _behind(made)) if x)
    page = whole_page(f"{made.config.get('name', 'run')}: run report", body)
    write_atomic(folder / NAME, page.encode(errors="replace"), durable=False)
    return folder / NAME


def sections(made: Made) -> list[str]:
    """All but header and footer: also part of a pipeline's report."""
    return [_tiles(made), _pictures(made), _judged(made), _learning(made), _cost(made), _method(made)]


def student_and_best(made: Made) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The student at its fewest calls (the best number of them, where nothing was trained), and the best way of
    sampling the teacher."""
    mine = [j for j in made.judged if not str(j["way"]).startswith("teacher")]
    theirs = [j for j in made.judged if str(j["way"]).startswith("teacher")]
    fid = lambda j: number(j["metrics"].get("fid"))  # noqa: E731
    first = (lambda j: j["calls"]) if made.start.get("steps") else fid
    return min(mine, key=first, default=None), min(theirs, key=fid, default=None)


def verdict(made: Made) -> str:
    """What came of it, in sentences (HTML)."""
    method = e(str(made.start.get("method", "a method")))
    if made.end is None:
        return f"<b>{method}</b> has not finished."
    student, best = student_and_best(made)
    done = "made a generator for" if made.start.get("steps") else "is judged as a generator of"
    said = [f"<b>{method}</b> {done} <b>{e(str(made.start.get('data')))}</b>"]
    if student is not None:
        m = student["metrics"]
        said.append(
            f" that needs <b>{calls(student['calls'])}</b> a sample{_quality(m, ': distance', ', class agreement')}."
        )
    if student is not None and best is not None:
        said.append(f" Its teacher's best way of sampling needs <b>{calls(best['calls'])}</b>")
        said.append(f"{_quality(best['metrics'], ' for a distance of', ' and an agreement of')}.")
        faster = _seconds(best) / _seconds(student)
        if math.isfinite(faster):
            said.append(f" The student is <b>{plain(faster, 2)} times faster</b>.")
    return "".join(said)


def _quality(metrics: Mapping[str, Any], distance: str, agreement: str) -> str:
    """What the judge says, after words; nothing where there was none."""
    if "fid" not in metrics:
        return ""
    return f"{distance} {plain(number(metrics['fid']), 3)}{agreement} {_share(metrics.get('agreement'))}"


def _seconds(judged: Mapping[str, Any]) -> float:
    return number(judged["metrics"].get("cpu_seconds_per_1000"))


def _share(value: Any) -> str:
    return f"{100 * number(value):.0f} %"


def _header(made: Made) -> str:
    state = '<span class="chip">finished</span>' if made.end else '<span class="chip warn">not finished</span>'
    return (
        f'<header>\n<p class="kicker">Run report</p>\n<h1>{e(str(made.config.get("name", "run")))}</h1>\n'
        f'<p class="meta">{state}</p>\n<p class="verdict">{verdict(made)}</p>\n</header>'
    )


def _tiles(made: Made) -> str:
    student, best = student_and_best(made)
    if made.end is None or student is None:
        return ""
    m = student["metrics"]
    tiles = [
        *([("distance to real rows", plain(number(m["fid"]), 3), "lower is better")] if "fid" in m else []),
        ("calls a sample", count(student["calls"]), f"teacher {count(best['calls'])}" if best else ""),
        *([("class agreement", _share(m["agreement"]), "as the judge sees it")] if "agreement" in m else []),
        ("1,000 samples", duration(_seconds(student)), f"teacher {duration(_seconds(best))}" if best else ""),
        ("training", duration(number(made.end.get("cpu_seconds"))), f"{count(made.end['steps'])} steps, CPU time"),
        ("trained parameters", count(number(made.end.get("trained_parameters"))), "in all networks that learned"),
    ]
    return '<dl class="tiles">\n' + "".join(tile(*t) for t in tiles) + "</dl>"


def _pictures(made: Made) -> str:
    what = "Samples of the first texts" if made.config.get("texts") else "Two samples of each class"
    lead = f"{what}, from the same noise in every row of pictures; nothing was picked."
    return gallery(sample_figures(made.folder), lead)


def _judged(made: Made) -> str:
    if not made.judged:
        return ""
    if not any("fid" in j["metrics"] for j in made.judged):
        rows = [[str(j["way"]), count(j["calls"]), duration(_seconds(j))] for j in made.judged]
        lead = "There are no rows to compare with, so nobody judges the samples: look at them."
        head = ["sampled by", "calls", "1,000 samples"]
        return f'<h2>Speed</h2>\n<p class="lead">{lead}</p>\n' + table(head, rows, "")
    rows = []
    for j in made.judged:
        m = j["metrics"]
        cells = [str(j["way"]), count(j["calls"]), *(plain(number(m.get(k)), 3) for k in SHOWN)]
        rows.append([*cells, duration(_seconds(j))])
    head = ["sampled by", "calls", *(label(k) for k in SHOWN), "1,000 samples"]
    lead = "; ".join(f"{label(k)}: {v}" for k, v in MEANINGS.items())
    where = "The judge is a small classifier of this data set: numbers compare rows of this table, not papers."
    return f'<h2>What the judge says</h2>\n<p class="lead">{e(capital(lead))}. {where}</p>\n' + table(head, rows, "")


def _learning(made: Made) -> str:
    figures = []
    for name, points in made.losses.items():
        line = Series(name, [x for x, _ in points], [y for _, y in points])
        svg = line_chart([line], title=name, x_label="step", x_format=count, whole_x=True, y_format=plain)
        figures.append(figure(name.replace("/", ": "), svg))
    lead = "Losses of two networks that chase each other say little by themselves; the pictures say more."
    return f'<h2>Training</h2>\n<p class="lead">{lead}</p>\n{charts(figures)}' if figures else ""


def _cost(made: Made) -> str:
    if made.end is None:
        return ""
    end = made.end
    rows = [
        ["training", duration(number(end.get("cpu_seconds"))), f"{count(end['samples'])} rows through losses"],
        ["teacher's samples made before it", duration(number(end.get("teacher_seconds"))), ""],
        ["bytes between sites and server", "0 B", "nothing of this stage needs a site"],
    ]
    return f"<h2>Cost</h2>\n{table(['', 'CPU time or size', ''], rows, '', kind='words')}"


def _method(made: Made) -> str:
    card = made.card
    if card is None:
        return ""
    needs = {
        "nothing": "the teacher alone: no data",
        "teacher samples": "samples that the teacher makes",
        "images": "real rows",
    }.get(str(made.start.get("needs")), "")
    cites = "".join(f"<li>{e(str(c))}</li>\n" for c in card.cites)
    return (
        f"<h2>Method</h2>\n<p><b>{e(card.name)}</b>: {e(card.summary)}. It needs {needs}.</p>\n"
        f"<h3>Please cite</h3>\n<ul>\n{cites}</ul>"
    )


def _use(made: Made) -> str:
    """Lines of Python that draw from the student."""
    if made.end is None or not (made.folder / "model" / STUDENT).exists():
        return ""
    texts, adapter = made.config.get("texts"), made.config.get("lora")
    lines = ["import torch", "from atoll.diffusion.student import load_student"]
    if adapter:
        lines.append("from atoll.diffusion.diffusers_model import load_denoiser")
    given = f', load_denoiser("{made.config.get("start")}")' if adapter else ""
    cond = "packed_texts" if texts else "torch.arange(10)"
    lines += ["", f'student = load_student("model"{given})', f"x = student.draw({cond})  # its fewest calls"]
    lines += [] if texts else ["pixels = student.pixels(x)  # uint8 [B, H, W, C]"]
    return f"<h2>Draw from the model</h2>\n<pre><code>{e(chr(10).join(lines))}</code></pre>"


def _behind(made: Made) -> str:
    return (
        "<h2>Details</h2>\n<details><summary>Resolved recipe</summary>\n"
        f"<pre><code>{e(made.text)}</code></pre></details>\n<footer>Made by Atoll from the run's own record.</footer>"
    )
