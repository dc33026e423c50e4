"""Nobody gets in, and a registered site that misbehaves harms nobody but itself."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ConfigRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError, inflate_object_from_contents
from flwr.supernode.fleet_http_connection import http_request_response
from safetensors.torch import load_file

from atoll.core.message import Message
from atoll.deploy.guard import make_guard
from atoll.deploy.keys import make_certificates, make_site_key
from atoll.deploy.link import LinkLost
from atoll.deploy.site import Place, SiteProgram
from atoll.deploy.site_link import sign_off
from atoll.federated.engine import federate
from atoll.federated.method import LocalWork
from atoll.federated.records import from_records, to_records
from atoll.federated.wire import VISIT
from atoll.recipes.recipe import read_recipe

SILENCE = 5  # seconds, enough for honest visits on a busy machine
HASTY = "import atoll.deploy.link as a, atoll.deploy.workers as b; a.UPLOAD = 0.3; b.TRIES = 2"


@dataclass
class Mole:
    """A site with a registered key and a client of its own. ``tricks``: by round, what it makes of its honest answer;
    None is no answer at all."""

    address: str
    authority: bytes
    key: bytes
    program: SiteProgram
    tricks: dict[int, Callable[[Mole, Message], Any]]
    last: Message | None = None
    pieces: bool = True
    error: BaseException | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        private: Any = load_ssh_private_key(self.key, None)
        pair = private, private.public_key()
        try:
            with http_request_response(self.address, False, self.authority, pair, 1, 5.0) as (
                _, receive, send, _, _, pull, push, confirm,
            ):  # fmt: skip
                while not self.over.wait(0.05):
                    with contextlib.suppress(ObjectUnavailableError):
                        self._turn(receive, send, pull, push, confirm)
        except BaseException as e:
            self.error = e

    def _turn(self, receive: Any, send: Any, pull: Any, push: Any, confirm: Any) -> None:
        got = receive()
        if got is None:
            return
        flower, tree = got
        run = flower.metadata.run_id
        contents = {}
        for one in iterate_object_tree(tree):
            while one.object_id not in contents:
                with contextlib.suppress(ObjectUnavailableError):
                    contents[one.object_id] = pull(run, one.object_id)
        asked: Any = inflate_object_from_contents(tree.object_id, contents)
        asked.metadata.__dict__["_message_id"] = tree.object_id
        confirm(run, tree.object_id)
        request = from_records(asked.content)
        answer: Any = self.program.answer(request)
        self.pieces = True
        if request.kind == VISIT:
            answer = self.tricks.get(request.facts["round"], lambda _, honest: honest)(self, answer)
        if answer is None:
            return
        content = to_records(answer) if isinstance(answer, Message) else answer
        reply = FlowerMessage(content, reply_to=asked) if isinstance(content, RecordDict) else content(asked)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            wanted, session = send(reply, get_object_tree(reply), 0.0)
            for number, piece in get_all_nested_objects(reply).items():
                if number in wanted and self.pieces:
                    push(run, session, number, piece.deflate())


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Mole, Message], Message]:
    def trick(_: Mole, honest: Message) -> Message:
        parts = {p: {n: change(t) for n, t in tree.items()} for p, tree in honest.parts.items()}
        return dataclasses.replace(honest, parts=parts)

    return trick


def facts(**new: Any) -> Callable[[Mole, Message], Message]:
    return lambda _, honest: dataclasses.replace(honest, facts={**honest.facts, **new})


def honest_and_kept(mole: Mole, honest: Message) -> Message:
    mole.last = honest
    return honest


def truncated(mole: Mole, honest: Message) -> Message:
    mole.pieces = False
    return honest


def error(*_: Any) -> Any:
    from flwr.app import Error

    return lambda asked: FlowerMessage(Error(0, "\x1b[2J no"), reply_to=asked)


def bomb(*_: Any) -> RecordDict:
    """An array that lists one chunk of a megabyte ten thousand times."""
    from flwr.app import Array, ArrayRecord
    from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body

    class Bomb(Array):
        def deflate(self) -> bytes:
            body = {"dtype": "float32", "shape": [1], "stype": "numpy.ndarray", "arraychunk_ids": [0] * 10_000}
            return add_header_to_object_body(json.dumps(body).encode(), self)

    Bomb.__qualname__ = "Array"
    whole = to_records(Message("outcome"))
    record = ArrayRecord({"x": Array(torch.zeros(1 << 18).numpy())})
    record["x"] = Bomb("float32", (1,), "numpy.ndarray", b"\0" * (1 << 20))
    whole["m.delta"] = record
    return whole


TRICKS: list[tuple[str, Callable[[Mole, Message], Any], str]] = [
    ("an answer from the round before", lambda mole, _: mole.last, "belongs to another visit"),
    ("another site's number", facts(site=0), "belongs to another visit"),
    ("NaN", changed(lambda t: t * float("nan")), "NaN"),
    ("wrong shapes", changed(lambda t: t[..., None]), "shape"),
    ("another type of numbers", changed(lambda t: t.double()), "type"),
    ("no tensor", lambda _, honest: dataclasses.replace(honest, parts={}), ""),
    ("another kind", lambda _, honest: dataclasses.replace(honest, kind="ready"), "expected the outcome"),
    ("a message of no kind of ours", lambda *_: RecordDict({"x": ConfigRecord({"y": 1})}), "no message of ours"),
    ("a negative count", facts(num_samples=-5), "must be a count"),
    ("more bytes than allowed", changed(lambda t: torch.zeros(1 << 20)), "more than|over the limit"),
    ("an array of a thousand chunks", bomb, "over the limit"),
    ("its pieces never come", truncated, "never came in full"),
    ("an error", error, "no answer from its node"),
    ("a failure in a thousand words", lambda *_: Message("failed", {}, {"error": "\x1b[2Jno\n" * 5000}), "no ?[2Jno"),
    ("silence", lambda *_: None, "no answer within"),
]  # fmt: skip
RECIPE: dict[str, Any] = {
    "data": "digits", "partition": "iid", "sites": 3, "rounds": 1 + len(TRICKS), "model": {"name": "mlp", "hidden": [8]},
    "method": {"name": "fedavg", "training": {"lr": 0.1, "epochs": 1, "batch_size": 64}}, "evaluate_every": 0,
    "timeout": SILENCE, "max_reply_bytes": 1 << 20,
}  # fmt: skip


@dataclass(frozen=True)
class AwayAfterTheFirst(LocalWork):
    """Site 2 takes part in round 0 alone."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, visit: Any) -> Any:
        if visit.site.site == 2 and visit.round:
            raise ValueError("away")
        return self.inner.run(visit)


def expected() -> dict[str, torch.Tensor]:
    """The model of the honest sites."""
    recipe = read_recipe({k: v for k, v in RECIPE.items() if k != "timeout"})
    federation, method = recipe.federation(), recipe.make_method(3)
    method = method.but(local=AwayAfterTheFirst(method.local))
    rows = federate(recipe.make_task(federation.info), federation, method, rounds=recipe.rounds, evaluate_every=0)
    return list(rows)[-1].engine.state.replica["weights"]


def test_outsiders_stay_outside_and_a_hostile_site_spoils_nothing(deployment, record_property):
    d = deployment("bern", "lyon", "mole")
    make_certificates(d.folder / "others", ["127.0.0.1"])
    make_site_key(d.folder / "keys" / "eve.key")
    honest, d.program = d.program, [sys.executable, "-c", f"{HASTY}; from atoll.cli import main; main()"]
    d.serve(RECIPE)
    d.program = honest
    d.site("bern"), d.site("lyon")
    d.until(lambda: "waiting for 1 of 3 sites: mole" in d.log("server"), "waiting for the mole")
    outsiders(d)
    mole = Mole(
        f"127.0.0.1:{d.port}", (d.folder / "certificates/ca.pem").read_bytes(),
        (d.folder / "keys/mole.key").read_bytes(),
        SiteProgram(d.folder / "mole", Place(rehearse=True), make_guard(None, d.folder / "mole")),
        {0: honest_and_kept} | {r: trick for r, (_, trick, _) in enumerate(TRICKS, 1)},
    )  # fmt: skip
    thread = threading.Thread(target=mole.run, daemon=True)
    thread.start()
    d.until(lambda: d.rounds(), "first round")
    closed_doors(d)
    d.finished()
    mole.over.set()
    thread.join(20)
    assert mole.error is None

    rounds = d.rounds()
    assert rounds[0]["refused"] == {}
    assert rounds[0]["replies"] == 3
    for row, (name, _, sentence) in zip(rounds[1:], TRICKS, strict=True):
        said = row["refused"].get("2", "")
        record_property(f"hostile site: {name}", said)
        assert list(row["refused"]) == ["2"], (name, row["refused"])
        assert any(word in said for word in sentence.split("|")), (name, said)
        assert said.isprintable(), name
        assert len(said) <= 1000, name
        assert row["replies"] == 2, name
    found = load_file(d.folder / "run/model/model.safetensors")
    reference = expected()
    assert all(torch.equal(found[n], reference[n]) for n in reference)
    for program in ("server", "bern", "lyon"):
        assert "Traceback" not in d.log(program)


def outsiders(d: Any) -> None:
    """A wrong authority, a wrong host, and a key that the server does not know; what their operators read."""
    ca, key = (d.folder / "certificates/ca.pem").read_bytes(), (d.folder / "keys/bern.key").read_bytes()
    with pytest.raises(LinkLost, match="CERTIFICATE_VERIFY_FAILED"):
        sign_off(f"127.0.0.1:{d.port}", (d.folder / "others/ca.pem").read_bytes(), key, 1)
    with pytest.raises(LinkLost, match="localhost"):
        sign_off(f"localhost:{d.port}", ca, key, 1)
    with pytest.raises(LinkLost, match="signing off failed"):
        sign_off(f"127.0.0.1:{d.port}", ca, (d.folder / "keys/eve.key").read_bytes(), 1)
    here = ("--server", f"127.0.0.1:{d.port}", "--rehearse", "--pace", 0.1)
    d._start("eve", "join", *here, "--certificate", "certificates/ca.pem", "--key", "keys/eve.key", "--out", "eve")
    d._start("lost", "join", *here, "--certificate", "others/ca.pem", "--key", "keys/bern.key", "--out", "lost")
    d._start("twin", "join", *here, "--certificate", "certificates/ca.pem", "--key", "keys/bern.key", "--out",
             "site-bern")  # fmt: skip
    d.until(lambda: "does not know this key" in d.log("eve"), "word for the operator of eve")
    d.until(lambda: "not by the authority in --certificate" in d.log("lost"), "word for an operator")
    assert d.processes["twin"].wait(30) == 2
    assert "Another `atoll join` works in site-bern" in d.log("twin")
    for name in ("eve", "lost"):
        d.processes[name].terminate()
        d.processes[name].wait(30)
        assert "Traceback" not in d.log(name)
    assert "sites are here" not in d.log("server")


def closed_doors(d: Any) -> None:
    """The SuperLink's inner interfaces, and requests without a proper length, while a run goes on."""
    for path in (
        "/v1/control/list-nodes",
        "/v1/runtime/pull-messages",
        "/",
        "/v1/fleet/../control/list-nodes",
        "/docs",
    ):
        assert asked(d, f"POST {path} HTTP/1.1", "content-length: 0") == (404 if "fleet" in path else 403), path
    fleet = "POST /v1/fleet/pull-messages HTTP/1.1"
    assert asked(d, fleet, "content-length: 99999999999") == 413
    assert asked(d, fleet, f"content-length: {'9' * 5000}") in (400, 413)
    assert asked(d, fleet, "transfer-encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n") == 413
    assert asked(d, fleet, "content-length: 5\r\ncontent-type: application/x-protobuf", body=b"hello") in (
        400,
        401,
        403,
        415,
    )
    assert asked(d, "\x00\x01\x02", "") in (0, 400)


def asked(d: Any, line: str, header: str, body: bytes = b"") -> int:
    """The status of a raw request; 0: the connection was closed."""
    context = ssl.create_default_context(cafile=str(Path(d.folder) / "certificates/ca.pem"))
    with (
        socket.create_connection(("127.0.0.1", d.port), 10) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as s,
    ):
        s.sendall(f"{line}\r\nhost: 127.0.0.1\r\n{header}\r\n\r\n".encode() + body)
        first = s.recv(100).split(b" ")
    return int(first[1]) if len(first) > 1 else 0
