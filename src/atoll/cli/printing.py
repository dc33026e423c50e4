"""What the commands print, for people."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atoll.recipes.plan import Plan


def print_plan(p: Plan, here: bool = True) -> None:
    from atoll.recipes import words

    about = "" if p.exact else f" (from the first {p.foreseen} rounds)"
    print(f"plan    {p.rounds} rounds, {p.per_round} of {p.sites} sites in each, {p.parameters:,} parameters{about}")
    up, down = words.size(p.up_bytes), words.size(p.down_bytes)
    inner = f", {words.size(p.relayed_bytes)} between aggregators" if p.relayed_bytes else ""
    print(f"        {'at most ' if p.at_most else ''}{up} up, {down} down{inner}; {p.flops:.3g} FLOPs at the sites")
    if here:
        print(f"        about {p.seconds:.1f} s and {words.size(p.memory_bytes)} of memory on this machine")
    if p.epsilon is not None:
        print(f"        privacy: epsilon {p.epsilon:.3g} at delta {p.delta:.3g}, per {p.privacy_unit}")
    for why in p.refused:
        print(f"        will be refused: {why}")


def print_making(p: dict[str, Any]) -> None:
    steps = "as many steps as its budget pays for" if p["steps"] is None else f"{p['steps']:,} steps"
    print(f"plan    {p['method']}: {steps}, {p['parameters']:,} parameters in the teacher")
    work = "work depends on the teacher's samples" if p["flops"] is None else f"{p['flops']:.3g} FLOPs"
    print(f"        {work}; no byte of any site")


def print_summary(s: dict[str, Any]) -> None:
    from atoll.recipes import words

    whose = "personal models, mean over sites" if s["personal"] else "global model"
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in s["metrics"].items())
    if not s.get("replies", 1):
        print(f"nothing was learned: all {s['refused']} replies were refused (the report says why)")
    print(f"done    {s['rounds']} rounds in {s['seconds']:.1f} s; {whose}: {metrics}")
    inner = f", {words.size(s['relayed_bytes'])} between aggregators" if s.get("relayed_bytes") else ""
    up, down = words.size(s["up_bytes"]), words.size(s["down_bytes"])
    print(f"        {up} up, {down} down{inner}; {s['refused']} replies refused")
    if s["epsilon"] is not None:
        unit = s.get("privacy_unit", "site")
        print(f"        privacy spent: epsilon {s['epsilon']:.3g} at delta {s['delta']:.3g}, per {unit}")


def print_made(s: dict[str, Any]) -> None:
    from atoll.recipes.words import calls

    for j in s["judged"]:
        m = j["metrics"]
        quality = f"distance {m['fid']:.3g}, class agreement {m['agreement']:.1%}, " if m.get("fid") is not None else ""
        print(f"        {j['way']}: {calls(j['calls'])}, {quality}{m['cpu_seconds_per_1000']:.2g} s for 1,000")
    print(f"        {s['steps']:,} steps, {s['cpu_seconds']:.1f} s of processor time")


def print_card(row: dict[str, Any]) -> None:
    print(f"{row['name']} ({row['area']}): {row['summary']}")
    for source in row["source"]:
        print(f"  {source}")
    for name, p in row["parameters"].items():
        default = "" if p["required"] else f" = {json.dumps(p['default'])}"
        print(f"  {name}: {p['type']}{default}" + (f"  # {p['help']}" if p["help"] else ""))
    for name, value in row["card"].items():
        if value not in ("", None, [], False) and name not in ("name", "area", "summary", "cites"):
            print(f"  {name.replace('_', ' ')}: {', '.join(value) if isinstance(value, list | tuple) else value}")
    for c in row["claims"]:
        print(f"  claim {c['claim']}: {c['expect']}: {c['verdict']}")


def print_table(head: list[str], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
