"""A hostile server: whatever it asks, a site answers with what its rules allow or with a sentence, and no more."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from atoll.core.errors import MessageError, RunError
from atoll.core.message import Limits, Message, decode, encode
from atoll.data.agreement import agree, read_summary
from atoll.deploy.guard import make_guard
from atoll.deploy.link import LinkLost
from atoll.deploy.meter import Meter
from atoll.deploy.policy import Policy
from atoll.deploy.site import BEGIN, FINISH, FIRST, HELLO, SECOND, Place, SiteProgram, setup_of, stand_in
from atoll.deploy.site_link import Taken
from atoll.deploy.superlink import Door
from atoll.deploy.workers import NoStates
from atoll.federated.dispatch import Dispatch
from atoll.federated.ledger import Row
from atoll.federated.records import from_records, to_records
from atoll.federated.visit import Job, Publication
from atoll.federated.worker import Worker
from atoll.recipes.recipe import read_recipe

SITES = 3
CONFIG = {
    "data": "digits", "sites": SITES, "model": {"name": "mlp", "hidden": [8]},
    "method": {"name": "fedavg", "training": {"lr": 0.1, "epochs": 1, "batch_size": 64}},
    "uplink": [{"name": "clip", "norm": 1.0}, {"name": "gaussian_noise", "clip_norm": 1.0, "multiplier": 4.0}],
}  # fmt: skip


class Federation:
    """A site and the server that speaks to it."""

    def __init__(self, folder: Path, rules: str = "{}", place: Place = Place(rehearse=True)) -> None:
        self.folder, self.place, self.rules = folder / "site", place, folder / "policy.yaml"
        self.rules.write_text(rules)
        self.start()

    def start(self) -> None:
        self.program = SiteProgram(self.folder, self.place, make_guard(self.rules, self.folder))

    def ask(self, kind: str, **facts) -> Message:
        return self.program.answer(Message(kind, {}, facts))

    def hello(self, **facts) -> Message:
        return self.ask(HELLO, **{"run": "r1", "site": 0, "sites": SITES, "recipe": CONFIG, **facts})

    def begin(self, config: Mapping[str, Any] = CONFIG) -> None:
        """Greet, agree, and make ready to send requests."""
        summary = read_summary(self.hello(recipe=dict(config)).facts["summary"], "the site")
        agreed = agree({str(i): summary for i in range(SITES)})
        assert self.ask(BEGIN, run="r1", agreed=agreed.facts()).kind == "ready"
        info = agreed.info()
        setup = setup_of(read_recipe(config), {0: stand_in(info, summary.rows)}, SITES, info)
        share = setup.method.share
        replica = share.initial(Worker(setup, NoStates()).site_model(None).model)
        self.dispatch = Dispatch(share, "r1")
        self.dispatch.publish(Publication(0, replica, setup.method.server.open(replica).common))

    def visit(self, cohort: int = SITES, repeat: int = 0, **facts) -> Message:
        request = self.dispatch.request(Job(0, 0, repeat, cohort, missing=(0,)))
        return Message(request.kind, request.parts, {**request.facts, **facts})

    def booked(self) -> int:
        return len((self.folder / "book.jsonl").read_text().splitlines())


@pytest.fixture
def site(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


OPENED: list[str] = []


@pytest.fixture(scope="module")
def _hook() -> None:
    """Python takes no hook away again, so there is one."""
    sys.addaudithook(
        lambda event, args: OPENED.append(str(args[0])) if event == "open" and "elsewhere" in str(args[0]) else None
    )


@pytest.fixture
def opened(_hook) -> list[str]:
    """Files whose name says that nobody should open them."""
    OPENED.clear()
    return OPENED


def refused(answer: Message, *words: str) -> None:
    """A sentence, one line, without a path of this machine."""
    said = answer.facts.get("error", "")
    assert answer.kind in ("failed", "outcome"), answer.kind
    assert said, "no reason"
    assert answer.facts.get("message") is None
    assert not answer.parts
    assert all(w in said for w in words), said
    assert "/" not in said.replace("`/elsewhere/", ""), said


NESTED: dict = {}
for _ in range(500):
    NESTED = {"name": "checkpoint", "network": NESTED}
HOSTILE_RECIPES = {
    "no mapping": [1, 2],
    "nothing known": {"x": 1},
    "numbers for names": {**CONFIG, "method": 7},
    "a checkpoint": {**CONFIG, "model": {"name": "checkpoint", "path": "/elsewhere/model"}},
    "a checkpoint within": {**CONFIG, "site_models": [{"name": "checkpoint", "path": "/elsewhere/model"}]},
    "a model's folder": {**CONFIG, "model": {"name": "transformers_model", "path": "/elsewhere/model"}},
    "a partition's file": {**CONFIG, "partition": {"name": "from_file", "path": "/elsewhere/split"}},
    "code": {**CONFIG, "model": {"name": "user", "factory": "antigravity:fly"}},
    "code in a package of ours": {**CONFIG, "model": {"name": "user", "factory": "atoll.deploy.keys:make_site_key"}},
    "a dotted name": {**CONFIG, "model": "os.path"},
    "a name with a way out": {**CONFIG, "model": "../../deploy/keys"},
    "an attack": {**CONFIG, "attack": "sign_flip"},
    "a deep structure": {**CONFIG, "model": NESTED},
    "a model without end": {**CONFIG, "model": {"name": "mlp", "hidden": [1 << 40, 1 << 40]}},
    "a model of 160 GB": {**CONFIG, "model": {"name": "mlp", "hidden": [200_000, 200_000]}},
    "a run's name with a way out": {**CONFIG, "name": "../../x"},
    "control characters": {**CONFIG, "\x1b[2J\nall is well": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_RECIPES)
def test_a_hostile_recipe_opens_imports_and_writes_nothing(name, site, tmp_path, opened):
    answer = site.hello(recipe=HOSTILE_RECIPES[name])
    if answer.kind == "summary":  # what its model is, a site finds out when it makes it
        assert site.ask(BEGIN, run="r1", agreed=answer.facts["summary"]).kind == "ready"
        answer = site.ask("visit", run="r1", site=0, round=0, repeat=0, cohort=3, state_tag=None, version=0,
                          broadcasts=[], own=None, secure=None)  # fmt: skip
    refused(answer)
    assert "antigravity" not in sys.modules
    assert not opened
    assert sorted(p.name for p in tmp_path.iterdir()) == ["policy.yaml", "site"]


def test_what_a_recipe_names_at_the_site_is_opened_only_where_the_rules_list_it(tmp_path):
    site = Federation(tmp_path)
    checkpoint = {**CONFIG, "model": {"name": "checkpoint", "path": "/elsewhere/model"}}
    refused(site.hello(recipe=checkpoint), "`/elsewhere/model`", "`files`")
    site.rules.write_text("files: [/elsewhere/model]")
    site.start()
    assert site.hello(recipe=checkpoint).kind == "summary"


def test_a_teacher_is_opened_only_where_the_rules_list_it_and_then_the_site_distils(tmp_path, generator):
    """Its model is counted before it takes memory, so it has to be one without weights too."""
    site = Federation(tmp_path)
    config = {
        "data": "digits", "sites": SITES, "method": {"name": "distil_at_sites", "steps": 1, "batch": 8},
        "task": {
            "name": "distilling", "start": generator, "samples": 20, "method": {"name": "dmd", "adversary": {}}
        },
    }  # fmt: skip
    answer = site.hello(recipe=config)
    assert answer.kind == "failed"
    assert "`files`" in answer.facts["error"]
    site.rules.write_text(f"files: [{generator}]")
    site.start()
    site.begin(config)
    answer = site.program.answer(site.visit())
    assert answer.kind == "outcome"
    assert not answer.facts["error"], answer.facts["error"]
    (delta,) = answer.parts.values()
    assert {name.split(".")[1] for name in delta} == {"student", "fake", "head"}


def test_rows_outside_of_what_the_operator_opened_stay_closed(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.txt").write_text("what may be read " * 50)
    (tmp_path / "secret.txt").write_text("what may not " * 50)
    site = Federation(tmp_path, place=Place(str(tmp_path / "open")))
    text = {"name": "text_files", "length": 16, "site": "none"}
    assert site.hello(recipe={"data": text}).kind == "summary"
    for way in ("../*.txt", "/etc/*", "~/*", "**/../../*", 7):
        refused(site.hello(recipe={"data": {**text, "pattern": way}}), "pattern")
    for file in ("/elsewhere/tokenizer.json", "tokenizer.json", ["x"]):
        refused(site.hello(recipe={"data": {**text, "tokenizer": file}}), "tokenizer")
    for place in ("path", "test_path", "url", "query"):  # simply not the server's to say
        answer = site.hello(recipe={"data": {**text, place: str(tmp_path)}})
        assert answer.kind == "summary"
        assert str(tmp_path) not in str(answer.facts)


@pytest.mark.parametrize(
    "facts",
    [
        {"sites": 1 << 30}, {"sites": 0}, {"sites": -1}, {"site": 5}, {"sites": True}, {"sites": 10.0},
        {"sites": 10**30}, {"run": "../x"}, {"run": "a/b"}, {"run": ""}, {"run": "."}, {"run": "x" * 300},
        {"run": "\u0665"}, {"run": None}, {"recipe": None}, {"recipe": "fedavg"},
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_greeting(facts, site):
    refused(site.hello(**facts))
    assert [p.name for p in site.folder.iterdir()] == []


def test_requests_that_nobody_of_ours_would_send(site):
    site.begin()
    files = sorted(site.folder.rglob("*"))
    wrong = [
        {"run": "r2"}, {"run": "../r1"}, {"site": 1}, {"round": -1}, {"round": 1.5}, {"cohort": 0}, {"cohort": 1},
        {"cohort": 1 << 40}, {"state_tag": "../../x"}, {"state_tag": "0-0"}, {"state_tag": 3}, {"version": "0"},
        {"broadcasts": None}, {"broadcasts": [{}]}, {"own": []}, {"secure": {}}, {"broadcasts": [[]] * 1000},
    ]  # fmt: skip
    for facts in wrong:
        refused(site.program.answer(site.visit(**facts)))
    refused(site.ask("evaluate", **{**site.visit().facts, "part": "../../train"}))
    refused(site.ask(FINISH))
    for kind in ("", "shutdown", "__class__", "secure.channel", "x" * 10_000):
        refused(site.ask(kind, run="r1"))
    assert [
        p for p in sorted(site.folder.rglob("*")) if p not in files and p.name not in ("states", "book.jsonl")
    ] == []
    assert site.program.answer(site.visit()).kind == "outcome", "it goes on working"


def test_broadcasts_with_bad_numbers_leave_the_site_able_to_go_on(site):
    site.begin()
    for bad in (
        lambda t: t * float("nan"), lambda t: t[..., None], lambda t: t.double(), lambda t: t.bool(),
        lambda t: torch.empty(0),
    ):  # fmt: skip
        request = site.visit(repeat=1)
        parts = {p: {n: bad(t) for n, t in tree.items()} for p, tree in request.parts.items()}
        answer = site.program.answer(Message(request.kind, parts, request.facts))
        assert answer.kind in ("failed", "outcome")
    nothing = Message("visit", {}, site.visit().facts)
    refused(site.program.answer(nothing))
    answer = site.program.answer(site.visit())
    assert answer.kind == "outcome"
    assert not answer.facts["error"], answer.facts["error"]


def test_a_visit_that_is_asked_for_again_says_the_same_bytes_and_costs_epsilon_once(tmp_path):
    site = Federation(tmp_path, "{epsilon_per_day: 100, evaluate: true}")
    site.begin()
    first = encode(site.program.answer(site.visit()))
    booked = site.program.guard.meter.today().events
    assert [e.count for e in booked] == [1]
    for _ in range(3):
        site.start()  # also by another process
        assert encode(site.program.answer(site.visit())) == first
    assert site.program.guard.meter.today().events == booked
    assert encode(site.program.answer(site.visit(repeat=1))) != first
    assert [e.count for e in site.program.guard.meter.today().events] == [2]


def test_without_noise_nothing_leaves_that_would_break_the_budget(tmp_path):
    site = Federation(tmp_path, "{epsilon_per_day: 1}")
    site.begin()
    refused(site.program.answer(site.visit()), "epsilon")
    refused(site.ask("evaluate", **{**site.visit().facts, "part": "test"}), "Metrics")
    refused(site.ask(FIRST, run="r1", agreed={}))


def test_forged_agreements(site):
    summary = site.hello().facts["summary"]
    forged = [
        None, [], {}, {**summary, "shape": [1, 8, 9]}, {**summary, "shape": [1 << 20, 1 << 20, 1 << 20]},
        {**summary, "kind": "text"}, {**summary, "num_classes": None}, {**summary, "rows": [1, 2]},
        {**summary, "mean": "nan"}, {**summary, "mean": {"shape": [4], "values": [1.0]}},
        {**summary, "class_names": ["a"] * 10}, {**summary, "class_names": [str(i) for i in range(9)]},
        {**summary, "labelled": False}, {**summary, "dtype": "torch.object"},
    ]  # fmt: skip
    for agreed in forged:
        for kind in (FIRST, BEGIN):
            refused(site.ask(kind, run="r1", agreed=agreed))
    for mean in (None, {}, {"x": "nan"}, {"x": {"shape": [-1], "values": []}}, {"mean": float("nan")}):
        refused(site.ask(SECOND, run="r1", mean=mean))
    site.begin()


DEEP = "[" * 900 + "]" * 900


@pytest.mark.parametrize("fact", ["NaN", "Infinity", "-Infinity", "1e999", DEEP], ids=lambda f: f[:9])
def test_facts_that_could_not_be_written_again_are_no_message(fact):
    """The server writes what it has read, into its ledger and checkpoint."""
    text = json.dumps({"__metadata__": {"atoll": f'{{"kind": "delta", "facts": {{"x": {fact}}}}}'}}).encode()
    with pytest.raises(MessageError):
        decode(len(text).to_bytes(8, "little") + text)
    about = f'{{"kind": "delta", "facts": {{"x": {fact}}}, "order": {{}}, "bfloat16": []}}'
    with pytest.raises(MessageError):
        from_records(RecordDict({"atoll": ConfigRecord({"message": about})}))


def test_an_array_whose_header_is_not_python_is_no_message():
    records = to_records(Message("delta", {"w": {"x": torch.zeros(2)}}))
    data = records.array_records["w"]["x"].data
    records["w"] = ArrayRecord({"x": Array("float32", (2,), "numpy.ndarray", data[:60] + b"(" * 60 + data[120:])})
    with pytest.raises(MessageError, match="not an array of numbers"):
        from_records(records)


def test_what_a_stranger_says_is_one_line_that_a_terminal_can_show():
    row = Row(0)
    row.refuse(1, "\x1b[2J\x07all\nis \ud800 well\r" + "x" * 10_000)
    assert row.refused[1].startswith("?[2J?all is ? well")
    assert row.refused[1].isprintable()
    assert len(row.refused[1]) == 1000


@pytest.mark.parametrize("length", [b"9" * 5000, b"-1", b"0x10", b"1e3", b"", b"67108865"])
def test_the_door_of_the_superlink_answers_to_odd_lengths(length):
    said: list[dict] = []

    async def send(event: dict) -> None:
        said.append(event)

    scope = {"type": "http", "path": "/v1/fleet/pull-messages", "headers": [(b"content-length", length)]}
    asyncio.run(Door(None, b"token")(scope, None, send))
    assert said[0]["status"] == 413


@pytest.mark.parametrize(
    "entry",
    [
        {"bytes": 1e999}, {"bytes": -1}, {"bytes": True}, {"day": "never"}, {"day": None}, {"event": []},
        {"event": {"multiplier": -1.0, "sampling": {}, "count": 1}},
        {"event": {"multiplier": 1e999, "sampling": {}, "count": 1}},
        {"event": {"multiplier": 1.0, "sampling": {}, "count": -1}},
    ],
    ids=str,
)  # fmt: skip
def test_nothing_leaves_while_the_book_is_damaged(entry, tmp_path):
    path = tmp_path / "book.jsonl"
    path.write_text(json.dumps({"day": "2026-01-01", "bytes": 1, "event": None, "about": "", **entry}) + "\n")
    with pytest.raises(RunError, match="damaged"):
        Meter(path).book(Policy(), 1)


def test_a_request_whose_pieces_do_not_fit_is_left_and_the_site_goes_on():
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    flower = FlowerMessage(to_records(Message("visit")), 1, "query")
    pieces = dict.fromkeys(get_all_nested_objects(flower), b"Array\x00[]")
    taken = Taken.__new__(Taken)
    taken.node, taken._context = 1, SimpleNamespace(run_id=1)
    taken._client = SimpleNamespace(
        PullObject=lambda r: PullObjectResponse(
            object_found=True, object_available=True, object_content=pieces[r.object_id]
        )
    )
    with pytest.raises(LinkLost, match="cannot be put together"):
        taken._read(get_object_tree(flower), Limits(), lambda: True)


def test_files_that_cannot_be_written_end_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/run"):
        join = ["join", "--server", "127.0.0.1:1", "--key", "k", "--rehearse", "--out", str(tmp_path / folder)]
        done = subprocess.run(
            [sys.executable, "-c", "from atoll.cli import main; main()", *join],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr
