"""Write the tables of ``benchmarks/README.md`` from the latest records, one per set of models and arms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ratios import ARMS, MODELS, ratios, spread

HERE = Path(__file__).resolve().parent
START, END = "<!-- tables: python benchmarks/report.py -->", "<!-- end -->"


def main() -> None:
    latest: dict[tuple[str, ...], tuple[dict[str, Any], str]] = {}
    for path in sorted((HERE / "results").glob("*.json")):  # names carry the date
        record = json.loads(path.read_text())
        runs = record.get("runs", [])
        covers = sorted({run["model"] for run in runs}) + sorted({run["arm"] for run in runs})
        latest[path.name.split("-")[0], *covers] = record, path.name
    tables = {"simulation": simulation, "combine": combine, "load": load, "deployment": deployment}
    text = "\n\n".join(tables[key[0]](*found) for key, found in sorted(latest.items()) if key[0] in tables)
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{START}\n{text or 'No record yet.'}\n{END}{after}")


def where(record: dict[str, Any], name: str) -> str:
    m = record["machine"]
    state = " with uncommitted changes" if m["uncommitted"] else ""
    packages = ", ".join(f"{k} {v}" for k, v in m["packages"].items())
    return (
        f"Record `results/{name}`: {m['date']}, commit {m['commit']}{state}, {m['processor']}, {m['cores']} cores, "
        f"{m['memory_gib']} GiB, Python {m['python']}, {packages}."
    )


def simulation(record: dict[str, Any], name: str) -> str:
    runs = record["runs"]
    rows = [
        "| model | arm | ms a round | against | wall ratio [min-max] | processor ratio | first round, s | start, s "
        "| peak MB | accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    by = {(r["model"], r["arm"]): r for r in ratios(runs)}
    for model in MODELS:
        for arm in ARMS:
            good = [r for r in runs if r["model"] == model and r["arm"] == arm and "error" not in r]
            timed = [r for r in good if not r["memory_run"]]
            if not timed or (model, arm) not in by:
                continue
            mid = {k: spread([r[k] for r in timed])[0] for k in ("round_s", "first_round_s", "start_up_s")}
            wall, cpu = by[model, arm]["wall"], by[model, arm]["cpu"]
            peak = next((str(r["peak_mb"]) for r in good if "peak_mb" in r), "")
            accuracy = spread([r["accuracy"] for r in timed])[0]
            note = " (weights differ)" if any(r.get("disagrees") for r in good) else ""
            rows.append(
                f"| {model} | {arm} | {mid['round_s'] * 1e3:.1f} | {by[model, arm]['base']} | "
                f"{wall[0]:.2f} [{wall[1]:.2f}-{wall[2]:.2f}] | {cpu[0]:.2f} | {mid['first_round_s']:.2f} | "
                f"{mid['start_up_s']:.2f} | {peak} | {accuracy:.4f}{note} |"
            )
    about = f"{record['repetitions']} repetitions of {record['rounds']} rounds after a warm-up. {where(record, name)}"
    return "\n".join(["### A round of federated averaging", "", about, "", *rows, *against_flower(runs)])


def against_flower(runs: list[dict[str, Any]]) -> list[str]:
    """How many of an arm's rounds fit into one of Flower's, within a repetition."""
    timed = {(r["model"], r["repetition"], r["arm"]): r for r in runs if "error" not in r and not r["memory_run"]}
    out = []
    for model in MODELS:
        for arm in ("products alone", "inline", "products alone, pool", "pool"):
            times = [
                timed[m, i, "flower"]["round_s"] / r["round_s"]
                for (m, i, a), r in timed.items()
                if m == model and a == arm and (m, i, "flower") in timed
            ]
            if times:
                mid, least, most = spread(times)
                out.append(f"{model}, {arm} {mid:.1f} [{least:.1f}-{most:.1f}]")
    return ["", "Rounds in the time of one of Flower's: " + "; ".join(out) + "."] if out else []


def combine(record: dict[str, Any], name: str) -> str:
    return "\n".join(
        [
            "### Combining replies",
            "",
            f"{record['replies']:,} encoded replies of {record['model_mb']:.0f} MB: {record['seconds']:.1f} s, "
            f"{record['cpu_ratio']:.2f} times the processor time of plain additions; peak memory grew by "
            f"{record['grown_models']:.1f} models. {where(record, name)}",
        ]
    )


def load(record: dict[str, Any], name: str) -> str:
    rows = [
        "| backend | ms a round [min-max] | sites a second | first result, s [min-max] | peak MB |",
        "|---|---|---|---|---|",
    ]
    for arm in sorted({r["arm"] for r in record["runs"]}):
        good = [r for r in record["runs"] if r["arm"] == arm and "error" not in r]
        timed = [r for r in good if "round_s" in r]
        if timed:
            each = spread([r["round_s"] * 1e3 for r in timed])
            first = spread([r["first_result_s"] for r in timed])
            peak = max((r["peak_mb"] for r in good if "peak_mb" in r), default="")
            rows.append(
                f"| {arm} | {each[0]:.0f} [{each[1]:.0f}-{each[2]:.0f}] | {record['per_round'] / each[0] * 1e3:,.0f} | "
                f"{first[0]:.2f} [{first[1]:.2f}-{first[2]:.2f}] | {peak} |"
            )
    busy = spread([r["load"] for r in record["runs"] if "load" in r])
    bits = "the same weights to the bit" if record["same_weights"] else "weights that DIFFER"
    about = (
        f"{record['sites']:,} sites, {record['per_round']:,} a round, {record['rounds']} rounds after the first, "
        f"{record['repetitions']} repetitions; all ended with {bits}. The machine's load average was {busy[0]:.1f} "
        f"[{busy[1]:.1f}-{busy[2]:.1f}]. {where(record, name)}"
    )
    return "\n".join(["### Many sites on every backend", "", about, "", *rows])


def deployment(record: dict[str, Any], name: str) -> str:
    runs = [r for r in record["runs"] if "error" not in r]
    arms = sorted({r["arm"] for r in runs}, key=lambda a: (a.split("-")[0], [float(x) for x in a.split("-")[1:]]))
    by = {arm: [r for r in runs if r["arm"] == arm] for arm in arms}
    rounds = ["| arm | s a round [min-max] | peak MB of all processes |", "|---|---|---|"]
    crowds = [
        "| connections | s a round [min-max] | request to answer, s: median, 95% | SuperLink: peak MB, processors "
        "| server: peak MB, processors |",
        "|---|---|---|---|---|",
    ]
    for arm in arms:
        each, first = spread([s for r in by[arm] for s in r["rounds_s"]]), by[arm][0]
        kind, sites, *_ = arm.split("-")
        took = f"{each[0]:.2f} [{each[1]:.2f}-{each[2]:.2f}]"
        if kind == "crowd":
            crowds.append(
                f"| {sites} | {took} | {first['latency_s']:.1f}, {first['latency_95_s']:.1f} | "
                f"{first['superlink_peak_mb']}, {first['superlink_cpu']:.2f} | {first['server_peak_mb']}, "
                f"{first['server_cpu']:.2f} |"
            )
        else:
            rounds.append(f"| {named(arm)} | {took} | {max(r['peak_mb'] for r in by[arm])} |")
    ways = {arm: by[arm][0]["steps_s"] for arm in arms if "steps_s" in by[arm][0]}
    steps = []
    if ways:
        steps = ["| step, ms | " + " | ".join(map(named, ways)) + " |", "|---" * (1 + len(ways)) + "|"]
        for step in next(iter(ways.values())):
            steps.append(f"| {step} | " + " | ".join(f"{w.get(step, 0) * 1e3:.0f}" for w in ways.values()) + " |")
    busy = spread([r["load"] for r in record["runs"]])
    about = (
        f"{record['rounds']} rounds after the first, {record['repetitions']} repetitions, {record['parameters']:,} "
        f"parameters (digits and 2,410 where many connections share a process), {record['rows']:,} rows a site. Steps "
        f"are medians over sites and rounds. The machine's load average before each arm was {busy[0]:.1f} "
        f"[{busy[1]:.1f}-{busy[2]:.1f}]. {where(record, name)}"
    )
    parts = [p for p in (rounds, steps, crowds) if len(p) > 2]
    return "\n\n".join(["### A round of a real deployment", about, *("\n".join(p) for p in parts)])


def named(arm: str) -> str:
    sites, *pace = arm.split("-")[1:]
    return f"{sites} sites, pace {pace[0]} s" if pace else f"{sites} sites, stock Flower"


if __name__ == "__main__":
    main()
