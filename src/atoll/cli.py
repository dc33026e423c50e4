"""The ``atoll`` command: a thin face. Heavy imports happen inside the commands, so that help answers at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from atoll.federated.ledger import Row
    from atoll.recipes.pipeline import StageRun
    from atoll.recipes.plan import Plan

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


# ------------------------------------------------------------------------------------------- runs


@app.command()
def run(
    recipe: Reference,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<name>.")] = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Run a recipe: plan, train across sites, report, and a model to load."""
    _trust(trust)
    from atoll.recipes.pipeline import load_any, start_stages
    from atoll.recipes.recipe import Recipe
    from atoll.recipes.run import start

    _stop_on_term()
    chosen = load_any(recipe, changes or [])
    if not isinstance(chosen, Recipe):
        _go_stages(start_stages(chosen, out or _free(Path("runs") / chosen.name)), as_json)
        return
    begun, foreseen = start(chosen, out or _free(Path("runs") / chosen.name))
    if not as_json:
        _print_plan(foreseen)
    _go(begun, as_json)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="A run directory.")],
    recipe: PythonRecipe = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Go on with a run that was stopped or killed, from its last completed round."""
    _trust(trust)
    from atoll.core.errors import RunError
    from atoll.recipes.pipeline import reopen_stages
    from atoll.recipes.recipe import load_recipe
    from atoll.recipes.run import finished, reopen

    if (folder / "federation.json").exists():
        raise RunError(f"{folder} is the run of a server; `atoll server {folder}` goes on with it.")
    stages = reopen_stages(folder) if recipe is None else None
    if stages is not None:
        _stop_on_term()
        _go_stages(stages, as_json)
        return
    done = finished(folder)
    if done is not None:
        print(json.dumps(done) if as_json else f"{folder} is finished already: {folder / 'report.html'}")
        return
    _go(reopen(folder, load_recipe(recipe) if recipe else None), as_json)


@app.command()
def plan(recipe: Reference, changes: Changes = None, trust: Trust = None, as_json: Json = False) -> None:
    """Foresee bytes, FLOPs, memory, privacy and time; start nothing."""
    _trust(trust)
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
        _print_plan(p) if hasattr(p, "as_dict") else _print_making(p)


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
            _show_stages(stages, as_json)
        else:
            _show_run(folder, finished(folder), as_json)
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
    _trust(trust)
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


# ------------------------------------------------------------------------------------------- federations


@app.command()
def certify(
    hosts: Annotated[list[str] | None, typer.Option("--host", help="Name or address of the server; repeat it.")] = None,
    site: Annotated[str | None, typer.Option(help="Make the key pair of the site with this name instead.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default certificates, or . for a site.")] = None,
    days: Annotated[int, typer.Option(min=1, max=36500, help="How long the server's certificate is good.")] = 365,
) -> None:
    """Make the server's certificate (--host), or a site's key pair (--site)."""
    from atoll.core.errors import RunError
    from atoll.deploy.keys import AUTHORITY, make_certificates, make_site_key

    if bool(hosts) == bool(site):
        raise RunError("Give --host NAME for the server's certificate, or --site NAME for a site's key pair.")
    if site:
        folder = out or Path()
        public = make_site_key(folder / f"{site}.key")
        print(f"{folder / f'{site}.key'}  stays here, readable by you alone")
        print(f"{public}  goes to the operator of the server, into the folder of the sites' keys")
        return
    folder = out or Path("certificates")
    make_certificates(folder, hosts or [], days)
    print(f"{folder / AUTHORITY}  goes to every site; the other two files stay here")


@app.command()
def server(
    recipe: Annotated[str, typer.Argument(help="A recipe, or the run directory of a server to go on with.")],
    sites: Annotated[Path, typer.Option(help="Folder with the sites' public keys, <name>.pub.")] = Path("sites"),
    certificates: Annotated[Path, typer.Option(help="Folder that `atoll certify` made.")] = Path("certificates"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 9443,
    data: Annotated[str | None, typer.Option(help="The server's own rows: common test rows and public ones.")] = None,
    rehearse: Annotated[bool, typer.Option(help="The sites share the recipe's own bundled data.")] = False,
    patience: Annotated[float, typer.Option(min=1, help="Seconds that a round waits for a site that is away.")] = 600,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<name>.")] = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Serve a recipe to real sites, each of which runs `atoll join`."""
    _trust(trust)
    from atoll.deploy.server import Options, begun, resumed
    from atoll.recipes.recipe import load_recipe

    options = Options(
        host=host, port=port, certificates=certificates, sites=sites, data=data, rehearse=rehearse, patience=patience
    )

    def say(text: str) -> None:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    if Path(recipe).is_dir():
        ready = resumed(Path(recipe), options, say)
    else:
        chosen = load_recipe(recipe, changes or [])
        ready = begun(chosen, out or _free(Path("runs") / chosen.name), options, say)
    _stop_on_term()
    try:
        run, foreseen = ready.open()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if not as_json:
        _print_plan(foreseen, here=False)
    _go(run, as_json, f"atoll server {ready.folder}")


@app.command()
def join(
    address: Annotated[str, typer.Option("--server", help="host:port of the server.")] = "",
    certificate: Annotated[Path, typer.Option(help="The federation's ca.pem.")] = Path("ca.pem"),
    key: Annotated[Path | None, typer.Option(help="This site's private key.")] = None,
    data: Annotated[
        str | None, typer.Option(help="This site's rows: a file or folder, or a .yaml file that describes a source.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="This site's rules.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for what the site must remember.")] = Path("site"),
    rehearse: Annotated[bool, typer.Option(help="Take a share of the recipe's own bundled data.")] = False,
    dry_run: Annotated[str | None, typer.Option(help="Show what this recipe would send, and join nothing.")] = None,
    sites: Annotated[int, typer.Option(min=1, help="With --dry-run: how many sites take part.")] = 10,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, max=256)] = 1,
    pace: Annotated[float, typer.Option(min=0.05, help="Seconds between questions for work.")] = 0.5,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Take part in a federation with the rows of this site, within its rules."""
    _trust(trust)
    from atoll.core.errors import RunError
    from atoll.deploy.guard import make_guard
    from atoll.deploy.join import Connection
    from atoll.deploy.join import join as take_part
    from atoll.deploy.site import SiteProgram, read_place

    place = read_place(data, rehearse)
    guard = make_guard(policy, out)
    if dry_run is not None:
        from atoll.deploy.dry_run import would_send

        found = would_send(dry_run, place, guard, sites)
        print(json.dumps(found.as_dict(), indent=2) if as_json else found)
        raise typer.Exit(0 if found.refusal is None else 2)
    if not address or key is None:
        raise RunError("`atoll join` needs --server HOST:PORT and --key FILE (`atoll certify --site NAME` makes one).")
    connection = Connection(server=address, certificate=certificate, key=key, pace=pace)
    take_part(SiteProgram(out, place, guard, device, threads), connection, out, lambda text: print(text, flush=True))


# ------------------------------------------------------------------------------------------- listings


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
        _print_card(rows[0])
    else:
        _table(["name", "area", "what it does", "claims"], [
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


@data_app.command("show")
def data_show(
    recipe: Reference,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="Write the picture here (SVG).")] = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Show which rows lie at which site: a table here, and a picture with --out."""
    _trust(trust)
    from atoll.data.picture import partition_svg, partition_text
    from atoll.recipes.recipe import load_recipe

    federation = load_recipe(recipe, changes or []).federation()
    if out is not None:
        _write(out, partition_svg(federation))
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


# ------------------------------------------------------------------------------------------- printing


def _trust(prefixes: list[str] | None) -> None:
    if prefixes:
        from atoll.core.imports import trust

        trust(*prefixes)


def _write(path: Path, text: str) -> None:
    from atoll.core.errors import RunError
    from atoll.core.files import write_atomic

    if path.is_dir():
        raise RunError(f"{path} is a folder; give the name of a file to write.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode(), durable=False)
    except OSError as e:
        raise RunError(f"{path} cannot be written ({e.strerror}).") from e


def _free(folder: Path) -> Path:
    """``folder``, or the first of folder-2, folder-3, ... that holds no run yet."""
    candidate, n = folder, 2
    while (candidate / "recipe.yaml").exists():
        candidate, n = folder.with_name(f"{folder.name}-{n}"), n + 1
    return candidate


def _stop_on_term() -> None:
    """A polite request to end is answered like Ctrl-C."""
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _go(begun: Any, as_json: bool, again: str = "") -> None:
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
    _print_summary(summary)
    print(f"model   {begun.folder / 'model'}")
    print(f"report  {page}")


def _go_stages(begun: StageRun, as_json: bool) -> None:
    def say(name: str, what: Any) -> None:
        if as_json:
            return
        if isinstance(what, dict):
            _print_made(what) if "judged" in what else _print_summary(what)
        else:
            print(f"{name}:" if name else "")
            _print_plan(what) if hasattr(what, "round_bytes") else None

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


def _show_stages(stages: StageRun, as_json: bool) -> None:
    found = stages.finished()
    if as_json:
        print(json.dumps(found))
        return
    for name, summary in found.items():
        print(f"{name or stages.folder}: " + ("not finished" if summary is None else ""))
        if summary is not None:
            _print_made(summary) if "judged" in summary else _print_summary(summary)
    if None in found.values():
        print(f"`atoll resume {stages.folder}` goes on")
    print(f"report  {stages.folder / 'report.html'}")


def _print_making(p: dict[str, Any]) -> None:
    steps = "as many steps as its budget pays for" if p["steps"] is None else f"{p['steps']:,} steps"
    print(f"plan    {p['method']}: {steps}, {p['parameters']:,} parameters in the teacher")
    work = "work depends on the teacher's samples" if p["flops"] is None else f"{p['flops']:.3g} FLOPs"
    print(f"        {work}; no byte of any site")


def _print_made(s: dict[str, Any]) -> None:
    for j in s["judged"]:
        m = j["metrics"]
        quality = f"distance {m['fid']:.3g}, class agreement {m['agreement']:.1%}, " if m.get("fid") is not None else ""
        print(f"        {j['way']}: {j['calls']} calls, {quality}{m['cpu_seconds_per_1000']:.2g} s for 1,000")
    print(f"        {s['steps']:,} steps, {s['cpu_seconds']:.1f} s of processor time")


def _print_plan(p: Plan, here: bool = True) -> None:
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


def _print_summary(s: dict[str, Any]) -> None:
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


def _show_run(folder: Path, summary: dict[str, Any] | None, as_json: bool) -> None:
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
        _print_summary(summary)
        print(f"report  {folder / 'report.html'}")


def _print_card(row: dict[str, Any]) -> None:
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


def _table(head: list[str], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
