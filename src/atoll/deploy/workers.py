"""The backend of a real federation: visits run in the sites' own processes, behind Flower's wire.

It never changes the answer (``docs/architecture.md``, "Backends"). Sites come and go: a request whose answer was lost
on the way, because a node or the SuperLink died, is sent again, and a site answers the same request with the same
bytes. Only the time limit of a visit, or a site that stays away, makes a visit fail.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from atoll.core.errors import RunError, SiteFailed, one_line
from atoll.core.message import Message
from atoll.deploy.link import SIDE, LinkLost, Lost, NodeState, side_by_side
from atoll.deploy.site import FINISH
from atoll.federated.dispatch import FAILED, Dispatch
from atoll.federated.visit import Job, Outcome, Publication, Setup
from atoll.federated.worker import Worker

SOON, LATER = 0.02, 0.25  # seconds between looks for answers: more as the wait grows, so that it costs no more than 10%
NODES = 1.0  # seconds between looks for nodes
TRIES = 10  # requests whose answer went astray, until it is the site's fault
HELD = 1 << 28  # bytes of answers that wait for their turn; the others wait at the SuperLink
REPEAT = 900.0  # seconds after which a request without an answer is sent again: a site answers it with the same bytes
TTL = 7 * 24 * 3600.0  # seconds; a site that is away for longer has its request sent again


class Link(Protocol):
    """What carries requests to sites: :class:`~atoll.deploy.server.Supervisor` in a federation."""

    def nodes(self) -> Mapping[int, NodeState]:
        """By site number, the nodes that the SuperLink knows."""

    def send(self, site: int, message: Message, ttl: float) -> str:
        """May be called from several threads."""

    def take(self, numbers: Sequence[str]) -> Any: ...

    def beat(self) -> None: ...

    def mend(self) -> None:
        """Connect again after :class:`LinkLost`. All requests on their way are forgotten."""

    def close(self) -> None: ...


class NoStates:
    """The server keeps no state of any site."""

    def get(self, site: int, tag: str) -> Message:
        raise RunError(f"The state of site {site} lies at the site; the server has none.")

    def put(self, site: int, tag: str, state: Message) -> None:
        raise RunError(f"The state of site {site} lies at the site; the server keeps none.")

    def drop(self, site: int, tag: str) -> None:
        """Sites drop what the next request no longer names."""

    def sweep(self, keep: set[tuple[int, str]]) -> None:
        """Sites drop what the next request no longer names."""


@dataclass(slots=True)
class Call:
    """A request and what has become of it."""

    site: int
    build: Callable[[bool], Message]
    limit: float | None
    began: float
    number: str = ""
    sent: float = 0.0
    activated: str = ""
    lacking: bool = False
    tries: int = 0
    away: float = 0.0
    answer: Message | str | None = None


@dataclass(slots=True)
class Switchboard:
    """Calls to sites over a link that may break.

    Args:
        patience: seconds after which a site that is away counts as failed.
    """

    link: Link
    patience: float
    counts: Counter[str] = field(default_factory=Counter)
    _open: dict[int, Call] = field(default_factory=dict)
    _late: set[str] = field(default_factory=set)
    _next: int = 0
    _nodes: Mapping[int, NodeState] = field(default_factory=dict)
    _looked: float = 0.0
    _largest: int = 0
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(SIDE))

    def call(self, requests: Iterable[tuple[int, Callable[[bool], Message]]], limit: float | None = None) -> list[int]:
        """Ask sites; a request is made by its function (True: the site lacks broadcasts). Returns a ticket for each."""
        tickets = []
        for site, build in requests:
            tickets.append(self._next)
            self._open[self._next] = Call(site, build, limit, time.monotonic())
            self._next += 1
        self._pump()
        return tickets

    def wait(self, ticket: int) -> Message | str:
        """The answer, or why there is none."""
        call, pause = self._open[ticket], SOON
        while call.answer is None:
            if self._pump(call):
                pause = SOON
            elif call.answer is None:
                time.sleep(pause)
                pause = min(1.1 * pause, LATER)
        del self._open[ticket]
        return call.answer

    def here(self) -> set[int]:
        """The sites that are online. Asked now and then, it keeps the link alive while there is nothing to call."""
        self._pump()
        return {site for site, node in self._nodes.items() if node.online}

    def _pump(self, awaited: Call | None = None) -> bool:
        """Move every call on by what can be done without waiting; whether there was an answer."""
        news = False
        try:
            self.link.beat()
            self._look()
            for _ in side_by_side(self._pool, self._send, [c for c in self._open.values() if self._due(c)]):
                self.link.beat()
            asked = {c.number: c for c in self._asked(awaited)}
            for number, found in self.link.take([*asked, *self._late]):
                news = news or isinstance(found, Message)
                if number in asked:
                    self._take(asked[number], found)
                elif number in self._late:
                    self._late.discard(number)
                    self.counts["late answers"] += isinstance(found, Message)
                self.link.beat()
        except LinkLost:
            self.counts["links lost"] += 1
            self.link.mend()
            self._late.clear()
            for c in self._open.values():
                c.number = ""
        for c in self._open.values():
            if c.answer is None:
                self._give_up(c)
        return news

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked >= NODES:
            self._nodes, self._looked = self.link.nodes(), now

    def _due(self, c: Call) -> bool:
        """Whether its request should be sent: for the first time, or again because its node was started anew or it may
        have been lost on a connection that broke in silence."""
        node = self._nodes.get(c.site)
        if c.answer is not None or node is None or not node.online:
            return False
        return not c.number or c.activated != node.activated or time.monotonic() - c.sent > REPEAT

    def _send(self, c: Call) -> None:
        """In a thread of its own; nobody else touches the call meanwhile."""
        if c.number:
            self._late.add(c.number)  # its node has forgotten it; or it answers twice
            self.counts["requests sent again"] += 1
        c.sent = time.monotonic()
        c.number, c.activated = self.link.send(c.site, c.build(c.lacking), TTL), self._nodes[c.site].activated

    def _asked(self, awaited: Call | None) -> list[Call]:
        """The calls whose answers we take now: the awaited one always, and others in order while there is room."""
        waiting = [c for c in self._open.values() if c.number and c.answer is None]
        held = sum(c.answer is not None for c in self._open.values())
        room = max(SIDE, HELD // self._largest if self._largest else 0) - held
        first = [c for c in waiting if c is awaited]
        return first + [c for c in waiting if c is not awaited][: max(0, room - len(first))]

    def _take(self, c: Call, found: Message | Lost) -> None:
        if isinstance(found, Message):
            self._largest = max(self._largest, found.payload_bytes)
        if isinstance(found, Lost):
            c.tries += 1
            if found.again and c.tries < TRIES:
                self.counts["requests sent again"] += 1
                c.number, self._looked = "", 0.0  # its node may be gone: what we know of it is old
            else:
                self.counts["answers refused"] += 1
                c.answer = found.why
        elif found.kind == FAILED:
            c.answer = one_line(found.facts.get("error", "")) or "it failed and did not say why"
        elif found.kind == "lacks" and not c.lacking:
            self.counts["whole replicas sent again"] += 1
            c.lacking, c.number = True, ""
        else:
            c.answer = found

    def _give_up(self, c: Call) -> None:
        now, node = time.monotonic(), self._nodes.get(c.site)
        if node is not None and node.online:
            c.away = now
        away = now - max(c.away, c.began)
        if c.limit is not None and now - c.began > c.limit:
            c.answer = f"no answer within {c.limit:g} s"
        elif away > self.patience:
            c.answer = f"the site has been away for {away:.0f} s"
        if c.answer is not None and c.number:
            self._late.add(c.number)


class DeployedWorkers:
    """See :class:`~atoll.federated.backends.inline.InlineWorkers` for the contract."""

    def __init__(self, setup: Setup, board: Switchboard, run: str) -> None:
        self.setup, self.board = setup, board
        self.local = Worker(setup, NoStates())
        self.dispatch = Dispatch(setup.method.share, run)
        self._jobs: dict[int, Job] = {}

    def publish(self, publication: Publication) -> None:
        self.local.publish(publication.replica)
        self.dispatch.publish(publication)

    def submit(self, jobs: Sequence[Job]) -> list[int]:
        tickets = self.board.call([(job.site, self._request(job)) for job in jobs], self.setup.timeout)
        self._jobs.update(zip(tickets, jobs, strict=True))
        return tickets

    def _request(self, job: Job, part: str | None = None) -> Callable[[bool], Message]:
        return lambda lacking: self.dispatch.request(job, part, lacking)

    def result(self, ticket: int) -> Outcome:
        return self.dispatch.outcome(self.board.wait(ticket), self._jobs.pop(ticket))

    def release(self, ticket: int) -> None:
        """Answers own their tensors."""

    def evaluate(self, sites: Sequence[tuple[int, str | None]], part: str) -> list[dict[str, float]]:
        """Metrics of each site, {} where a site is away or keeps them to itself."""
        jobs = [Job(site, self.dispatch.version, state_tag=tag) for site, tag in sites]
        tickets = self.board.call([(job.site, self._request(job, part)) for job in jobs], self.setup.timeout)
        return [self._metrics(self.board.wait(t), job) for t, job in zip(tickets, jobs, strict=True)]

    def _metrics(self, answer: Message | str, job: Job) -> dict[str, float]:
        try:
            return self.dispatch.metrics(answer, job)
        except SiteFailed:
            self.board.counts["evaluations without an answer"] += 1
            return {}

    def finish(self, tags: Mapping[int, str]) -> dict[str, Any]:
        """Bring the last broadcast to every site and have it save its model; which sites did, and what it took to
        reach them."""
        jobs = [Job(site, self.dispatch.version, state_tag=tags.get(site)) for site in range(len(self.setup.profiles))]
        tickets = self.board.call([(job.site, self._final(job)) for job in jobs], self.setup.timeout)
        answers = [self.board.wait(t) for t in tickets]
        saved = [job.site for job, a in zip(jobs, answers, strict=True) if isinstance(a, Message)]
        refused = {str(job.site): a for job, a in zip(jobs, answers, strict=True) if isinstance(a, str)}
        return {"saved": saved, "refused": refused, "wire": dict(self.board.counts)}

    def _final(self, job: Job) -> Callable[[bool], Message]:
        def build(lacking: bool) -> Message:
            request = self.dispatch.request(job, "test", lacking)
            return Message(FINISH, request.parts, {k: v for k, v in request.facts.items() if k != "part"})

        return build

    def ask(self, requests: Mapping[int, Message]) -> dict[int, Message | str]:
        """Put a question to sites, outside of any visit; a site must know of which run it is."""
        named = {s: Message(m.kind, m.parts, {**m.facts, "run": self.dispatch.run}) for s, m in requests.items()}
        tickets = self.board.call([(site, _always(m)) for site, m in named.items()], self.setup.timeout)
        return {site: self.board.wait(ticket) for site, ticket in zip(named, tickets, strict=True)}

    def close(self) -> None:
        self.board.link.close()


def _always(message: Message) -> Callable[[bool], Message]:
    return lambda _: message
