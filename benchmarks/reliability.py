"""What strangers may send, thrown at everything that reads it; and programs killed in the middle of rounds.

    python benchmarks/reliability.py                      20,000 inputs, the hostile sites, and the kills once
    python benchmarks/reliability.py --inputs 100000 --seed 1 --chaos 0
    python benchmarks/reliability.py --page               docs/reliability.md from the newest record

Each input is a valid message with a few random changes, to its bytes or to its structure. It must be accepted, and
then be equal to what a round trip makes of it, or be refused in a sentence. Anything else is a finding: it is printed
with the seed that repeats it, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from atoll.core.errors import AtollError
from atoll.core.message import Limits, Message, decode, encode
from atoll.data.agreement import agree, read_summary
from atoll.deploy.guard import make_guard
from atoll.deploy.link import Lost, ServerEnd, _Arriving
from atoll.deploy.meter import Meter
from atoll.deploy.policy import Policy
from atoll.deploy.site import BEGIN, FINISH, FIRST, HELLO, SECOND, Place, SiteProgram, setup_of
from atoll.deploy.superlink import TOKEN_HEADER, Door
from atoll.deploy.workers import NoStates
from atoll.federated.backends.inline import InlineWorkers
from atoll.federated.dispatch import Dispatch
from atoll.federated.engine import Engine, open_engine
from atoll.federated.records import from_records, to_records
from atoll.federated.visit import Job, Outcome, Publication, Setup
from atoll.federated.wire import Delivery, pack, pack_outcome, unpack, unpack_outcome
from atoll.federated.worker import Worker
from atoll.privacy.accounting import Event, Sampling
from atoll.recipes.recipe import read_recipe

from machine import describe
from reliability_page import write_page

HERE = Path(__file__).resolve().parent

LIMITS = Limits(max_bytes=1 << 22, max_header_bytes=1 << 20)
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 1 << 31, 1 << 53, 1 << 70, 0.5, -0.0, 1e308, math.inf, -math.inf, math.nan, "", "x",
    "../../etc/passwd", "/etc/passwd", "\x1b[2J\n", "\ud800", "os:system", "1" * 5000, "NaN", "0x1p+9999", [], {}, [[]],
    {"": ""}, {"name": {}}, [None] * 50, "a/b", "weights", "fedavg",
)  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool)


class Finding(Exception):
    """What must not happen."""


# ------------------------------------------------------------------------------------------- mutations


def shaken_bytes(data: bytes, r: random.Random) -> bytes:
    """A few random edits: bits, runs of bytes, digits, cuts, copies."""
    out = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 4, 16))):
        at, size = r.randrange(len(out) + 1), r.choice((1, 1, 2, 8, 64))
        match r.randrange(8):
            case 0 if out:
                out[at % len(out)] ^= 1 << r.randrange(8)
            case 1:
                out[at : at + size] = r.randbytes(size)
            case 2:
                del out[at : at + size]
            case 3:
                out[at:at] = out[at : at + size]
            case 4:
                del out[at:]
            case 5:
                out[at:at] = r.randbytes(size)
            case 6:
                digits = [i for i, b in enumerate(out[:4096]) if 48 <= b < 58]
                if digits:
                    out[r.choice(digits)] = r.choice(b"0123456789-.e")
            case 7:
                out[at : at + size] = r.choice((b"\xff", b"\0", b"{", b"[", b'"')) * size
    return bytes(out)


def shaken(value: Any, r: random.Random, depth: int = 0) -> Any:
    """JSON-like values with one change somewhere."""
    if isinstance(value, dict) and value and r.random() < 0.85:
        name = r.choice(list(value))
        match r.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != name}
            case 1:
                other = r.choice(("x", "", name + "x", "../" + name))
                return {(other if k == name else k): v for k, v in value.items()}
            case 2:
                return {**value, r.choice(("x", "name", "path", "seed", "\ud800")): r.choice(ODD)}
        return {k: shaken(v, r, depth + 1) if k == name else v for k, v in value.items()}
    if isinstance(value, list | tuple) and value and r.random() < 0.8:
        at, items = r.randrange(len(value)), list(value)
        match r.randrange(5):
            case 0:
                del items[at]
            case 1:
                items.insert(at, items[at])
            case _:
                items[at] = shaken(items[at], r, depth + 1)
        return items
    if r.random() < 0.03:
        deep: Any = r.choice(ODD)
        for _ in range(r.choice((10, 300, 900, 3000))):
            deep = [deep] if r.random() < 0.5 else {"name": deep}
        return deep
    if type(value) in (int, float) and r.random() < 0.4:
        return r.choice((value + 1, -value, value * 1e300, value / 3, str(value)))
    return r.choice(ODD)


def shaken_tensor(t: torch.Tensor, r: random.Random) -> torch.Tensor:
    match r.randrange(8):
        case 0:
            return t.to(r.choice(DTYPES))
        case 1:
            return t.flatten()[: r.randrange(t.numel() + 1)].clone()
        case 2:
            return t[..., None].expand(*t.shape, r.choice((0, 1, 3))).clone()
        case 3:
            return torch.full_like(t, r.choice((0, 1, 127)))
        case 4 if t.is_floating_point() and t.numel():
            out = t.clone()
            out.view(-1)[r.randrange(t.numel())] = r.choice((math.nan, math.inf, -math.inf, 1e38))
            return out
        case 5:
            return torch.zeros(r.choice(((), (0,), (0, 1 << 40), (1,) * 16, (1 << 12,))), dtype=t.dtype)
        case 6 if t.numel():
            raw = bytearray(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            raw[r.randrange(len(raw))] = r.randrange(256)
            if t.dtype != torch.bool:
                return torch.frombuffer(raw, dtype=t.dtype).view(t.shape)
    return t.reshape(tuple(reversed(t.shape)))


def shaken_message(m: Message, r: random.Random) -> Message:
    """Changes to facts, to the tree of tensors, or to tensors. Several at times."""
    for _ in range(r.choice((1, 1, 1, 2, 4))):
        kind, parts, facts = m.kind, {p: dict(tree) for p, tree in m.parts.items()}, dict(m.facts)
        named = [(p, n) for p, tree in parts.items() for n in tree]
        match r.randrange(10):
            case 0:
                kind = r.choice(("", "x", "weights", "visit", "outcome", "secure.cohort", "\x1b[2J", "k" * 9999))
            case 1 if parts:
                del parts[r.choice(list(parts))]
            case 2:
                parts[r.choice(("x", "m.x", "b0.weights", "own.x", "\ud800"))] = {"w": torch.zeros(r.choice((0, 1, 9)))}
            case 3 if named:
                p, n = r.choice(named)
                parts[p][r.choice((n + "x", "", "a.b", n))] = parts[p].pop(n)
            case 4 | 5 if named:
                p, n = r.choice(named)
                parts[p][n] = shaken_tensor(parts[p][n], r)
            case _:
                got = shaken(facts, r)
                facts = got if isinstance(got, dict) else {"x": got}
        m = Message(kind, parts, facts)
    return m


def written(value: Any) -> str:
    """JSON as a stranger may write it: NaN, and as deep as it likes."""
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)
    try:
        return json.dumps(value)
    finally:
        sys.setrecursionlimit(usual)


def travelled(m: Message) -> Message:
    """What arrives: only what the wire can carry gets there; a stranger's facts may hold what ours never would."""
    records = to_records(Message(m.kind, m.parts, {}))
    about = {**json.loads(records.config_records["atoll"]["message"]), "facts": dict(m.facts)}
    records["atoll"] = ConfigRecord({"message": written(about)})
    return from_records(records, LIMITS)


# ------------------------------------------------------------------------------------------- what is under test


@dataclass
class Target:
    """Something that reads what strangers send.

    Attributes:
        share: of all inputs.
        feed: makes an input and feeds it; returns the sentence of a refusal, or None when it was accepted.
    """

    name: str
    share: float
    feed: Callable[[random.Random], str | None]
    inputs: int = 0
    accepted: int = 0
    families: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def family(sentence: str) -> str:
    """Sentences that differ in names and numbers alone are one family."""
    text = re.sub(r"/\S*/\S*", "..", sentence.split("\n")[0])
    text = re.sub(r"`[^`]*`?|'[^']*'|\"[^\"]*\"", "..", text)
    return re.sub(r"-?\d[\d,.]*", "N", text)[:90]


def same(a: Message, b: Message) -> None:
    if encode(a) != encode(b):
        raise Finding("a round trip changed it")


def messages(r: random.Random) -> Message:
    """A valid message of many sorts."""
    g = torch.Generator().manual_seed(r.randrange(1 << 30))
    trees = {
        f"part{i}": {
            f"w{j}": torch.randn(r.choice(((), (3,), (2, 3), (0, 2))), generator=g).to(r.choice(DTYPES))
            for j in range(r.randrange(4))
        }
        for i in range(r.randrange(3))
    }
    return Message("delta", trees, {"num_samples": 3, "list": [1, 2.5, "x", None], "deep": {"a": {"b": [True]}}})


def feed_decode(r: random.Random) -> None:
    m = messages(r)
    found = decode(shaken_bytes(bytes(encode(m)), r), LIMITS)
    same(decode(encode(found)), found)


def feed_header(r: random.Random) -> None:
    """The header as JSON with a change: deeper than changed bytes get."""
    raw = bytes(encode(messages(r)))
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    if r.random() < 0.5:
        about = shaken(json.loads(header["__metadata__"]["atoll"]), r)
        header["__metadata__"]["atoll"] = written(about)
    else:
        header = shaken(header, r)
    text = written(header).encode()
    found = decode(len(text).to_bytes(8, "little") + text + raw[8 + size :], LIMITS)
    same(decode(encode(found)), found)


def feed_records(r: random.Random) -> None:
    records = to_records(messages(r))
    arrays = [(p, n) for p, record in records.array_records.items() for n in record]
    text = str(records.config_records["atoll"]["message"])
    match r.randrange(8):
        case 0:
            records["atoll"] = ConfigRecord({"message": shaken_bytes(text.encode(), r).decode(errors="replace")})
        case 1 | 2:
            records["atoll"] = ConfigRecord({"message": written(shaken(json.loads(text), r))})
        case 3:
            records[r.choice(("atoll", "x", "part0"))] = r.choice(
                (MetricRecord({"a": 1}), ArrayRecord(), ConfigRecord({"message": r.choice((1, 2.5, b"x", "x"))}))
            )
        case _ if arrays:
            p, n = r.choice(arrays)
            a: Any = records.array_records[p][n]
            dtype, shape, data = a.dtype, tuple(a.shape), a.data
            match r.randrange(4):
                case 0:
                    dtype = r.choice(("float32", "object", "V8", "", "U9", "complex64"))
                case 1:
                    shape = r.choice(((), (1 << 40,), (-1,), (0,), (1,) * 40))
                case 2:
                    data = shaken_bytes(data, r)
                case 3:
                    kind, order = (
                        r.choice(("<f4", "|O", "<U4", ">f8", "f4,f4", "|b1")),
                        r.choice(("False", "True", "1")),
                    )
                    size = r.choice(((2,), (1 << 62, 4), (-1,), "x"))
                    head = f"{{'descr': '{kind}', 'fortran_order': {order}, 'shape': {size}}}"
                    head = head.ljust(117) + "\n"
                    data = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + data[128:]
            record = dict(records.array_records[p])
            record[n] = Array(dtype, shape, a.stype, data)
            records[p] = ArrayRecord(record)
    found = from_records(records, LIMITS)
    same(from_records(to_records(found), LIMITS), found)


def feed_pieces(r: random.Random) -> str | None:
    """Flower's objects, some of them changed, as the server puts them together."""
    from flwr.app import Message as FlowerMessage

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    whole = FlowerMessage(to_records(messages(r)), 1, "query")
    pieces = {number: one.deflate() for number, one in get_all_nested_objects(whole).items()}
    for number in r.sample(list(pieces), r.choice((1, 1, 2))):
        pieces[number] = shaken_bytes(pieces[number], r)
    end = ServerEnd("", b"", "", b"", LIMITS)
    end._client = SimpleNamespace(PullObject=None)
    proto: Any = SimpleNamespace(HasField=lambda _: False)
    found = end._read(_Arriving(proto, get_object_tree(whole), time.monotonic(), pieces))
    if isinstance(found, Lost):
        return found.why
    if found is None:
        raise Finding("nothing was missing, and it waits")
    same(from_records(to_records(found), LIMITS), found)
    return None


def feed_request(r: random.Random) -> None:
    job = Job(1, 4, 0, 3, r.choice((None, messages(r))), r.choice((None, "3-0")))
    deliveries = [Delivery(4, messages(r), r.choice((-1, 3)), r.random() < 0.2) for _ in range(r.randrange(3))]
    sent = pack(job, deliveries, 4, "run", r.choice((None, "test")))
    found = unpack(travelled(shaken_message(sent, r)))
    again = pack(found.job, found.deliveries, found.version, found.run, found.part)
    second = unpack(again)
    same(pack(second.job, second.deliveries, second.version, second.run, second.part), again)


def feed_outcome(r: random.Random) -> None:
    job = Job(1, 4)
    outcome = Outcome(1, messages(r), r.choice((None, "4-0")), 3, 1e6, 0.25, {"loss": 0.5, "odd": math.nan}, "")
    found = unpack_outcome(travelled(shaken_message(pack_outcome(outcome, job, "run"), r)), job, "run")
    again = pack_outcome(found, job, "run")
    same(pack_outcome(unpack_outcome(again, job, "run"), job, "run"), again)


METHODS: tuple[dict[str, Any], ...] = (
    {"method": "fedavg", "uplink": [{"name": "top_k", "fraction": 0.2}, {"name": "quantise", "bits": 8}]},
    {"method": "scaffold"},
    {"method": {"name": "flora", "ranks": [2, 3]}},
    {"method": "fedkseed"},
)


class Stranger(InlineWorkers):
    """Site 0 answers as a stranger would."""

    def __init__(self, setup: Setup, r: random.Random) -> None:
        super().__init__(setup)
        self.r, self.dispatch, self.asked = r, Dispatch(setup.method.share, "run"), dict[int, Job]()

    def submit(self, jobs: Sequence[Job]) -> list[int]:
        tickets = super().submit(jobs)
        self.asked = dict(zip(tickets, jobs, strict=True))
        return tickets

    def result(self, ticket: int) -> Outcome:
        job = self.asked[ticket]
        outcome = super().result(ticket)
        if job.site:
            return outcome
        try:
            return self.dispatch.outcome(travelled(shaken_message(pack_outcome(outcome, job, "run"), self.r)), job)
        except AtollError as e:
            return self.dispatch.outcome(str(e), job)


class Landing:
    """Whole rounds of the engine, one method after the other, with a stranger at site 0."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self.next = 0

    def feed(self, r: random.Random) -> str | None:
        if not self.engines:
            base = {"data": "digits", "sites": 2, "limit": 60, "model": {"name": "mlp", "hidden": [4]}}
            for method in METHODS:
                recipe = read_recipe({**base, **method})
                federation = recipe.federation()
                info, rows = federation.info, dict(enumerate(federation.sites))
                setup = setup_of(recipe, rows, 2, info, test=federation.test)
                backend = SimpleNamespace(open=lambda s, r=r: Stranger(s, r))
                self.engines.append(open_engine(setup, backend))
        engine = self.engines[self.next % len(self.engines)]
        self.next += 1
        engine.workers.r = r
        row = engine.step()
        engine.commit()
        json.dumps(row.as_dict()).encode()
        said = row.refused.get(0)
        tensors = [t for tree in engine.state.replica.values() for t in tree.values() if t.numel()]
        largest = max(float(t.abs().max()) for t in tensors)
        if not largest < 20:  # NaN too
            self.engines.clear()
            if said is not None and not largest < 1e4:
                raise Finding("a reply that was refused has spoilt the model")
            return None  # well-formed numbers that are huge: poison is for a robust combiner, not for a reader
        if set(row.refused) - {0}:
            raise Finding(f"an honest site was refused: {row.refused}")
        if said is None and row.notes:
            raise Finding(f"the merge was spoilt: {row.notes}")
        return said


class Site:
    """A site with its rules, and all kinds of requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "site"
        (folder / "policy.yaml").write_text("seconds: 3")
        self.guard = make_guard(folder / "policy.yaml", self.folder)
        self.config = {
            "data": "digits", "sites": 2, "limit": 60, "model": {"name": "mlp", "hidden": [4]},
            "method": {"name": "scaffold", "training": {"lr": 0.1, "epochs": 1, "batch_size": 32}},
            "uplink": [{"name": "quantise", "bits": 8}], "partition": {"name": "dirichlet", "alpha": 1.0},
        }  # fmt: skip
        self.start()

    def start(self) -> None:
        self.program = SiteProgram(self.folder, Place(rehearse=True), self.guard)
        hello = Message(HELLO, {}, {"run": "r1", "site": 0, "sites": 2, "recipe": self.config})
        summary = read_summary(self.program.answer(hello).facts["summary"], "the site")
        agreed = agree({"0": summary, "1": summary})
        info = agreed.info()
        setup = setup_of(read_recipe(self.config), {}, 2, info)
        share = setup.method.share
        replica = share.initial(Worker(setup, NoStates()).site_model(None).model)
        dispatch = Dispatch(share, "r1")
        dispatch.publish(Publication(0, replica, setup.method.server.open(replica).common))
        begin = Message(BEGIN, {}, {"run": "r1", "agreed": agreed.facts()})
        visit, test = dispatch.request(Job(0, 0, cohort=2, missing=(0,))), dispatch.request(Job(0, 0), "test")
        final = replace(visit, kind=FINISH)
        means = Message(SECOND, {}, {"run": "r1", "mean": {"x": {"shape": [1], "values": [0.0]}}})
        self.requests = (hello, begin, replace(begin, kind=FIRST), means, visit, visit, test, final)
        assert self.program.answer(begin).kind == "ready"
        self.fed = 0

    def feed(self, r: random.Random) -> str | None:
        self.fed += 1
        if self.fed % 50 == 0:  # what was agreed on has been changed many times by now
            self.start()
        request = travelled(shaken_message(r.choice(self.requests), r))
        before = torch.get_default_dtype()
        answer = self.program.answer(request)
        if not isinstance(answer, Message) or torch.get_default_dtype() != before:
            raise Finding("no message")
        encode(answer)
        if {p.name for p in self.folder.parent.iterdir()} != {"site", "policy.yaml"}:
            raise Finding("a file outside of the site's folder")
        said = str(answer.facts.get("error", ""))
        if str(self.folder.parent) in said or str(HERE.parent) in said:
            raise Finding(f"a path in an answer: {said}")
        if answer.kind == "failed" and not said:
            raise Finding("no reason")
        return said or None


def feed_door(r: random.Random) -> str | None:
    asked: list[Any] = []
    said: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope)

    async def send(event: Any) -> None:
        said.append(event)

    token = b"t" * 64
    paths = ("/v1/fleet/pull-messages", "/v1/control/list-nodes", "/v1/fleet/../control/x", "/", "", "/V1/FLEET/", "//")
    headers = [
        (r.choice((b"content-length", b"Content-Length", b"x")), r.choice((b"0", b"12", b"9" * 30, b"9" * 5000, b"-1",
         b"1e3", b"", b"0x10", b"+5", b" 7", b"99999999999", r.randbytes(4)))),
        (r.choice((b"transfer-encoding", b"Transfer-Encoding", b"y")), b"chunked"),
        (r.choice((TOKEN_HEADER.encode(), TOKEN_HEADER.upper().encode(), b"z")), r.choice((token, token[:-1], b""))),
    ]  # fmt: skip
    headers = r.sample(headers, r.randrange(len(headers) + 1))
    scope = {"type": r.choice(("http", "http", "http", "websocket")), "path": r.choice(paths), "headers": headers}
    asyncio.run(Door(app, token)(scope, None, send))
    if not asked:
        return str(said[0]["status"]) if said else "no answer"
    low = [(n.lower(), v) for n, v in headers]
    knows = (TOKEN_HEADER.encode(), token) in low
    lengths = [v for n, v in low if n == b"content-length"]
    short = all(v.isdigit() and len(v) < 20 and int(v) <= 64 << 20 for v in lengths)
    chunked = any(n == b"transfer-encoding" for n, _ in low)
    if scope["type"] != "http" or chunked or not short or not (knows or scope["path"].startswith("/v1/fleet/")):
        raise Finding(f"the door let {scope} in")
    return None


class Book:
    """The book of what has left a site, damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def feed(self, r: random.Random) -> None:
        now, path = 1_750_000_000.0, self.folder / "book.jsonl"
        path.unlink(missing_ok=True)
        meter = Meter(path, lambda: now)
        for event in (None, Event(4.0, Sampling("fixed", 2, 2)), Event(0.0)):
            meter.book(Policy(), 100, event, "x")
        lines = path.read_bytes().splitlines(keepends=True)
        if r.random() < 0.5:
            at = r.randrange(len(lines))
            lines[at] = written(shaken(json.loads(lines[at]), r)).encode() + b"\n"
            path.write_bytes(b"".join(lines))
        else:
            path.write_bytes(shaken_bytes(b"".join(lines), r))
        rules = Policy(epsilon_per_day=50.0, bytes_per_day=10_000)
        read = Meter(path, lambda: now).today()
        Meter(path, lambda: now).book(rules, 10, Event(4.0, Sampling("fixed", 2, 2)), "y")
        if not (isinstance(read.bytes, int) and read.bytes >= 0):
            raise Finding(f"{read}")


def targets(folder: Path) -> list[Target]:
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    site, landing, book = Site(folder / "a"), Landing(), Book(folder / "b")
    return [
        Target("a message's bytes (`core.message.decode`)", 0.2, feed_decode),
        Target("its header, changed as JSON", 0.1, feed_header),
        Target("Flower's records (`records.from_records`)", 0.2, feed_records),
        Target("Flower's pieces of an answer (`ServerEnd._read`)", 0.08, feed_pieces),
        Target("requests at a site (`wire.unpack`)", 0.1, feed_request),
        Target("answers at the server (`wire.unpack_outcome`)", 0.1, feed_outcome),
        Target("rounds with a stranger in them (`dispatch.outcome`, `Engine.step`)", 0.05, landing.feed),
        Target("a site's program (`SiteProgram.answer`)", 0.05, site.feed),
        Target("the SuperLink's door (`Door`)", 0.07, feed_door),
        Target("a site's book (`meter.Meter`)", 0.05, book.feed),
    ]


def throw(target: Target, inputs: int, seed: int) -> None:
    began = time.perf_counter()
    for i in range(inputs):
        r = random.Random(f"{seed} {target.name} {i}")
        target.inputs += 1
        try:
            said = target.feed(r)
        except AtollError as e:
            said = str(e)
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            text = f"input {i}: {type(e).__name__}: {str(e)[:200]} ({Path(where.filename).name}:{where.lineno})"
            if len(target.findings) < 5:
                print(f"FINDING {target.name}, {text}", flush=True)
            target.findings.append(text)
            continue
        if said is None:
            target.accepted += 1
        else:
            target.families[family(said)] += 1
    target.seconds = time.perf_counter() - began
    print(f"{target.name}: {target.inputs} inputs, {target.accepted} accepted, {len(target.families)} families, "
          f"{len(target.findings)} findings, {target.seconds:.0f} s", flush=True)  # fmt: skip


# ------------------------------------------------------------------------------------------- whole federations


def rehearse(test: str) -> dict[str, Any]:
    """Run a test of whole federations; what it noted, and whether it passed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            f"tests/deploy/{test}",
            f"--junitxml={out}",
            "-o",
            "junit_family=xunit1",
        ]
        load, began = os.getloadavg()[0], time.perf_counter()
        done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print(done.stdout[-3000:])
        noted = [p.attrib for p in ElementTree.parse(out).iter("property")] if out.exists() else []
    return {
        "test": test, "passed": done.returncode == 0, "seconds": round(time.perf_counter() - began, 1), "load": load,
        "noted": {p["name"]: p["value"] for p in noted},
    }  # fmt: skip


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--inputs", type=int, default=20_000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--chaos", type=int, default=1, help="how often the scenario of kills runs")
    p.add_argument("--hostile", type=int, default=1, help="how often the hostile sites of a real deployment run")
    p.add_argument("--only", default="", help="targets whose name contains this")
    p.add_argument("--page", action="store_true", help="only write docs/reliability.md, from the newest record")
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    if a.page:
        write_page(json.loads(max((HERE / "results").glob("reliability-*.json")).read_text()))
        return 0
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        under_test = [t for t in targets(Path(folder)) if a.only in t.name]
        for target in under_test:
            throw(target, math.ceil(a.inputs * target.share), a.seed)
    federations = [rehearse("test_hostile.py") for _ in range(a.hostile)]
    federations += [rehearse("test_chaos.py") for _ in range(a.chaos)]
    record = {
        "benchmark": "reliability", "machine": describe(), "seed": a.seed,
        "targets": [{k: v for k, v in vars(t).items() if k != "feed"} for t in under_test], "federations": federations,
    }  # fmt: skip
    bad = any(t.findings for t in under_test) or not all(f["passed"] for f in federations)
    if not a.only:
        out = a.out or HERE / "results" / f"reliability-{time.strftime('%Y%m%d-%H%M%S')}.json"
        out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"record: {out}")
        write_page(json.loads(out.read_text()))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
