"""The story of a pipeline on one page: what each stage did, in pictures and in a few numbers, with links to its own
report."""

from __future__ import annotations

from html import escape as e
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.core.files import write_atomic
from atoll.recipes import distil_report, report
from atoll.recipes.distil import Distil
from atoll.recipes.page import capital, table, whole_page
from atoll.recipes.pictures import gallery, sample_figures
from atoll.recipes.readings import at_delta, epsilon_of, headline_spread, measured_on
from atoll.recipes.record import Record, read_record
from atoll.recipes.sections.cost import cost
from atoll.recipes.sections.learning import learning
from atoll.recipes.sections.sites import across
from atoll.recipes.words import MISSING, calls, count, duration, metric_text, number, plain, size

if TYPE_CHECKING:
    from atoll.recipes.pipeline import Pipeline

NAME = "report.html"


def write_pipeline_report(folder: Path, pipeline: Pipeline) -> Path:
    """Write ``report.html`` from the stages' directories; stages that have not begun are named as such."""
    shown: Shown = []
    for name, stage in pipeline.stages.items():
        own = folder / name
        if not (own / "events.jsonl").exists():
            shown.append((name, None))
        elif isinstance(stage, Distil):
            shown.append((name, distil_report.read_made(own)))
        else:
            shown.append((name, read_record(own)))
    body = "\n".join(
        [
            _header(pipeline, shown),
            _summary(shown),
            _gallery(folder, shown),
            *(_stage(n, s) for n, s in shown),
            _end(folder),
        ]
    )
    write_atomic(folder / NAME, whole_page(f"{pipeline.name}: report", body).encode(errors="replace"), durable=False)
    return folder / NAME


Shown = list[tuple[str, Any]]


def _header(pipeline: Pipeline, shown: Shown) -> str:
    whole = all(s is not None and s.end is not None for _, s in shown)
    state = '<span class="chip">finished</span>' if whole else '<span class="chip warn">not finished</span>'
    said = " ".join(f"<b>{e(capital(n))}</b>: {_verdict(s)}" for n, s in shown)
    return (
        f'<header>\n<p class="kicker">Report of {count(len(shown))} stages</p>\n<h1>{e(pipeline.name)}</h1>\n'
        f'<p class="meta">{state}</p>\n<p class="verdict">{said}</p>\n</header>'
    )


def _verdict(stage: Any) -> str:
    if stage is None:
        return "has not begun."
    if isinstance(stage, Record):
        return " ".join(report.verdict(stage)[:3])
    return distil_report.verdict(stage)


def _summary(shown: Shown) -> str:
    """One row a stage: what came of it and what it cost."""
    rows = []
    for name, stage in shown:
        if stage is None:
            rows.append([name, "not begun", *[MISSING] * 5])
        elif isinstance(stage, Record):
            rows.append([name, *_federated(stage)])
        else:
            rows.append([name, *_made(stage)])
    head = ["stage", "method", "result", "bytes up", "bytes down", "privacy", "time here"]
    return "<h2>The stages</h2>\n" + table(head, rows, "", kind="words")


def _gallery(folder: Path, shown: Shown) -> str:
    """The pictures of all stages, one after the other."""
    figures = []
    for name, stage in shown:
        for made in sample_figures(folder / name) if stage is not None else ():
            figures.append(made.replace("<figcaption><b>", f"<figcaption><b>{e(capital(name))}, ", 1))
    lead = "What each stage's model draws: two samples of each class, from noise that nobody picked."
    return gallery(figures, lead)


def _federated(r: Record) -> list[str]:
    metric, seen = r.headline, r.evaluated
    result = f"{metric} {metric_text(metric, seen[-1].metrics[metric])} ({measured_on(r)})" if seen else MISSING
    s = headline_spread(r)
    if s is not None and s.worst_tenth == s.worst_tenth:
        result += f"; worst tenth of sites {metric_text(metric, s.worst_tenth)}"
    epsilon = epsilon_of(r)
    spent = "no noise, no guarantee" if epsilon is None else f"epsilon {plain(epsilon, 3)}{at_delta(r)}"
    method = str(r.start.get("method", ""))
    return [method, result, size(r.total("up")), size(r.total("down")), spent, duration(r.total("seconds"))]


def _made(made: distil_report.Made) -> list[str]:
    student, best = distil_report.student_and_best(made)
    result = MISSING
    if student is not None:
        result = f"{_distance(student)}{calls(student['calls'])}"
        if best is not None:
            result += f"; teacher {_distance(best)}{count(best['calls'])}"
    seconds = duration(number((made.end or {}).get("seconds")))
    reads = "training reads no row of a site" if made.start.get("steps") else "nothing is trained"
    return [str(made.start.get("method", "")), result, "0 B", "0 B", reads, seconds]


def _distance(judged: dict[str, Any]) -> str:
    fid = judged["metrics"].get("fid")
    return "" if fid is None else f"distance {plain(number(fid), 3)} at "


def _stage(name: str, stage: Any) -> str:
    if stage is None:
        return ""
    if isinstance(stage, Record):
        parts = [report.tiles(stage), learning(stage), across(stage, None), cost(stage)]
    else:
        parts = [p for p in distil_report.sections(stage) if not p.startswith("<h2>Samples")]  # they are above
    inside = "\n".join(p for p in parts if p).replace("<h3>", "<h4>").replace("</h3>", "</h4>")
    inside = inside.replace("<h2>", "<h3>").replace("</h2>", "</h3>")
    more = f'<p class="note">More in <a href="{e(name)}/report.html">the report of this stage</a>.</p>'
    return f'<section id="{e(name)}">\n<h2>{e(capital(name))}</h2>\n{inside}\n{more}\n</section>'


def _end(folder: Path) -> str:
    text = (folder / "recipe.yaml").read_text(encoding="utf-8") if (folder / "recipe.yaml").exists() else ""
    return (
        "<h2>Repeat the run</h2>\n<p>The same seeds, versions and machine give the same result.</p>\n"
        "<pre><code>atoll run recipe.yaml --out repeated</code></pre>\n"
        f"<details><summary>Resolved recipe</summary>\n<pre><code>{e(text)}</code></pre></details>\n"
        "<footer>Made by Atoll from the run's own record.</footer>"
    )
