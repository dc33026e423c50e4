"""A run in the terminal: its progress, its end, what is said of it afterwards."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from atoll.cli.printing import print_made, print_plan, print_summary

if TYPE_CHECKING:
    from atoll.federated.ledger import Row
    from atoll.recipes.pipeline import StageRun


def free(folder: Path) -> Path:
    """``folder``, or the first of folder-2, folder-3, ... that holds no run yet."""
    candidate, n = folder, 2
    while (candidate / "recipe.yaml").exists():
        candidate, n = folder.with_name(f"{folder.name}-{n}"), n + 1
    return candidate


def stop_on_term() -> None:
    """A polite request to end is answered like Ctrl-C."""
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)


def go(begun: Any, as_json: bool, again: str = "") -> None:
    from atoll.data.picture import partition_svg
    from atoll.recipes.report import write_report

    names = begun.prepared.setup.federation.labels.get("site_names")

    def line(row: Row) -> None:
        if row.refused or row.notes:
            said = [f"{names[s] if names else f'site {s}'}: {why}" for s, why in row.refused.items()] + row.notes
            print(f"round {row.round}: " + "; ".join(said[:3]) + (" ..." if len(said) > 3 else ""), file=sys.stderr)

    try:
        summary = begun.go(line)
    except KeyboardInterrupt:
        print(
            f"stopped; `{again or f'atoll resume {begun.folder}'}` goes on from the last completed round",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    page = write_report(begun.folder, partition_svg(begun.prepared.setup.federation))
    if as_json:
        print(json.dumps({**summary, "report": str(page), "model": str(begun.folder / "model")}))
        return
    print_summary(summary)
    print(f"model   {begun.folder / 'model'}")
    print(f"report  {page}")


def go_stages(begun: StageRun, as_json: bool) -> None:
    def say(name: str, what: Any) -> None:
        if as_json:
            return
        if isinstance(what, dict):
            print_made(what) if "judged" in what else print_summary(what)
        else:
            print(f"{name}:" if name else "")
            print_plan(what) if hasattr(what, "round_bytes") else None

    try:
        summary = begun.go(say)
    except KeyboardInterrupt:
        print(f"stopped; `atoll resume {begun.folder}` goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    page = begun.folder / "report.html"
    if as_json:
        print(json.dumps({**summary, "report": str(page)}))
        return
    print(f"models  {', '.join(str(p) for p in begun.models())}")
    print(f"report  {page}")


def show_stages(stages: StageRun, as_json: bool) -> None:
    found = stages.finished()
    if as_json:
        print(json.dumps(found))
        return
    for name, summary in found.items():
        print(f"{name or stages.folder}: " + ("not finished" if summary is None else ""))
        if summary is not None:
            print_made(summary) if "judged" in summary else print_summary(summary)
    if None in found.values():
        print(f"`atoll resume {stages.folder}` goes on")
    print(f"report  {stages.folder / 'report.html'}")


def show_run(folder: Path, summary: dict[str, Any] | None, as_json: bool) -> None:
    from atoll.core.errors import RunError
    from atoll.recipes.run import read_events

    if not (folder / "recipe.yaml").exists():
        raise RunError(f"{folder} holds no run (there is no recipe.yaml in it).")
    if summary is None:
        rounds = sum(e["event"] == "round" for e in read_events(folder))
        if as_json:
            print(json.dumps({"event": "unfinished", "rounds": rounds}))
        else:
            again = "server" if (folder / "federation.json").exists() else "resume"
            print(f"{folder}: {rounds} rounds done, not finished; `atoll {again} {folder}` goes on")
    elif as_json:
        print(json.dumps(summary))
    else:
        print_summary(summary)
        print(f"report  {folder / 'report.html'}")
