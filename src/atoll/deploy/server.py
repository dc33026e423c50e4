"""The server of a real federation: it runs the SuperLink, greets the sites, and drives the same engine as any run.

Its run directory holds all that it needs to go on elsewhere: copy the directory, the certificates and the sites'
public keys to another machine and resume there.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoll.core.errors import AtollError, RunError
from atoll.core.files import write_atomic, write_json
from atoll.core.message import Limits, Message
from atoll.data.agreement import Summary, adopted, agree, means, read_summary, settle
from atoll.data.dataset import Dataset, Federation
from atoll.data.federation import hold_out
from atoll.deploy.keys import AUTHORITY, CERTIFICATE, ITSELF, SERVER_KEY, check_server_files, read_public_keys
from atoll.deploy.link import LinkLost, Lost, NodeState, ServerEnd
from atoll.deploy.processes import end_process, last_lines, launch, tail
from atoll.deploy.site import BEGIN, FIRST, HELLO, SECOND, setup_of, stand_in
from atoll.deploy.superlink import TOKEN_VARIABLE
from atoll.deploy.workers import DeployedWorkers, Switchboard
from atoll.federated.check import check_method
from atoll.federated.method import Backend
from atoll.federated.visit import Setup
from atoll.recipes.plan import Plan
from atoll.recipes.recipe import Recipe, load_recipe, recipe_config, recipe_yaml, replace
from atoll.recipes.run import Prepared, Run, plan

START_UP = 60.0  # seconds that a SuperLink may take until it answers
TAKEN = 15.0  # seconds after which a SuperLink that still runs has found its port free
FEDERATION = "federation.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the server is reached, and how long it waits.

    Args:
        host, port: where it listens.
        certificates: folder with ``ca.pem``, ``server.pem`` and ``server.key``.
        sites: folder with the sites' public keys, ``<name>.pub``.
        data: the server's own rows (a path; read as the recipe says): common test rows, and public ones if the recipe
            gives the server a `public` fraction.
        rehearse: the sites share the recipe's own bundled data; to try a deployment out.
        patience: seconds after which a site that is away counts as failed in a round.
    """

    host: str = "0.0.0.0"
    port: int = 9443
    certificates: Path = Path("certificates")
    sites: Path = Path("sites")
    data: str | None = None
    rehearse: bool = False
    patience: float = 600.0


class Supervisor:
    """Keeps a SuperLink running and a connection to it; sites by number instead of nodes by identity."""

    def __init__(self, options: Options, folder: Path, limits: Limits) -> None:
        self.options, self.folder, self.limits = options, folder, limits
        self.keys = read_public_keys(options.sites)
        self.names = list(self.keys)
        certificates = options.certificates
        check_server_files(certificates)
        self._process: subprocess.Popen[bytes] | None = None
        self._token, secret = secrets.token_hex(32), secrets.token_bytes(32)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._secret = folder / "secret"
        write_atomic(self._secret, secret, durable=False)
        self._secret.chmod(0o600)
        self._own = ITSELF if options.host in ("0.0.0.0", "::") else options.host
        authority = (certificates / AUTHORITY).read_bytes()
        self._end = ServerEnd(f"{self._own}:{options.port}", authority, self._token, secret, limits)
        self._node: dict[int, int] = {}

    def start(self) -> None:
        """Start the SuperLink and connect to it."""
        self._launch()
        self._connect()

    def _launch(self) -> None:
        o, c = self.options, self.options.certificates
        command = [
            sys.executable, "-m", "atoll.deploy.superlink", "--host", o.host, "--port", str(o.port),
            "--ssl-certfile", c / CERTIFICATE, "--ssl-keyfile", c / SERVER_KEY, "--ssl-ca-certfile", c / AUTHORITY,
            "--isolation", "process", "--superexec-auth-secret-file", self._secret, "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        ]  # fmt: skip
        self._process = launch(command, self.folder / "superlink.log", {TOKEN_VARIABLE: self._token})

    def _connect(self) -> None:
        """Register the sites and open a run; a SuperLink that dies meanwhile is started again, but not for ever."""
        began, deaths = time.monotonic(), 0
        while True:
            assert self._process is not None
            if self._process.poll() is not None:
                deaths += 1
                if deaths > 3:
                    if "address already in use" in tail(self.folder / "superlink.log"):
                        why = f"Port {self.options.port} is taken. End what listens there, or choose another --port."
                    else:
                        why = f"The SuperLink ends as it starts: {last_lines(self.folder / 'superlink.log')}"
                    raise RunError(why)
                self._launch()
            try:
                nodes = self._end.register(self.keys)
                self._end.open()
                break
            except LinkLost as e:
                waited = time.monotonic() - began
                if "CERTIFICATE_VERIFY_FAILED" in str(e) and not deaths and waited > TAKEN:
                    raise RunError(
                        f"The certificate in {self.options.certificates} is out of date, or does not name {self._own}, "
                        "where the server reaches itself. Make another with `atoll certify`."
                    ) from e
                if waited > START_UP:
                    raise RunError(f"The SuperLink does not answer after {START_UP:.0f} s: {e}") from e
                time.sleep(0.2)
        self._node = {self.names.index(name): node for name, node in nodes.items()}

    # ---------------------------------------------------------------- the link, as the switchboard sees it

    def nodes(self) -> Mapping[int, NodeState]:
        found = self._end.nodes()
        return {site: found[node] for site, node in self._node.items() if node in found}

    def send(self, site: int, message: Message, ttl: float) -> str:
        return self._end.send(self._node[site], message, ttl)

    def take(self, numbers: Sequence[str]) -> Iterator[tuple[str, Message | Lost]]:
        return self._end.take(numbers)

    def beat(self) -> None:
        self._end.beat()

    def mend(self) -> None:
        """After :class:`LinkLost`: a SuperLink that died is started anew. It keeps nothing on disk, which halves the
        time of a round: we register the sites again and send our requests again, and the sites' nodes connect anew."""
        self._connect()

    def close(self) -> None:
        self._end.close()
        if self._process is not None:
            end_process(self._process)
        self._secret.unlink(missing_ok=True)


@dataclass(frozen=True)
class Deployed(Backend):
    """The backend of a federation whose sites have been greeted."""

    board: Switchboard
    run: str

    def open(self, setup: Setup) -> DeployedWorkers:
        return DeployedWorkers(setup, self.board, self.run)


@dataclass(slots=True)
class Server:
    """A server that is being started; ``say`` tells the operator what is going on."""

    recipe: Recipe
    folder: Path
    options: Options
    say: Callable[[str], None] = print
    board: Switchboard = field(init=False)
    supervisor: Supervisor = field(init=False)

    def open(self) -> tuple[Run, Plan]:
        """Start the SuperLink, greet the sites, agree on the data; the run is ready to :meth:`Run.go`."""
        limits = Limits(max_bytes=self.recipe.max_reply_bytes)
        self.supervisor = Supervisor(self.options, self.folder / "state" / "flower", limits)
        try:
            self.supervisor.start()
            self.board = Switchboard(self.supervisor, self.options.patience)
            return self._open()
        except BaseException:
            self.supervisor.close()
            raise

    def _open(self) -> tuple[Run, Plan]:
        names, path = self.supervisor.names, self.folder / FEDERATION
        fresh = not path.exists()
        if fresh:
            run = secrets.token_hex(8)
            agreed, summaries = self._greet(run)
            rows = [s.rows for s in summaries.values()]
        else:
            kept = read_federation(self.folder)
            if kept.names != names:
                raise RunError(
                    f"{path} was made with the sites {', '.join(kept.names)}; {self.options.sites} holds keys of "
                    f"{', '.join(names)}. Put the keys back, or start another run."
                )
            run, agreed, rows = kept.run, kept.agreed, kept.rows
        prepared = self._prepare(Kept(run, names, agreed, rows))
        foreseen = plan(prepared)
        if fresh:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "plan.json", foreseen.as_dict())
            write_atomic(self.folder / "recipe.yaml", recipe_yaml(self.recipe, with_places=True).encode())
            write_json(path, {"run": run, "names": names, "agreed": agreed.facts(), "rows": rows})
        return Run(self.folder, prepared, Deployed(self.board, run)), foreseen

    def _prepare(self, kept: Kept) -> Prepared:
        own: dict[str, Any] = {"labels": labels(kept), **self._own_rows(kept.agreed)}
        setup = kept.setup(self.recipe, **own)
        check_method(setup.method, setup.task, setup.federation)
        return Prepared(self.recipe, setup, len(kept.rows))

    def _own_rows(self, agreed: Summary) -> dict[str, Any]:
        """The server's own rows: common test rows, and public ones."""
        recipe = self.recipe
        if self.options.rehearse:
            federation = recipe.federation()
            found: dict[str, Dataset | None] = {"test": federation.test, "public": federation.public}
        elif self.options.data is not None:
            located = replace(recipe, data=replace_field(recipe.data, "path", self.options.data))
            loaded = located.data.load()
            pool = hold_out(loaded, seed=recipe.seed, public=recipe.public, common_test=0.0, limit=recipe.limit)
            found = {"test": pool.shared, "public": pool.public}
        else:
            return {}
        return {name: adopted(data, agreed) for name, data in found.items() if data is not None}

    # ---------------------------------------------------------------- greeting

    def _greet(self, run: str) -> tuple[Summary, dict[str, Summary]]:
        """Wait for every site, hear about its rows, and agree with all on one description of the data."""
        names = self.supervisor.names
        self._wait_for_all()
        config = recipe_config(self.recipe)
        hello = {"run": run, "sites": len(names), "recipe": config}
        heard = self._ask_all(lambda i: Message(HELLO, {}, {**hello, "site": i}), "summary")
        summaries = {name: read_summary(facts, f"site {name}") for name, facts in heard.items()}
        agreed = agree(summaries)
        if agreed.fit:
            firsts = self._ask_all(lambda _: Message(FIRST, {}, {"run": run, "agreed": agreed.facts()}), "sums")
            mean = means(agreed, firsts)
            seconds = self._ask_all(lambda _: Message(SECOND, {}, {"run": run, "mean": mean}), "sums")
            agreed = settle(agreed, firsts, seconds)
        final = agreed.facts()
        self._ask_all(lambda _: Message(BEGIN, {}, {"run": run, "agreed": final}), None)
        return agreed, summaries

    def _wait_for_all(self) -> None:
        names, told = self.supervisor.names, None
        while True:
            here = self.board.here()
            missing = [n for i, n in enumerate(names) if i not in here]
            if not missing:
                self.say(f"all {len(names)} sites are here")
                return
            if missing != told:
                some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
                self.say(f"waiting for {len(missing)} of {len(names)} sites: {some}")
                told = missing
            time.sleep(0.2)

    def _ask_all(self, request: Callable[[int], Message], wanted: str | None) -> dict[str, Any]:
        """Put a question to every site at once; all must answer."""
        names = self.supervisor.names
        tickets = self.board.call([(i, _always(request(i))) for i in range(len(names))])
        answers = [self.board.wait(t) for t in tickets]
        refused = [f"{n}: {a}" for n, a in zip(names, answers, strict=True) if isinstance(a, str)]
        if refused:
            raise RunError("The federation cannot start, because sites refuse:\n  " + "\n  ".join(refused))
        facts = [a.facts for a in answers if isinstance(a, Message)]
        if wanted is not None and not all(isinstance(f.get(wanted), Mapping) for f in facts):
            raise RunError("A site's answer is malformed; run the same version of Atoll everywhere.")
        return dict(zip(names, [f[wanted] if wanted is not None else f for f in facts], strict=True))


@dataclass(frozen=True, slots=True)
class Kept:
    """What the server remembers of its sites."""

    run: str
    names: list[str]
    agreed: Summary
    rows: list[tuple[int, int, int]]

    def setup(self, recipe: Recipe, **more: Any) -> Setup:
        """The federation as the server sees it: as many rows as there are, and nothing of what is in them."""
        info = self.agreed.info()
        sites = {i: stand_in(info, r) for i, r in enumerate(self.rows)}
        return setup_of(recipe, sites, len(self.rows), info, **more)


def labels(kept: Kept) -> dict[str, Any]:
    """For the report."""
    return {"partition": "each site's own rows", "elsewhere": True, "site_names": kept.names, "sites": len(kept.names)}


def read_federation(folder: Path) -> Kept:
    """Raises :class:`RunError` for a folder without a run of a server, or a damaged one."""
    path = folder / FEDERATION
    if not path.exists():
        raise RunError(f"{folder} holds no run of a server (there is no {FEDERATION} in it).")
    try:
        facts = json.loads(path.read_text())
        rows = [(int(a), int(b), int(c)) for a, b, c in facts["rows"]]
        return Kept(str(facts["run"]), list(facts["names"]), read_summary(facts["agreed"], str(path)), rows)
    except (ValueError, KeyError, TypeError) as e:
        raise RunError(f"{path} is damaged; put it back from a copy, or start another run.") from e


def served(folder: Path) -> Federation:
    """The federation of a server's run, for its report."""
    kept = read_federation(folder)
    return kept.setup(load_recipe(str(folder / "recipe.yaml")), labels=labels(kept)).federation


def resumed(folder: Path, options: Options, say: Callable[[str], None] = print) -> Server:
    """The server of an existing run directory."""
    read_federation(folder)
    return Server(load_recipe(str(folder / "recipe.yaml")), folder, options, say)


def begun(recipe: Recipe, folder: Path, options: Options, say: Callable[[str], None] = print) -> Server:
    """The server of a new run directory."""
    if (folder / "recipe.yaml").exists():
        raise RunError(f"{folder} already holds a run; `atoll server {folder}` goes on with it, or give another --out.")
    return Server(recipe, folder, options, say)


def replace_field(part: Any, name: str, value: Any) -> Any:
    """A copy of a frozen part with another value in one field, which it must have."""
    import dataclasses

    if name not in {f.name for f in dataclasses.fields(part)}:
        raise AtollError(f"The recipe's data has no field `{name}` to put {value} into.")
    return dataclasses.replace(part, **{name: value})


def _always(message: Message) -> Callable[[bool], Message]:
    return lambda _: message
