"""The report says what the events say, in a page that asks nobody for anything and lets nobody in."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.core.errors import RunError
from atoll.recipes import words
from atoll.recipes.charts import Series, bars, line_chart, nice_ticks, strip_plot
from atoll.recipes.record import read_record, spread
from atoll.recipes.report import write_report

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;"

START = {
    "event": "start", "at": "2025-01-31T10:00:00Z", "name": "demo", "method": "fedprox",
    "headline": "accuracy",
    "higher_is_better": True, "data": "digits", "skipped": {},
    "partition": {"js_distance": 0.25},
    "sites": [10, 20, 30], "versions": {"atoll": "0.1.0", "torch": "2.13.0"},
}  # fmt: skip


def merge(n: int, accuracy: float | None = None, **more: Any) -> dict[str, Any]:
    """A round event: site s sends 1000 + s bytes up and 2000 down, and works 1e6 FLOPs."""
    sites = ["0", "1", "2"]
    return {
        "event": "round", "round": n, "time": 1.5 * (n + 1), "seconds": 0.25, "replies": 3,
        "up_bytes": {s: 1000 + int(s) for s in sites}, "down_bytes": dict.fromkeys(sites, 2000),
        "flops": dict.fromkeys(sites, 1e6), "site_seconds": {}, "site_metrics": {}, "refused": {},
        "notes": [],
        "metrics": {} if accuracy is None else {"accuracy": accuracy, "loss": 1 - accuracy}, **more,
    }  # fmt: skip


SITES = {
    "event": "sites",
    "metrics": {"0": {"accuracy": 0.9}, "1": {"accuracy": 0.5}, "2": {"accuracy": 0.7}},
}
END = {
    "event": "end", "at": "2025-01-31T10:05:00Z", "rounds": 2, "metrics": {}, "seconds": 61.0,
    "memory_bytes": 400_000_000, "epsilon": None, "delta": None, "personal": False,
}  # fmt: skip
PLAN = {
    "up_bytes": 6006, "down_bytes": 24000, "flops": 6e6, "virtual_seconds": 3.0, "seconds": 30.5,
    "memory_bytes": 500_000_000, "epsilon": None, "delta": None, "exact": True, "foreseen": 2,
}  # fmt: skip


def write(folder: Path, events: list[dict[str, Any]], plan: Any = PLAN, **recipe: Any) -> Path:
    """A run directory with these events."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "name": "demo",
        "model": {"name": "mlp"},
        "method": {"name": "fedprox", "mu": 0.5},
        "rounds": 2,
        **recipe,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return folder


FINISHED = [START, merge(0, 0.25), merge(1, 0.75, refused={"2": "the reply holds NaN"}), SITES, END]


class Page(HTMLParser):
    """What a browser would make of a page: tags with their attributes, visible text, table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> is out of order"

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def row(self, first: str, table: str = "") -> list[str]:
        """The cells after the first one, of the only row that begins so; ``table``: how its head begins."""
        rows = [row for t in self.tables if t[0][0] == table or not table for row in t]
        found = [row[1:] for row in rows if row[0] == first]
        assert len(found) == 1, f"{len(found)} rows begin with {first}"
        return found[0]


def page(folder: Path, picture: str | None = None) -> Page:
    path = write_report(folder, picture)
    assert path == folder / "report.html"
    return Page(path.read_text())


# ------------------------------------------------------------------------------------------- numbers


def test_the_page_says_what_the_events_say(tmp_path: Path) -> None:
    p = page(write(tmp_path, FINISHED))
    assert not p.open  # every tag is closed
    text = " ".join(p.text.split())
    # 2 rounds x (1000 + 1001 + 1002) up, 2 x 3 x 2000 down, 6 visits of 1e6 FLOPs
    assert "fedprox adapted the mlp model to digits across 3 sites." in text
    assert "After 2 rounds its accuracy is 75.0 %, up from 25.0 % after round 1" in text
    assert "6.01 kB went up from the sites and 12 kB came down." in text
    assert "1 reply was refused." in text
    assert "6 MFLOP" in text
    assert "1 min 01 s on this machine" in text
    assert p.row("accuracy") == ["70.0 %", "70.0 %", "50.0 %", "50.0 %", "site 1"]
    assert p.row("the reply holds NaN") == ["1", "2"]
    # uniform devices: 1.25 MB/s each way and 1e10 FLOP/s, so (2 x 2000 + 2 x 1002) / 1.25e6 + 2e6 / 1e10 s
    assert p.row("2", "site") == ["30", "70.0 %", "2", "2 kB", "4 kB", "2 MFLOP", "5 ms", "1"]
    assert p.row("2", "round") == ["75.0 %", "0.2500", "3", "1", "3 kB", "6 kB", "3 MFLOP", "3 s", "250 ms"]


def test_plan_against_truth(tmp_path: Path) -> None:
    p = page(write(tmp_path, FINISHED))
    assert p.row("bytes up") == ["6.01 kB", "6.01 kB", "1.00"]
    assert p.row("bytes down") == ["24 kB", "12 kB", "0.50"]
    assert p.row("time on this machine") == ["30.5 s", "1 min 01 s", "2.00"]
    assert p.row("peak memory") == ["500 MB", "400 MB", "0.80"]
    assert p.row("device time") == ["3 s", "3 s", "1.00"]
    assert "epsilon" not in [row[0] for table in p.tables for row in table]  # nobody promised any


def test_epsilon_is_told_with_its_delta(tmp_path: Path) -> None:
    events = [START, merge(0, 0.5, epsilon=1.25), merge(1, 0.5, epsilon=2.5), SITES, {**END, "delta": 1e-5}]
    p = page(write(tmp_path, events, {**PLAN, "epsilon": 2.0, "delta": 1e-5}))
    assert "epsilon 2.5 at delta 1e-5, per site" in p.text
    assert p.row("epsilon") == ["2", "2.5", "1.25"]


def test_the_worst_tenth_by_hand() -> None:
    up = {str(i): i / 100 for i in range(20)}  # 0.00 .. 0.19
    s = spread(up, higher_is_better=True)
    assert s.worst_tenth == pytest.approx((0.00 + 0.01) / 2)
    assert (s.worst, s.worst_sites) == (0.0, ("0", "1"))
    assert (s.mean, s.median) == (pytest.approx(0.095), pytest.approx(0.095))
    s = spread(up, higher_is_better=False)
    assert s.worst_tenth == pytest.approx((0.19 + 0.18) / 2)
    assert s.worst_sites == ("19", "18")
    assert len(spread({str(i): 0.0 for i in range(21)}, True).worst_sites) == 3  # a tenth of 21, rounded up
    assert spread({"a": 1.0, "b": 3.0}, True).worst_tenth == 1.0


def test_sites_without_a_number_are_left_out_and_counted() -> None:
    s = spread({"0": math.nan, "1": 1.0, "2": 3.0, "3": math.inf}, True)
    assert (s.mean, s.median, s.worst, s.missing) == (2.0, 2.0, 1.0, 2)
    nobody_knows = spread({"1": 1.0}, None)
    assert math.isnan(nobody_knows.worst)
    assert not nobody_knows.worst_sites
    assert math.isnan(spread({"1": math.nan}, True).mean)


def test_which_end_is_the_good_one(tmp_path: Path) -> None:
    start = {**START, "headline": "rmse", "higher_is_better": False}
    sites = {"event": "sites", "metrics": {"0": {"rmse": 1.0, "r2": 0.5}, "1": {"rmse": 4.0, "r2": 0.9}}}
    rounds = [merge(0, metrics={"rmse": 9.0, "r2": 0.1}), merge(1, metrics={"rmse": 2.5, "r2": 0.75})]
    p = page(write(tmp_path, [start, *rounds, sites, END]))
    assert "its rmse is 2.500, down from 9.000 after round 1" in " ".join(p.text.split())
    assert p.row("rmse")[2:] == ["4.000", "4.000", "site 1"]
    assert p.row("r2")[2:] == ["0.5000", "0.5000", "site 0"]


def test_a_resumed_run_adds_up_its_seconds(tmp_path: Path) -> None:
    p = page(write(tmp_path, [*FINISHED[:2], {"event": "resume", "round": 1, "at": ""}, *FINISHED[2:]]))
    assert "stopped and resumed once" in p.text
    assert p.row("time on this machine")[1] == "500 ms"  # 2 x 0.25 s; the end event knows its own process alone


# ------------------------------------------------------------------------------------------- odd runs


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    for events in ([], [START]):
        p = page(write(tmp_path, events))
        assert "No round has been completed yet" in p.text
        assert "not finished" in p.text


def test_a_run_that_is_still_going(tmp_path: Path) -> None:
    p = page(write(tmp_path, [START, merge(0, 0.5)], rounds=40))
    assert "It stands at 1 of 40 rounds." in " ".join(p.text.split())
    assert "the run is not finished" in p.text
    with open(tmp_path / "events.jsonl", "a") as f:
        f.write('{"event": "round", "up_by')  # being written right now
    assert "It stands at 1 of 40 rounds." in " ".join(page(tmp_path).text.split())


def test_metrics_that_are_missing_or_not_numbers(tmp_path: Path) -> None:
    text = page(write(tmp_path / "none", [START, merge(0), merge(1), END])).text
    assert "has not been evaluated" in text
    nan = [
        START,
        merge(0, 0.5),
        merge(1, math.nan),
        {**SITES, "metrics": {"0": {"accuracy": math.nan}, "1": {}}},
        END,
    ]
    text = page(write(tmp_path / "nan", nan)).text
    assert "training has diverged" in text
    assert "not a finite number after 1 round, first after 2" in text
    assert "1 site without a finite accuracy" in text
    words_ = [
        START,
        merge(0, metrics={"accuracy": "high", "loss": None}, up_bytes=None, notes="no list", flops=[1]),
    ]
    assert "training has diverged" in page(write(tmp_path / "words", words_, plan=[])).text


def test_a_thousand_sites_are_folded_away(tmp_path: Path) -> None:
    names = [str(i) for i in range(1000)]
    start = {**START, "sites": [5] * 1000}
    sites = {"event": "sites", "metrics": {n: {"accuracy": int(n) / 1000} for n in names}}
    row = merge(0, 0.5, up_bytes=dict.fromkeys(names, 7), flops=dict.fromkeys(names[:990], 1.0))
    folder = write(tmp_path, [start, row, sites, END], sites=1000)
    p = page(folder)
    assert "All 1,000 sites" in p.text
    assert p.row("accuracy")[2] == "5.0 %"  # the mean of 0.000 .. 0.099 is 0.0495
    assert "10 sites of 1,000 never took part" in p.text
    body = (folder / "report.html").read_text()
    at = body.index("<summary>All 1,000 sites")
    assert body[:at].count('<th scope="row">') < 40
    assert len(body) < 1_000_000


def test_small_federations_are_shown_in_full(tmp_path: Path) -> None:
    p = page(write(tmp_path, FINISHED))
    assert [p.row(s, "site")[0] for s in ("0", "1", "2")] == ["10", "20", "30"]
    assert "All 3 sites" not in p.text


def test_a_folder_without_a_run_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run"):
        write_report(tmp_path)
    write(tmp_path, FINISHED)
    with open(tmp_path / "events.jsonl", "a") as f:
        f.write("not json\n")
    with pytest.raises(RunError, match=r"events.jsonl is damaged"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_recipe_that_needs_foreign_code_still_has_a_report(tmp_path: Path) -> None:
    p = page(write(tmp_path, FINISHED, method="my_package.methods:mine"))
    assert "names code that a report does not load" in p.text
    assert "my_package.methods:mine" in p.text  # in the resolved recipe


# ------------------------------------------------------------------------------------------- method


def test_the_method_is_told_by_its_differences_and_cited(tmp_path: Path) -> None:
    p = page(write(tmp_path, FINISHED))
    assert p.row("work at a site") == ["LocalSGD(correction=Proximal(mu=0.5))", "differs"]
    assert p.row("how replies are merged") == ["WeightedMean", "the same"]
    assert "Federated Optimization in Heterogeneous Networks" in p.text
    assert "1812.06127" in p.text


def test_device_time_is_drawn_for_asynchronous_schedules_only(tmp_path: Path) -> None:
    assert "over device time" not in page(write(tmp_path / "a", FINISHED)).text
    assert "over device time" in page(write(tmp_path / "b", FINISHED, method={"name": "fedbuff", "k": 2})).text


def test_warnings_are_counted_together_when_only_numbers_differ(tmp_path: Path) -> None:
    reason = "the reply has {} bytes, over the limit of 10"
    events = [
        START,
        *(merge(i, 0.5, refused={str(i): reason.format(11 + i)}, notes=[f"late by {i} s"]) for i in range(3)),
    ]
    p = page(write(tmp_path, events))
    assert p.row(reason.format(11)) == ["3", "0, 1, 2"]
    assert "late by 0 s (3 times)" in p.text


def test_the_lines_that_load_the_model(tmp_path: Path) -> None:
    model = write(tmp_path, FINISHED) / "model"
    assert "Load the model" not in page(tmp_path).text
    model.mkdir()
    assert 'load_file("model/model.safetensors")' in page(tmp_path).text
    (model / "model.json").write_text(json.dumps({"builder": {"name": "mlp"}, "class": "torch.nn.Net"}))
    assert 'load_model("model")' in page(tmp_path).text
    (model / "config.json").write_text("{}")
    assert "transformers.Net.from_pretrained" in page(tmp_path).text
    (model / "adapter_config.json").write_text("{}")
    assert "PeftModel.from_pretrained" in page(tmp_path).text


# ------------------------------------------------------------------------------------------- safety


def test_nothing_in_a_run_can_inject(tmp_path: Path) -> None:
    metrics = {EVIL: 1.0, "accuracy": 0.5}
    start = {**START, "name": EVIL, "method": EVIL, "headline": EVIL, "data": EVIL, "at": EVIL,
             "skipped": {EVIL: 3}, "partition": {EVIL: EVIL}, "versions": {EVIL: EVIL}}  # fmt: skip
    rounds = [
        merge(i, metrics=metrics, refused={EVIL: EVIL}, notes=[EVIL], up_bytes={EVIL: 5},
              flops={EVIL: 1.0}, site_metrics={EVIL: metrics})
        for i in range(2)
    ]  # fmt: skip
    sites = {"event": "sites", "metrics": {EVIL: metrics, "1": metrics}}
    folder = write(tmp_path, [start, *rounds, sites, {**END, "at": EVIL}], name=EVIL, method=EVIL, model=EVIL)
    safe = page(write(tmp_path / "safe", FINISHED))
    p = page(folder)
    assert not p.open
    assert {tag for tag, _ in p.tags} <= {tag for tag, _ in safe.tags} | {"ul", "li"}
    assert sum(tag == "script" for tag, _ in p.tags) == 1
    assert not [name for _, attrs in p.tags for name in attrs if name.startswith("on")]
    assert p.text.count(EVIL) >= 12  # told, as text


def test_the_page_asks_nobody_for_anything(tmp_path: Path) -> None:
    text = write_report(write(tmp_path, FINISHED)).read_text()
    assert not re.search(r"https?://|//\w|url\(|@import|fetch\(|XMLHttp|import\(", text.replace("</", "<"))
    assert not [a for _, attrs in Page(text).tags for a in attrs if a in ("src", "href", "srcset", "action", "data")]
    policy = next(a["content"] for _, a in Page(text).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "'unsafe-inline'" not in policy.partition("script-src")[2].partition(";")[0]


def test_the_picture_is_put_in_as_it_is(tmp_path: Path) -> None:
    picture = '<svg viewBox="0 0 1 1"><text>mine</text></svg>'
    text = write_report(write(tmp_path, FINISHED), picture).read_text()
    assert picture in text
    assert "Training rows at each site" not in text
    assert "Training rows at each site" in write_report(tmp_path).read_text()


def test_only_the_report_is_written(tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in write(tmp_path, FINISHED).iterdir()}
    write_report(tmp_path)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after.pop("report.html")
    assert after == before


# ------------------------------------------------------------------------------------------- charts and words

VALUES = st.lists(st.floats(width=64), max_size=30)


def _coordinates(svg: str) -> list[float]:
    """Every coordinate of the marks; also checks that the picture is well-formed XML."""
    root = ElementTree.fromstring(svg)
    out = []
    for node in root.iter():
        for name in ("cx", "cy", "x", "y", "x1", "x2", "y1", "y2", "width", "height", "d"):
            out += [float(v) for v in re.findall(r"-?[\d.]+(?:e[+-]?\d+)?|nan|inf", node.get(name, ""))]
    return out


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_charts_of_any_numbers_stay_inside_their_frame(values: list[float]) -> None:
    named = [(f"<{i}>", v) for i, v in enumerate(values)]
    xs = [float(i) for i in range(len(values))]
    for svg in (
        line_chart([Series("a", xs, values), Series("b", values, xs)], title="<t>", x_label="<x>", zero=True),
        strip_plot(named, title="<t>", x_label="<x>", lines=[("m", values[0] if values else math.nan)]),
        bars(named, title="<t>", x_label="<x>"),
    ):
        assert all(-1 <= c <= 441 for c in _coordinates(svg))


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_round_few_and_inside(low: float, span: float) -> None:
    high = low + span
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 7
    if abs(low) < 1e3 * span:  # else the numbers themselves have no digits left
        assert len(ticks) > 1
        assert all(low - 1e-6 * span <= t <= high + 1e-6 * span for t in ticks)
        step = ticks[1] - ticks[0]
        assert f"{step:.0e}"[0] in "125"


def test_ticks_by_hand() -> None:
    assert nice_ticks(0, 100) == (0, 20, 40, 60, 80, 100)
    assert nice_ticks(0.31, 0.88) == pytest.approx((0.4, 0.5, 0.6, 0.7, 0.8))
    assert nice_ticks(1, 3, whole=True) == (1, 2, 3)


def test_a_gap_where_there_is_no_number() -> None:
    svg = line_chart([Series("a", [0, 1, 2, 3, 4], [1, 2, math.nan, 3, 4])], title="t", x_label="x")
    path = re.search(r'class="line s0" d="([^"]*)"', svg)
    assert path is not None
    assert path[1].count("M") == 2
    assert path[1].count("L") == 2


def test_a_long_line_keeps_its_peak() -> None:
    ys = [0.0] * 100_000
    ys[54_321], ys[77_777] = 9.0, -5.0
    svg = line_chart([Series("a", list(range(100_000)), ys)], title="t", x_label="x")
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", svg.split('class="line s0"')[1].split("/>")[0])]
    assert len(heights) < 1000
    assert min(heights) < 50 < 190 < max(heights)  # up is small


def test_dots_that_share_a_place_are_stacked() -> None:
    svg = strip_plot([(str(i), 0.5) for i in range(300)], title="t", x_label="x", marked=frozenset({"7"}))
    dots = ElementTree.fromstring(svg).findall("circle")
    assert len({d.get("cy") for d in dots}) > 30
    assert [d.get("class") for d in dots].count("ring") == 1


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.size(999), "999 B"), (words.size(1000), "1 kB"), (words.size(1_234_567), "1.23 MB"),
        (words.size(999_900), "1 MB"), (words.flops(2.5e13), "25 TFLOP"), (words.duration(0.045), "45 ms"),
        (words.duration(245), "4 min 05 s"), (words.duration(7380), "2 h 03 min"),
        (words.duration(273600), "3 d 04 h"),
        (words.duration(59.99), "1 min 00 s"), (words.percent(0.9333), "93.3 %"), (words.plain(1e-5), "1e-5"),
        (words.plain(12345.6), "12,346"), (words.plain(1234.5), "1234"), (words.plain(3.2e9), "3.2e9"),
        (words.plain(math.nan), "-"), (words.size(math.inf), "∞"), (words.some(1, "reply"), "1 reply"),
        (words.some(2, "reply"), "2 replies"), (words.some(0, "site"), "0 sites"),
        (words.metric_text("test_accuracy", 0.5), "50.0 %"), (words.metric_text("loss", 1.92), "1.920"),
    ],
)  # fmt: skip
def test_numbers_in_words(said: str, expected: str) -> None:
    assert said == expected


# ------------------------------------------------------------------------------------------- the real thing


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from atoll.data.picture import partition_svg
    from atoll.recipes.recipe import read_recipe
    from atoll.recipes.run import start

    folder = tmp_path_factory.mktemp("real") / "run"
    method = {"name": "fedbuff", "k": 3}
    recipe = read_recipe({"name": "real", "method": method, "rounds": 4, "sites": 5, "devices": "tiers"})
    run, _ = start(recipe, folder)
    run.go()
    write_report(folder, partition_svg(run.prepared.setup.federation))
    return folder


def test_a_real_run(real: Path) -> None:
    events = [json.loads(line) for line in (real / "events.jsonl").read_text().splitlines()]
    rounds = [e for e in events if e["event"] == "round"]
    p = Page((real / "report.html").read_text())
    assert f"accuracy is {100 * rounds[-1]['metrics']['accuracy']:.1f} %" in " ".join(p.text.split())
    up = sum(sum(r["up_bytes"].values()) for r in rounds)
    assert f"{up / 1000:.3g} kB went up" in " ".join(p.text.split())
    r = read_record(real)
    assert [s.visits for s in sorted(r.sites.values(), key=lambda s: int(s.name))] == [
        sum(str(i) in e["flops"] for e in rounds) for i in range(5)
    ]
    on_its_way = max(max(e["down_bytes"].values(), default=0) for e in rounds) / 1.25e6  # has not arrived at the end
    assert all(0 < s.seconds <= rounds[-1]["time"] + on_its_way for s in r.sites.values() if s.visits)


CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
PROBE = """<!doctype html><title>waiting</title>
<iframe style="width:380px;height:800px;border:0" srcdoc="{page}"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const doc = frame.contentDocument, root = doc.documentElement;
  for (const d of doc.querySelectorAll("details")) d.open = true;
  const svg = doc.querySelector("svg[data-readout]");
  const box = svg.getBoundingClientRect();
  const at = {{clientX: box.right, clientY: box.top + 9}};
  svg.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", at));
  document.title = JSON.stringify({{
    inside: frame.contentWindow.innerWidth, needed: root.scrollWidth,
    wide: [...doc.querySelectorAll("body *")].filter((n) => !n.closest(".scroll, pre, svg")
      && n.getBoundingClientRect().right > 380.5).map((n) => n.outerHTML.slice(0, 80)),
    asked: frame.contentWindow.performance.getEntriesByType("resource").length,
    readout: svg.closest("figure").querySelector(".readout").textContent,
  }});
}};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: the page is not looked at in a browser")
def test_in_a_browser_the_page_fits_a_phone_and_is_silent(real: Path, tmp_path: Path) -> None:
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(page=html.escape((real / "report.html").read_text())))
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--enable-logging=stderr", "--virtual-time-budget=3000",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
    ]  # fmt: skip
    done = subprocess.run(
        [str(CHROMIUM), *flags, probe.as_uri()], capture_output=True, text=True, timeout=90, check=True
    )
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None
    found = json.loads(html.unescape(title[1]))
    assert found["inside"] == 380
    assert found["needed"] <= 380, found["wide"]
    assert found["wide"] == []
    assert found["asked"] == 0
    assert re.fullmatch(r"round 4: [\d.]+ %", found["readout"])


def test_the_page_says_when_the_server_saw_only_sums(tmp_path: Path) -> None:
    plain = " ".join(page(write(tmp_path / "plain", FINISHED)).text.split())
    assert "so secure aggregation can run underneath" in plain
    p = page(write(tmp_path / "secure", FINISHED, secure={"name": "secure_sum", "bits": 20}))
    text = " ".join(p.text.split())
    assert "a sum under masks: the server saw no single update" in text
    assert "the sum of a cohort's updates and who took part" in text
    assert "each site's update" not in text
    assert p.row("secure aggregation") == ["SecureSum(bits=20)", "differs"]
