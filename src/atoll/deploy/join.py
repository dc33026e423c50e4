"""A site's process: it keeps a SuperNode running, takes its requests, and answers them."""

from __future__ import annotations

import contextlib
import fcntl
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from atoll.core.errors import RunError, one_line
from atoll.core.files import write_atomic
from atoll.core.message import Message, encoded_size
from atoll.deploy.keys import check_site_files
from atoll.deploy.link import LinkLost
from atoll.deploy.processes import end_process, launch, tail
from atoll.deploy.site import SiteProgram
from atoll.deploy.site_link import SiteEnd, sign_off
from atoll.federated.dispatch import failed

HOPELESS = 120.0  # seconds of failing starts before we give up; a server may believe in a lost node for 20
SOON, LATER = 0.02, 0.25  # seconds between looks for a request at our own SuperNode: more when there is none for long
KNOCK = 10.0  # seconds between looks whether there is still a server, while it asks for nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How a site reaches the server.

    Args:
        server: ``host:port``.
        certificate: the federation's ``ca.pem``.
        key: this site's private key.
        pace: seconds between a SuperNode's questions for work; Flower's own is 3.
    """

    server: str
    certificate: Path
    key: Path
    pace: float = 0.5


def join(program: SiteProgram, connection: Connection, folder: Path, say: Callable[[str], None] = print) -> None:
    """Answer requests until told to stop (SIGINT or SIGTERM); the request in hand is finished first.

    Raises:
        RunError: the address or a file is not what it should be, or the SuperNode ends each time it is started.
    """
    host_and_port(connection.server)
    check_site_files(connection.certificate, connection.key)
    with only_one(folder):
        _answer_all(program, connection, folder, say)


def _answer_all(program: SiteProgram, connection: Connection, folder: Path, say: Callable[[str], None]) -> None:
    stop = _Stop()
    node = _Node(connection, folder, say)
    try:
        end = node.start()
        say(f"joining {connection.server}; waiting for requests (Ctrl-C leaves)")
        trouble, pause = "", SOON
        while not stop.asked:
            try:
                taken = end.take()
            except LinkLost as e:
                if node.ended():
                    end = node.start()
                elif node.settled() and str(e) != trouble:
                    trouble = str(e)
                    say(f"{time.strftime('%H:%M:%S')} {e}")
                time.sleep(0.2)
                continue
            if taken is None:
                if node.ended():
                    end = node.start()
                node.knock()
                time.sleep(pause)
                pause = min(1.05 * pause, LATER)
                continue
            pause = SOON
            node.known_as(taken.node)
            said = taken.message
            with taken.at_work():
                answer = program.answer(said) if isinstance(said, Message) else failed(said)
            say(_line(said, answer, folder) + (f" ({one_line(program.trouble)})" if program.trouble else ""))
            try:
                taken.answer(answer)
            except LinkLost:
                say("the answer could not be handed over; the server will ask again")
        say("left")
    finally:
        stop.restore()
        node.close()


def _line(said: Message | str, answer: Message, folder: Path) -> str:
    """One line of the operator's log for a request and its answer; bytes as in the book."""
    what = one_line(said.kind, 40) if isinstance(said, Message) else "unreadable request"
    where = f" {one_line(said.facts['round'], 20)}" if isinstance(said, Message) and "round" in said.facts else ""
    if answer.kind == "failed" or answer.facts.get("error"):
        return f"{time.strftime('%H:%M:%S')} {what}{where}: refused: {one_line(answer.facts.get('error'))}"
    if answer.kind == "finished":
        return f"{time.strftime('%H:%M:%S')} finished; the model is in {folder / str(answer.facts['run']) / 'model'}"
    return f"{time.strftime('%H:%M:%S')} {what}{where}: {answer.kind}, {encoded_size(answer):,} bytes"


class _Stop:
    """Whether somebody has asked us to stop. A second signal stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class _Node:
    """Our SuperNode, started anew when it has died."""

    def __init__(self, connection: Connection, folder: Path, say: Callable[[str], None]) -> None:
        self.connection, self.folder, self.say = connection, folder / "flower", say
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._failing = 0.0
        self._name, self._number = self.folder / "node", 0
        self._knocked, self._trouble, self._complaint = 0.0, "", ""

    def start(self) -> SiteEnd:
        if self._process is not None:
            self._complain()
            time.sleep(1.0)
        self._sign_off()
        secret, port = secrets.token_bytes(32), _free_port()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / "secret"
        write_atomic(path, secret, durable=False)
        path.chmod(0o600)
        c = self.connection
        command = [
            sys.executable, "-m", "atoll.deploy.supernode", c.pace, "--superlink", c.server,
            "--root-certificates", c.certificate, "--auth-supernode-private-key", c.key, "--isolation", "process",
            "--superexec-auth-secret-file", path, "--host", "127.0.0.1", "--port", port,
        ]  # fmt: skip
        self._process, self._started = launch(command, self.folder / "supernode.log"), time.monotonic()
        return SiteEnd(f"127.0.0.1:{port}", secret)

    def _complain(self) -> None:
        """Say why the SuperNode ended; give up when it does so again and again."""
        now, said = time.monotonic(), why_ended(self.folder / "supernode.log")
        self._failing = self._failing or now if now - self._started < 20 else 0.0
        if said != self._complaint:
            self._complaint = said
            self.say(f"{time.strftime('%H:%M:%S')} joining again: {said}")
        if self._failing and now - self._failing > HOPELESS:
            raise RunError(f"This site could not join for {HOPELESS:.0f} s: {said}.")

    def _sign_off(self) -> None:
        """After a crash the server still believes in the node that is gone."""
        if self._name.exists():
            c = self.connection
            with contextlib.suppress(LinkLost, ValueError):
                node = int(self._name.read_text())
                sign_off(c.server, c.certificate.read_bytes(), c.key.read_bytes(), node)

    def known_as(self, node: int) -> None:
        """Remember under which number the server knows us."""
        if node != self._number:
            self._number = node
            write_atomic(self._name, str(node).encode(), durable=False)

    def knock(self) -> None:
        """Say when there is no server, and when it is back. The SuperNode tries again by itself."""
        if time.monotonic() - self._knocked < KNOCK:
            return
        trouble = no_server(self.connection.server)
        self._knocked = time.monotonic()
        if trouble and not self._trouble:
            self.say(f"{time.strftime('%H:%M:%S')} no server at {self.connection.server} ({trouble}); trying again")
        elif self._trouble and not trouble:
            self.say(f"{time.strftime('%H:%M:%S')} the server answers")
        self._trouble = trouble

    def settled(self) -> bool:
        """Whether it has had time to start: then what goes wrong is worth a line."""
        return time.monotonic() - self._started > 10

    def ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def close(self) -> None:
        if self._process is not None:
            end_process(self._process)
        (self.folder / "secret").unlink(missing_ok=True)


ENDINGS = {
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not by the authority in --certificate, or is for another "
    "host than the one in --server (`atoll certify --host` names it)",
    "Failed to activate": "the server does not know this key (its operator puts the .pub file into the folder of the "
    "sites' keys and starts the server again), or believes for half a minute more that this site is still there",
    "onnection refused": "nothing listens at the address in --server",
    "Name or service not known": "there is no host of the name in --server",
    "terminated gracefully": "the server has been started anew, or the SuperNode was told to end",
}


def why_ended(log: Path) -> str:
    """What the last SuperNode in the log died of."""
    last = tail(log).rpartition("Starting Flower SuperNode")[2]
    known = [words for sign, words in ENDINGS.items() if sign in last]
    return known[0] if known else one_line(last[-300:]) or "it said nothing"


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Two processes of one site would sign each other off, and overwrite what they keep."""
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise RunError(f"Another `atoll join` works in {folder}; end it first, or give another --out.") from e
        yield


def host_and_port(server: str) -> tuple[str, int]:
    host, _, port = server.rpartition(":")
    if not host or "/" in host or not re.fullmatch("[0-9]{1,5}", port):
        raise RunError(f"--server {server} should be HOST:PORT, such as server.example.org:9443.")
    return host.strip("[]"), int(port)


def no_server(server: str) -> str:
    """Why nothing answers at the address; empty when something does."""
    try:
        socket.create_connection(host_and_port(server), 3.0).close()
    except OSError as e:
        return e.strerror or str(e)
    return ""


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
