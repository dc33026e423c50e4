"""Commands of real federations: keys, the server, a site."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from atoll.cli.app import Changes, Json, Trust, app, trusting
from atoll.cli.following import free, go, stop_on_term
from atoll.cli.printing import print_plan


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
    trusting(trust)
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
        ready = begun(chosen, out or free(Path("runs") / chosen.name), options, say)
    stop_on_term()
    try:
        run, foreseen = ready.open()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if not as_json:
        print_plan(foreseen, here=False)
    go(run, as_json, f"atoll server {ready.folder}")


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
    trusting(trust)
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
