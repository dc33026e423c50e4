"""The ``atoll`` command: its groups, the options that several commands share, and its last words when something is
wrong. Heavy imports happen inside the commands, so that help answers at once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

app = typer.Typer(
    help="Adapt, distil, compress, protect and serve models across sites whose data cannot move.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Look at data and how it lies at the sites.", no_args_is_help=True)
claim_app = typer.Typer(help="Run recorded comparisons of methods, and show their verdicts.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(claim_app, name="claim")

Reference = Annotated[str, typer.Argument(help="A recipe: file.yaml, or file.py:function.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change a field, e.g. --set method.mu=0.1.")]
PythonRecipe = Annotated[str | None, typer.Option("--recipe", help="The Python recipe, when the run came from one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Trust = Annotated[
    list[str] | None,
    typer.Option("--trust", help="A package that the recipe may import your own model from, e.g. --trust my_models."),
]


def main() -> None:
    """Entry point: a user's mistake ends with its sentence and exit code 2, never with a traceback."""
    from atoll.core.errors import AtollError

    try:
        app()
    except AtollError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as e:
        what = f"{e.filename}: {e.strerror}" if e.filename and e.strerror else str(e)
        print(f"error: {what}; a file or folder cannot be used, or the disk is full", file=sys.stderr)
        raise SystemExit(2) from None
    except MemoryError:
        print("error: not enough memory for this; use fewer sites, a smaller model or fewer workers", file=sys.stderr)
        raise SystemExit(2) from None


def trusting(prefixes: list[str] | None) -> None:
    if prefixes:
        from atoll.core.imports import trust

        trust(*prefixes)
