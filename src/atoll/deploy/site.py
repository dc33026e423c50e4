"""A site's own program: it answers what the server asks, within the site's rules.

The server sends a recipe, which is data; the site builds it from its own installed parts, reads its own rows, and
works as any other backend would. Nothing that comes over the wire is executed, no path or address in it is followed,
and each request is answered: with what was asked for, or with a sentence that says why not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from atoll.core.errors import AtollError, BadReply, DataError, MessageError
from atoll.core.files import write_atomic, write_json
from atoll.core.message import NO_LIMITS, Message, decode, encode, encoded_size, seal, unseal
from atoll.data.agreement import adopt, describe, first_moments, read_summary, second_moments
from atoll.data.dataset import Dataset, Federation, Info, SiteData
from atoll.data.federation import one_site
from atoll.deploy.guard import Guard, Refused
from atoll.federated.dispatch import failed
from atoll.federated.remote import RemoteSite
from atoll.federated.secure.vault import FileVault
from atoll.federated.states import FileStates
from atoll.federated.visit import Setup
from atoll.federated.wire import EVALUATE, OUTCOME, VISIT, Request, unpack
from atoll.federated.worker import Worker
from atoll.recipes.recipe import PATHS, Recipe, read_recipe, read_yaml
from atoll.recipes.run import export_model

HELLO, FIRST, SECOND, BEGIN, FINISH = "hello", "first moments", "second moments", "begin", "finish"
RUN = "[0-9a-zA-Z]{1,64}"
"""The name of a run names a folder at the site."""
PLACES = (*PATHS, "url", "query", "config")
"""Fields of a source that say where rows lie: a site takes them from its own operator only."""
MOST_SITES = 100_000
"""In a federation that a site takes part in: what it holds about the others grows with them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where this site's rows lie.

    Attributes:
        source: a path, or a source's fields such as ``{"name": "sql", "url": ..., "query": ...}``.
        rehearse: take this site's share of the recipe's own bundled data instead.
    """

    source: str | Mapping[str, Any] | None = None
    rehearse: bool = False


def read_place(data: str | None, rehearse: bool) -> Place:
    """What the operator said: a path, a ``.yaml`` file with a source's fields, or to rehearse."""
    if rehearse == (data is not None):
        raise DataError("Say where this site's rows are with --data, or try the federation out with --rehearse.")
    if data is not None and not Path(data).exists():
        raise DataError(f"There is no file or folder {data} (--data).")
    if data is None or not data.endswith((".yaml", ".yml")):
        return Place(data, rehearse)
    fields = read_yaml(Path(data), "a source is a mapping such as `name: sql`")
    if "name" not in fields:
        raise DataError(f"{data} must name a source, e.g. `name: sql`.")
    return Place(fields)


def with_own_rows(config: Any, place: Place) -> Recipe:
    """The server's recipe, with this site's own rows in the place of the server's."""
    if not isinstance(config, Mapping):
        raise MessageError("the server's recipe is no mapping")
    data = config.get("data")
    data = {"name": data} if isinstance(data, str) else dict(data) if isinstance(data, Mapping) else {}
    data = {k: v for k, v in data.items() if k not in PLACES}
    _stay_within(data, place.source if isinstance(place.source, Mapping) else {})
    if isinstance(place.source, Mapping):
        data = {**({} if "name" in place.source else data), **place.source}
    elif place.source is not None:
        data["path"] = place.source
    return read_recipe({**config, "data": data, "backend": "inline"}, "the server's recipe")


def _stay_within(data: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse what would lead out of the place that the operator has named."""
    tokenizer, pattern = data.get("tokenizer", "bytes"), data.get("pattern", "*")
    if "tokenizer" not in own and tokenizer not in ("bytes", "bpe"):
        raise Refused("The recipe names a tokenizer's file, which a site takes from its own operator only.")
    if "pattern" not in own and (not isinstance(pattern, str) or ".." in pattern or pattern.startswith(("/", "~"))):
        raise Refused("The recipe's `pattern` leads out of the folder that this site has opened.")


def read_rows(recipe: Recipe, place: Place, site: int, sites: int) -> tuple[SiteData, bool, Any]:
    """This site's rows, whether mean and scale must be fitted to all sites' rows, and the tokenizer of text."""
    if place.rehearse:
        federation = recipe.federation()
        if len(federation.sites) != sites:
            raise DataError(f"the recipe makes {len(federation.sites)} sites, but {sites} take part")
        return federation.sites[site], False, federation.tokenizer
    loaded = recipe.data.load()
    own = one_site(loaded, site, seed=recipe.seed, validation=recipe.validation, test=recipe.test)
    return own, loaded.fit, loaded.tokenizer


class SiteProgram:
    """Answers for one site, across any number of runs.

    Args:
        folder: keeps what the site must remember, readable by its owner alone.
        place: of its rows.
        guard: the site's rules.
        device: where its tensors live.
    """

    def __init__(self, folder: Path, place: Place, guard: Guard, device: str = "cpu", threads: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder, self.place, self.guard, self.device, self.threads = folder, place, guard, device, threads
        self._joined: dict[str, _Joined] = {}
        self.trouble = ""
        torch.set_num_threads(threads)

    def answer(self, message: Message) -> Message:
        """The answer to a request from the server; never raises for anything that came over the wire.

        What the site's own files made go wrong stays here: the server hears that there was something, the operator
        what it was (``self.trouble``).
        """
        self.trouble = ""
        try:
            return self._answer(message)
        except (Refused, MessageError, BadReply) as e:
            return failed(str(e))
        except AtollError as e:
            self.trouble = str(e)
            return failed("this site cannot take part; its operator sees why")
        except Exception as e:  # a hostile request may break what nobody foresaw
            self.trouble = f"{type(e).__name__}: {e}"
            return failed(f"the site could not answer ({type(e).__name__})")

    def _answer(self, message: Message) -> Message:
        steps: dict[str, Callable[[Message], Message]] = {
            HELLO: self._hello, FIRST: self._first, SECOND: self._second, BEGIN: self._begin,
        }  # fmt: skip
        if message.kind in steps:
            return steps[message.kind](message)
        if message.kind in (VISIT, EVALUATE, FINISH):
            request = unpack(replace(message, kind=VISIT if message.kind == FINISH else message.kind))
            return self._run(request.run).answer(message, request)
        return self._run(_text(message, "run")).ask(message)

    # ---------------------------------------------------------------- taking part

    def _hello(self, message: Message) -> Message:
        """Read the recipe, check it against the rules, load the rows and describe them."""
        run, site, sites = _text(message, "run"), _count(message, "site"), _count(message, "sites")
        if not re.fullmatch(RUN, run) or site >= sites:
            raise MessageError("the server's greeting is malformed")
        if sites > MOST_SITES:
            raise Refused(f"A federation of {sites:,} sites is more than this site takes part in ({MOST_SITES:,}).")
        recipe = with_own_rows(message.facts.get("recipe"), self.place)
        self.guard.recipe(recipe, sites)
        own, fit, tokenizer = read_rows(recipe, self.place, site, sites)
        self.guard.rows(recipe, own)
        summary = describe(own, fit=fit, tokenizer=tokenizer)
        self._joined[run] = _Joined(self, run, site, sites, message.facts["recipe"], recipe, own)
        return self.leave(Message("summary", {}, {"summary": summary.facts()}))

    def _first(self, message: Message) -> Message:
        joined = self._greeted(message)
        joined.adopt(message)
        self.guard.sums(joined.own)
        return self.leave(Message("sums", {}, {"sums": first_moments(joined.own)}))

    def _second(self, message: Message) -> Message:
        joined, mean = self._greeted(message), message.facts.get("mean")
        self.guard.sums(joined.own)
        if not isinstance(mean, Mapping):
            raise MessageError("the server sent no mean")
        return self.leave(Message("sums", {}, {"sums": second_moments(joined.own, mean)}))

    def _begin(self, message: Message) -> Message:
        joined = self._greeted(message)
        joined.adopt(message)
        joined.keep(message.facts["agreed"])
        return Message("ready")

    def leave(self, answer: Message) -> Message:
        self.guard.again(encoded_size(answer), answer.kind)
        return answer

    def _greeted(self, message: Message) -> _Joined:
        run = _text(message, "run")
        if run not in self._joined:
            raise MessageError("the site does not know this run; greet it first")
        return self._joined[run]

    def _run(self, run: str) -> _Joined:
        """A run in which this site takes part, from its folder when this process has not seen it yet."""
        joined = self._joined.get(run)
        if joined is None:
            if not re.fullmatch(RUN, run):
                raise MessageError("the name of the run is malformed")
            path = self.folder / run / "begin.json"
            if not path.exists():
                raise MessageError("the site does not know this run; greet it first")
            kept = json.loads(path.read_text())
            recipe = with_own_rows(kept["recipe"], self.place)
            self.guard.recipe(recipe, kept["sites"])
            own, _, _ = read_rows(recipe, self.place, kept["site"], kept["sites"])
            self.guard.rows(recipe, own)
            joined = _Joined(self, run, kept["site"], kept["sites"], kept["recipe"], recipe, own)
            joined.own = adopt(own, read_summary(kept["agreed"], "the server"))
            self._joined[run] = joined
        return joined


class _Joined:
    """A run that the site has joined."""

    def __init__(
        self, program: SiteProgram, run: str, site: int, sites: int, config: Any, recipe: Recipe, own: SiteData
    ) -> None:
        self.program, self.name, self.site, self.sites = program, run, site, sites
        self.config, self.recipe, self.own = config, recipe, own
        self.folder = program.folder / run
        self._end: RemoteSite | None = None

    def adopt(self, message: Message) -> None:
        facts = message.facts.get("agreed")
        if not isinstance(facts, Mapping):
            raise MessageError("the server sent no agreement")
        self.own = adopt(self.own, read_summary(facts, "the server"))
        self._end = None

    def keep(self, agreed: Any) -> None:
        """Remember the run, so that the site can be started anew in the middle of it."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        facts = {"site": self.site, "sites": self.sites, "recipe": self.config, "agreed": agreed}
        write_json(self.folder / "begin.json", facts)

    @property
    def end(self) -> RemoteSite:
        if self._end is None:
            p = self.program
            setup = setup_of(self.recipe, {self.site: self.own}, self.sites, self.own.train.info)
            setup = replace(
                setup, device=p.device, threads=p.threads, timeout=p.guard.seconds(self.recipe.timeout),
                vault=FileVault(self.folder / "vault"),
            )  # fmt: skip
            with torch.device("meta"):  # a model without end is refused before it takes memory
                p.guard.model(setup.task.model(setup.seed, self.site))
            worker = Worker(setup, FileStates(self.folder / "states", durable=True))
            p.guard.model(worker.site_model(self.site).model)
            self._end = RemoteSite(worker, self.site, self.folder, self.name)
        return self._end

    # ---------------------------------------------------------------- requests

    def answer(self, message: Message, request: Request) -> Message:
        """Do a visit, evaluate, or finish. A visit that was done before is answered with the same bytes: another try
        would draw other noise, and two noisy answers say more than the rules allow for one."""
        guard = self.program.guard
        if message.kind == EVALUATE:
            guard.evaluation(self.own, request.part)
            return self.program.leave(self.end.handle(message))
        if message.kind == FINISH:
            return self._finish(request)
        job = request.job
        name = [request.run, job.site, job.round, job.repeat, job.secure.session if job.secure else ""]
        if (said := self._said(name)) is not None:
            return self.program.leave(said)
        guard.cohort(job.cohort, self.sites)
        answer = self.end.handle(message)
        if answer.kind == OUTCOME and answer.facts["message"] is not None:
            method, about = self.end.worker.setup.method, f"run {self.name}, round {job.round}"
            answer = guard.without_metrics(answer)
            size, kind = encoded_size(answer), answer.facts["message"]["kind"]
            guard.reply(method, kind, job.cohort, self.sites, size, about)
            self._say(name, answer)
        return answer

    def ask(self, message: Message) -> Message:
        """Answer a question that is not a visit: the phases of a secure sum."""
        facts = {name: fact for name, fact in message.facts.items() if name != "run"}
        return self.program.leave(self.end.handle(Message(message.kind, message.parts, facts)))

    def _say(self, name: list[Any], answer: Message) -> None:
        kept = Message(answer.kind, answer.parts, {"name": name, "facts": dict(answer.facts)})
        write_atomic(self.folder / "last.safetensors", encode(seal(kept)))

    def _said(self, name: list[Any]) -> Message | None:
        path = self.folder / "last.safetensors"
        if not path.exists():
            return None
        kept = unseal(decode(path.read_bytes(), NO_LIMITS))
        return Message(kept.kind, kept.parts, kept.facts["facts"]) if kept.facts["name"] == name else None

    def _finish(self, request: Request) -> Message:
        """Save this site's model: the global one, or its own where the method leaves parts of it here."""
        if not self.end.receive(request):
            return Message("lacks", {}, {"run": self.name, "site": self.site, "holds": self.end.version + 1})
        at, _ = self.end.worker.place(self.site, request.job.state_tag)
        share = self.end.worker.setup.method.share
        model = share.personal(at.model) if at.split.private else share.export(at.model, self.end.worker.replica)
        export_model(model, self.folder / "model", self.recipe, self.end.worker.setup, self.site)
        self._end = None  # an exported model is no longer one that trains
        return Message("finished", {}, {"run": self.name, "site": self.site})


def setup_of(recipe: Recipe, rows: Mapping[int, SiteData], sites: int, info: Info, **more: Any) -> Setup:
    """A federation of ``sites`` sites of which only some rows are here; the others are stand-ins without content."""
    nothing = stand_in(info, (0, 0, 0))
    federation = Federation(
        sites=tuple(rows.get(i, nothing) for i in range(sites)), test=nothing.test, info=info,
    )  # fmt: skip
    federation = replace(federation, **more)
    method = recipe.make_method(sites)
    return Setup(
        task=recipe.make_task(info), method=method, federation=method.topology.arrange(federation),
        profiles=recipe.devices.profiles(sites, recipe.seed), seed=recipe.seed, threads=recipe.threads,
        timeout=recipe.timeout,
    )  # fmt: skip


def stand_in(info: Info, rows: tuple[int, int, int]) -> SiteData:
    """Rows that are elsewhere: as many, of the right shape, and all zero. They take no memory."""

    def part(count: int) -> Dataset:
        kind = torch.int32 if info.kind == "text" else torch.float32
        columns = {"x": torch.zeros((1,) * (1 + len(info.shape)), dtype=kind).expand(count, *info.shape)}
        if info.kind != "text" or info.class_names:
            target = torch.int64 if info.num_classes is not None else torch.float32
            several = (info.targets,) if info.targets > 1 else ()
            columns["y"] = torch.zeros((1,) * (1 + len(several)), dtype=target).expand(count, *several)
        return Dataset(columns, info)

    return SiteData(*(part(n) for n in rows))


def _text(message: Message, name: str) -> str:
    value = message.facts.get(name)
    if not isinstance(value, str) or len(value) > 200:
        raise MessageError(f"`{name}` must be a text")
    return value


def _count(message: Message, name: str) -> int:
    value = message.facts.get(name)
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise MessageError(f"`{name}` must be a count")
    return value
