"""Commands that list what there is: methods, papers, data, claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from atoll.cli.app import Changes, Json, Reference, Trust, app, claim_app, data_app, trusting
from atoll.cli.printing import print_card, print_table


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one of them in full.")] = None,
    area: Annotated[str | None, typer.Option(help="Only this area, e.g. codec.")] = None,
    as_json: Json = False,
) -> None:
    """List what is implemented: methods, codecs, combiners, partitioners, and their recorded verdicts."""
    from atoll.claims.catalogue import catalogue
    from atoll.core.errors import RecipeError, did_you_mean

    rows = catalogue()
    areas = {r["area"] for r in rows}
    if area is not None and area not in areas:
        raise RecipeError([f"there is no area `{area}`.{did_you_mean(area, areas)}"], "methods")
    rows = [r for r in rows if area is None or r["area"] == area]
    if name is not None:
        chosen = [r for r in rows if r["name"] == name]
        if not chosen:
            raise RecipeError([f"there is no `{name}`.{did_you_mean(name, [r['name'] for r in rows])}"], "methods")
        rows = chosen
    if as_json:
        print(json.dumps(rows, indent=2))
    elif name is not None:
        print_card(rows[0])
    else:
        print_table(["name", "area", "what it does", "claims"], [
            [r["name"], r["area"], r["summary"], ", ".join(c["verdict"] for c in r["claims"])] for r in rows
        ])  # fmt: skip


@app.command()
def cite(recipe: Reference, changes: Changes = None, bibtex: bool = False, as_json: Json = False) -> None:
    """Print the papers of exactly the parts that a recipe uses."""
    from dataclasses import asdict

    from atoll.claims.catalogue import cites_of
    from atoll.recipes.pipeline import load_any

    found = cites_of(load_any(recipe, changes or []))
    if as_json:
        print(json.dumps([{"part": part, **asdict(c)} for part, c in found], indent=2))
    else:
        for part, c in found:
            print(c.bibtex() if bibtex else f"{part}: {c}")


@app.command()
def draw(
    folder: Annotated[Path, typer.Argument(help="The directory of a distillation, or its model folder.")],
    out: Annotated[Path, typer.Option(help="Picture to write (PNG).")] = Path("samples.png"),
    per_class: Annotated[int, typer.Option(min=1, max=1000, help="Samples of each class.")] = 2,
    calls: Annotated[
        int | None, typer.Option(min=1, help="Calls a sample; default: the fewest it is made for.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    teacher: Annotated[Path | None, typer.Option(help="Of an adapter: the model that it adapts.")] = None,
) -> None:
    """Draw samples of a generator that a run has made."""
    import torch

    from atoll.core.errors import DataError
    from atoll.diffusion.diffusers_model import load_denoiser
    from atoll.diffusion.student import load_student
    from atoll.recipes.png import grid, png

    place = folder / "model" if (folder / "model").is_dir() else folder
    student = load_student(place, load_denoiser(teacher) if teacher is not None else None)
    if student.classes is None:
        raise DataError("This generator is told texts; draw from it in Python with their embeddings (`load_student`).")
    cond = torch.arange(student.classes).repeat(per_class)
    pixels = student.pixels(student.draw(cond, calls, seed))
    larger = max(1, 56 // pixels.shape[2])  # small ones can be looked at
    write_bytes(out, png(grid(pixels.repeat(larger, 1).repeat(larger, 2), student.classes)))
    print(f"picture: {out} ({len(pixels)} samples, a column for each class)")


@data_app.command("show")
def data_show(
    recipe: Reference,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="Write the picture here (SVG).")] = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Show which rows lie at which site: a table here, and a picture with --out."""
    trusting(trust)
    from atoll.data.picture import partition_svg, partition_text
    from atoll.recipes.recipe import load_recipe

    federation = load_recipe(recipe, changes or []).federation()
    if out is not None:
        write_bytes(out, partition_svg(federation).encode())
    if as_json:
        rows = [{part: len(getattr(s, part)) for part in ("train", "validation", "test")} for s in federation.sites]
        print(json.dumps({**federation.labels, "rows": rows, "common_test": len(federation.test)}, default=str))
    else:
        print(partition_text(federation))
        if out is not None:
            print(f"picture: {out}")


@claim_app.command("run")
def claim_run(
    names: Annotated[list[str] | None, typer.Argument(help="Claims to run; none runs those without a record.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder with the claim files.")] = Path("claims"),
    as_json: Json = False,
) -> None:
    """Run claims and record the outcome with seeds, versions and machine."""
    from atoll.claims.run import run_claims

    done = []
    for record in run_claims(folder, names or []):
        done.append(record)
        if not as_json:
            print(f"{record['name']}: " + "; ".join(f"{c['expect']}: {c['verdict']}" for c in record["comparisons"]))
    if as_json:
        print(json.dumps(done, indent=2))
    elif not done:
        print(f"Every claim in {folder} has a record; name one to run it again.")


@claim_app.command("table")
def claim_table(
    folder: Annotated[Path, typer.Option(help="Folder with the claim files.")] = Path("claims"),
    docs: Annotated[Path, typer.Option(help="Folder to write claims.md and methods.md to.")] = Path("docs"),
    as_json: Json = False,
) -> None:
    """Write docs/claims.md and docs/methods.md from the recorded results."""
    from atoll.claims.table import records, write_tables

    if as_json:
        print(json.dumps(records(folder), indent=2))
    else:
        for path in write_tables(folder, docs):
            print(path)


def write_bytes(path: Path, content: bytes) -> None:
    from atoll.core.errors import RunError
    from atoll.core.files import write_atomic

    if path.is_dir():
        raise RunError(f"{path} is a folder; give the name of a file to write.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content, durable=False)
    except OSError as e:
        raise RunError(f"{path} cannot be written ({e.strerror}).") from e
