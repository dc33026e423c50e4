"""Commands that run recipes, go on with them, and show what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from atoll.cli.app import Changes, Json, PythonRecipe, Reference, Trust, app, trusting
from atoll.cli.following import free, go, go_stages, show_run, show_stages, stop_on_term
from atoll.cli.printing import print_making, print_plan


@app.command()
def run(
    recipe: Reference,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<name>.")] = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Run a recipe: plan, train across sites, report, and a model to load."""
    trusting(trust)
    from atoll.recipes.pipeline import load_any, start_stages
    from atoll.recipes.recipe import Recipe
    from atoll.recipes.run import start

    stop_on_term()
    chosen = load_any(recipe, changes or [])
    if not isinstance(chosen, Recipe):
        go_stages(start_stages(chosen, out or free(Path("runs") / chosen.name)), as_json)
        return
    begun, foreseen = start(chosen, out or free(Path("runs") / chosen.name))
    if not as_json:
        print_plan(foreseen)
    go(begun, as_json)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="A run directory.")],
    recipe: PythonRecipe = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Go on with a run that was stopped or killed, from its last completed round."""
    trusting(trust)
    from atoll.core.errors import RunError
    from atoll.recipes.pipeline import reopen_stages
    from atoll.recipes.recipe import load_recipe
    from atoll.recipes.run import finished, reopen

    if (folder / "federation.json").exists():
        raise RunError(f"{folder} is the run of a server; `atoll server {folder}` goes on with it.")
    stages = reopen_stages(folder) if recipe is None else None
    if stages is not None:
        stop_on_term()
        go_stages(stages, as_json)
        return
    done = finished(folder)
    if done is not None:
        print(json.dumps(done) if as_json else f"{folder} is finished already: {folder / 'report.html'}")
        return
    go(reopen(folder, load_recipe(recipe) if recipe else None), as_json)


@app.command()
def plan(recipe: Reference, changes: Changes = None, trust: Trust = None, as_json: Json = False) -> None:
    """Foresee bytes, FLOPs, memory, privacy and time; start nothing."""
    trusting(trust)
    from atoll.recipes.pipeline import foreseen as foresee
    from atoll.recipes.pipeline import load_any

    found = foresee(load_any(recipe, changes or []))
    if as_json:
        plans = {name: p.as_dict() if hasattr(p, "as_dict") else p for name, p in found.items()}
        print(json.dumps(plans.get("", plans), indent=2))
        return
    for name, p in found.items():
        if name:
            print(f"{name}:")
        print_plan(p) if hasattr(p, "as_dict") else print_making(p)


@app.command()
def show(what: Annotated[str, typer.Argument(help="A run directory or a recipe.")], as_json: Json = False) -> None:
    """Show a run's outcome, or a recipe with every default spelled out."""
    from atoll.recipes.pipeline import as_config, as_yaml, load_any, reopen_stages
    from atoll.recipes.recipe import Recipe, recipe_config, recipe_yaml
    from atoll.recipes.run import finished

    folder = Path(what)
    if folder.is_dir():
        stages = reopen_stages(folder)
        if stages is not None:
            show_stages(stages, as_json)
        else:
            show_run(folder, finished(folder), as_json)
        return
    chosen = load_any(what)
    if not isinstance(chosen, Recipe):
        print(json.dumps(as_config(chosen), indent=2) if as_json else as_yaml(chosen), end="\n" if as_json else "")
        return
    print(json.dumps(recipe_config(chosen), indent=2) if as_json else recipe_yaml(chosen), end="\n" if as_json else "")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run directory.")], recipe: PythonRecipe = None, trust: Trust = None
) -> None:
    """Write the report of a run again (also of one that is still going)."""
    trusting(trust)
    from atoll.data.picture import partition_svg
    from atoll.recipes.pipeline import reopen_stages
    from atoll.recipes.recipe import load_recipe
    from atoll.recipes.report import write_report
    from atoll.recipes.run import reopen

    stages = reopen_stages(folder) if recipe is None else None
    if stages is not None:
        print(stages.report())
        return
    if (folder / "federation.json").exists():
        from atoll.deploy.server import served

        federation = served(folder)
    else:
        federation = reopen(folder, load_recipe(recipe) if recipe else None).prepared.setup.federation
    print(write_report(folder, partition_svg(federation)))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, generated from the builders' signatures."""
    from atoll.recipes.pipeline import whole_schema

    print(json.dumps(whole_schema(), indent=1))
