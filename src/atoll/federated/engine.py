"""The round loop. It knows protocols, never a method's name.

:func:`federate` is a generator: each ``next`` is one merge. Everything that must survive a crash is in
:class:`RunState`; the loop commits it after every merge, when asked to.
"""

from __future__ import annotations

import heapq
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from atoll.core.errors import AtollError, BadReply, RunError
from atoll.core.message import Message, detach, encoded_size
from atoll.core.streams import numpy_stream
from atoll.core.tree import moved
from atoll.federated.broadcasts import Broadcasts
from atoll.federated.check import check_method
from atoll.federated.devices import Devices
from atoll.federated.ledger import Row
from atoll.federated.method import Broadcast, DeviceProfile, MergeContext, Method, Reply, SiteInfo
from atoll.federated.run_state import Flight, RunState, on_device
from atoll.federated.secure.cohort import CHANNEL, COHORT, SESSION
from atoll.federated.secure.server import SecureRound, channel_key
from atoll.federated.select.uniform import available
from atoll.federated.visit import Job, Outcome, Setup, decode_chain

DEFAULT_REPLY_LIMIT = 4 << 30


class Engine:
    """Runs a method on a backend; also what a schedule sees as its fleet."""

    def __init__(
        self, setup: Setup, workers: Any, state: RunState | None = None, reply_limit: int = DEFAULT_REPLY_LIMIT
    ) -> None:
        self.setup, self.method, self.workers = setup, setup.method, workers
        self.reply_limit = reply_limit
        self.sites: Sequence[SiteInfo] = [setup.info(i) for i in range(len(setup.federation.sites))]
        self.dropped_tags: list[tuple[int, str]] = []
        self.row = Row(0)
        self._sum: SecureRound | None = None
        self._session = secrets.token_hex(SESSION // 2)
        self.state = RunState() if state is None else on_device(state, setup.device)
        self.broadcasts = Broadcasts(setup, workers, self.state)
        if state is None:
            self._open()
        else:
            flying = ((f.site, f.outcome.state_tag) for f in self.state.flights.values() if f.outcome is not None)
            workers.local.states.sweep({*self.state.tags.items(), *((s, tag) for s, tag in flying if tag)})
            self.broadcasts.again()

    # ---------------------------------------------------------------- rounds

    def _open(self) -> None:
        s, m = self.state, self.method
        at = self.workers.local.site_model(None)
        s.replica = s.site_replica = m.share.initial(at.model)
        s.server = m.server.init(s.replica)
        self.broadcasts.move(m.server.open(s.replica))

    def step(self) -> Row:
        """One merge: collect replies, combine, let the server act, broadcast."""
        s, m = self.state, self.method
        started = time.perf_counter()
        self.row, self._sum = Row(s.round), None
        self.row.relayed_bytes = self.broadcasts.bytes * m.topology.relays(len(self.sites))
        drawn = not s.broadcast.everyone and not self._asked() and all(i.profile.availability >= 1 for i in self.sites)
        replies = _Counted(m.schedule.collect(self))
        context, tags = self.context(), dict(s.tags)
        try:
            first = next(replies, None)
            if first is None:
                self.row.note("no usable reply: the model stays as it is")
            else:
                combined = self._combine(_chain(first, replies), context)
                for _ in replies:
                    pass  # a combiner may stop early; the schedule must not
                context = replace(context, replies=replies.count)
                broadcast, s.server = m.server.step(s.replica, s.server, combined, context)
                for said in broadcast.notes:
                    self.row.note(said)
        except RunError:
            raise  # the backend itself has failed: the run stops, and can be resumed
        except AtollError as e:
            self.row.note(f"merge skipped: {e}")
            first = None
            for _ in replies:
                pass  # land what is due, or it would mix with the next round
            self._roll_back(tags)
        for flight in s.flights.values():
            self._ground(flight)  # the workers' buffers and replica are about to change
        s.round += 1
        s.cohorts.append((replies.count, len(self.row.down_bytes), drawn))
        if first is not None:
            self.broadcasts.move(broadcast)
        else:
            self.broadcasts.stay()
        self.row.replies, self.row.time = replies.count, s.now
        self.row.seconds = time.perf_counter() - started
        return self.row

    def _combine(self, replies: Iterator[Reply], context: MergeContext) -> Message:
        if self._sum is None:
            topology = self.method.topology
            combined, carried = topology.combine(self.method.combine, replies, context)
            self.row.relayed_bytes += carried
            return combined
        for reply in replies:
            self._sum.add(reply.site, reply.message)
        answers = self._ask(self._sum.unmasking())
        self._sum.unmask(answers, lambda site, why: self.row.note(f"site {site} did not help to unmask: {why}"))
        sums, weight = self._sum.total()
        sums = replace(sums, parts=moved(sums.parts, self.setup.device))
        return self.method.combine.total(sums, weight)

    def _roll_back(self, tags: dict[int, str]) -> None:
        """Nothing of this merge counted, so sites keep what they had before it (control variates must fit the
        server's, say)."""
        kept = set(tags.items())
        unwanted = [item for item in self.state.tags.items() if item not in kept]
        self.dropped_tags = [item for item in self.dropped_tags if item not in kept] + unwanted
        self.state.tags = tags

    def context(self) -> MergeContext:
        s, setup = self.state, self.setup
        dry = getattr(self.workers, "dry", False)
        buffers = self.workers.local.site_model(None).buffers
        public = setup.federation.public
        num_samples = sum(i.num_samples for i in self.sites)
        return MergeContext(
            s.round, s.replica, len(self.sites), setup.seed, setup.task, public, dry=dry, buffers=buffers,
            num_samples=num_samples,
        )  # fmt: skip

    # ---------------------------------------------------------------- the fleet, as a schedule sees it

    @property
    def now(self) -> float:
        return self.state.now

    @property
    def round(self) -> int:
        return self.state.round

    @property
    def in_flight(self) -> dict[int, Flight]:
        return self.state.flights

    def select(self) -> list[int]:
        s = self.state
        if s.broadcast.everyone:
            return [i.site for i in self.sites]
        return self._asked() or self.method.select.choose(s.round, self.sites, self.setup.seed)

    def _asked(self) -> list[int]:
        """The sites that the broadcast wants, unless they have been asked and nothing came of it."""
        s = self.state
        return sorted(s.broadcast.asks) if s.sent == s.round else []

    def pick_idle(self, count: int) -> list[int]:
        here = available(self.state.round, self.sites, self.setup.seed)
        idle = [site for site in here if site not in self.state.flights]
        drawn = numpy_stream(self.setup.seed, "idle", self.state.starts).permutation(len(idle))
        return sorted(idle[i] for i in drawn[: max(0, count)])

    def start(self, sites: Sequence[int]) -> None:
        s, jobs, cohort = self.state, [], len(sites)
        if self.method.secure is not None and sites:
            sites, cohort = self._prepare(sites)
        for site in sites:
            last_round, repeat = s.visits.get(site, (-1, 0))
            repeat = repeat + 1 if last_round == s.round else 0
            s.visits[site] = (s.round, repeat)
            s.starts += 1
            down, missing = self.broadcasts.download(site)
            told = self._sum.told(site) if self._sum is not None else None
            if told is not None:
                down += encoded_size(told.message(COHORT))
            s.seen[site] = s.round
            self.row.down(site, down)
            flight = Flight(site, s.round, repeat, s.now, self._bound(site, down), down)
            s.flights[site] = flight
            own = s.broadcast.per_site.get(site)
            tag = s.tags.get(site)
            jobs.append((flight, Job(site, s.round, repeat, cohort, own, tag, missing, secure=told)))
        tickets = self.workers.submit([job for _, job in jobs])
        for (flight, _), ticket in zip(jobs, tickets, strict=True):
            flight.ticket = ticket

    def _prepare(self, sites: Sequence[int]) -> tuple[list[int], int]:
        """Open a secure sum: the sites that are in it, and how many it was opened for."""
        s, workers = self.state, self.workers
        for site, answer in self._ask({i: Message(CHANNEL) for i in sites if i not in s.channels}).items():
            try:
                s.channels[site] = channel_key(answer)
            except AtollError as e:
                self.row.refuse(site, str(e))
        channels = {i: s.channels[i] for i in sites if i in s.channels}
        form = workers.local.form(sites[0], len(sites))  # of this round: a method may have phases
        dry = getattr(workers, "dry", False)
        self._sum = SecureRound(self.method, self._session, s.round, channels, form, dry)
        self._sum.prepared(self._ask(self._sum.preparing()), self.row.refuse)
        return list(self._sum.cohort.keys), len(channels)

    def _ask(self, requests: dict[int, Message]) -> Mapping[int, Message | str]:
        """Put a question to sites, outside of visits; the clock moves to the last answer."""
        answers: Mapping[int, Message | str] = self.workers.ask(requests) if requests else {}
        last = 0.0
        for site, request in requests.items():
            answer, profile = answers[site], self.sites[site].profile
            down, up = encoded_size(request), encoded_size(answer) if isinstance(answer, Message) else 0
            self.row.down(site, down)
            if up:
                self.row.up(site, up)
            last = max(last, down / profile.down_bytes_per_second + up / profile.up_bytes_per_second)
        self.state.now += last
        return answers

    def _bound(self, site: int, down: int) -> float:
        profile: DeviceProfile = self.sites[site].profile
        return self.state.now + down / profile.down_bytes_per_second

    def _resolve(self, flight: Flight) -> None:
        """Wait for a flight's outcome, take the reply out of the worker's buffer, and set its arrival time."""
        if flight.outcome is None:
            outcome = self.workers.result(flight.ticket)
            flight.outcome = outcome
            if outcome.message is not None:
                flight.reply = outcome.message
            self._arrival(flight, outcome)

    def _ground(self, flight: Flight) -> None:
        """Resolve a flight that may wait for long, with a reply of its own."""
        self._resolve(flight)
        if flight.reply is not None and flight.ticket >= 0:
            flight.reply = detach(flight.reply)
            self.workers.release(flight.ticket)
            flight.ticket = -1

    def _arrival(self, flight: Flight, outcome: Outcome) -> None:
        profile = self.sites[flight.site].profile
        flight.up_bytes = encoded_size(outcome.message) if outcome.message is not None else 0
        flight.finish += outcome.flops / profile.flops_per_second + flight.up_bytes / profile.up_bytes_per_second

    def all_arrivals(self) -> Iterator[Reply]:
        latest = self.state.now
        for site in sorted(self.state.flights):
            flight = self.state.flights[site]
            reply = self._land(flight)
            latest = max(latest, flight.finish)
            if reply is not None:
                yield reply
                self.workers.release(flight.ticket)
        self.state.now = latest

    def _earliest(self) -> Flight | None:
        heap = [(f.finish, f.site) for f in self.state.flights.values()]
        heapq.heapify(heap)
        while heap:
            _, site = heapq.heappop(heap)
            flight = self.state.flights[site]
            if flight.outcome is not None:
                return flight
            self._ground(flight)  # its time was a lower bound: now it may come later than others
            heapq.heappush(heap, (flight.finish, site))
        return None

    def next_time(self) -> float:
        flight = self._earliest()
        return math.inf if flight is None else max(self.state.now, flight.finish)

    def next_arrival(self) -> Reply | None:
        flight = self._earliest()
        if flight is None:
            return None
        self.state.now = max(self.state.now, flight.finish)
        return self._land(flight)

    def wait_until(self, time: float) -> None:
        self.state.now = max(self.state.now, time)

    def arrivals_until(self, time: float) -> Iterator[Reply]:
        for flight in self.state.flights.values():
            self._ground(flight)  # to know when they finish, all must be done: more than a pool has buffers for
        due = [f for f in self.state.flights.values() if f.finish <= time + 1e-9]
        everything = len(due) == len(self.state.flights)
        for flight in sorted(due, key=lambda f: f.site):
            reply = self._land(flight)
            if reply is not None:
                yield reply
                self.workers.release(flight.ticket)
        last = max((f.finish for f in due), default=time)
        self.wait_until(min(time, last) if everything else time)

    def drop_in_flight(self, reason: str) -> None:
        for site in list(self.state.flights):
            flight = self.state.flights.pop(site)
            self._resolve(flight)
            self.workers.release(flight.ticket)
            self.row.refuse(site, reason)
            self._forget(flight)

    def _land(self, flight: Flight) -> Reply | None:
        """Take a flight out of the air: decode, check, account. None when the visit or its reply is no good."""
        s = self.state
        self._resolve(flight)
        del s.flights[flight.site]
        outcome = flight.outcome
        assert outcome is not None
        self.row.visit(flight.site, outcome)
        try:
            if outcome.error or flight.reply is None:
                raise BadReply(outcome.error or "no reply")
            self.row.up(flight.site, flight.up_bytes)
            if flight.up_bytes > self.reply_limit:
                raise BadReply(f"the reply has {flight.up_bytes:,} bytes, over the limit of {self.reply_limit:,}")
            message = self._read(flight.reply)
        except Exception as e:  # a hostile message may break a codec in ways that nobody foresaw
            foreseen = isinstance(e, AtollError)
            self.row.refuse(flight.site, str(e) if foreseen else f"unreadable reply ({type(e).__name__}: {e})")
            self._forget(flight)
            self.workers.release(flight.ticket)
            return None
        if outcome.state_tag is not None:
            old = s.tags.get(flight.site)
            if old is not None:
                self.dropped_tags.append((flight.site, old))
            s.tags[flight.site] = outcome.state_tag
        staleness = s.round - flight.round
        return Reply(flight.site, message, outcome.num_samples, staleness, flight.finish - flight.started)

    def _read(self, reply: Message) -> Message:
        """A reply, decoded and checked; masked ones have nothing but a form."""
        if self._sum is not None:
            self._sum.check(reply)
            return reply
        message = decode_chain(self.method.uplink, reply)
        if not message.finite():
            raise BadReply("the reply holds NaN or infinite numbers")
        self.method.share.check(message, self.state.replica)
        return message

    def _forget(self, flight: Flight) -> None:
        """The state that a refused visit wrote will never be read."""
        if flight.outcome is not None and flight.outcome.state_tag is not None:
            self.dropped_tags.append((flight.site, flight.outcome.state_tag))

    # ---------------------------------------------------------------- after a merge

    def commit(self) -> None:
        """Drop site states that nothing refers to any more (call it once the checkpoint is safe)."""
        for site, tag in self.dropped_tags:
            self.workers.local.states.drop(site, tag)
        self.dropped_tags.clear()

    def evaluate_global(self) -> dict[str, float]:
        """Metrics of the global model on the common test set; {} when sites keep private tensors (no global model)."""
        worker, s = self.workers.local, self.state
        if worker.site_model(None).split.private or not len(self.setup.federation.test):
            return {}
        worker.publish(self.method.server.result(s.replica, s.server))
        out: dict[str, float] = worker.evaluate(None, None)
        worker.publish(s.site_replica)
        return out

    def conclude(self) -> None:
        """After the last merge: everybody gets what the run ends with, where that is not what they hold already."""
        s = self.state
        result = self.method.server.result(s.replica, s.server)
        if result is not s.replica:
            self.broadcasts.move(Broadcast(self.method.share.snapshot(result)), later=1)

    def evaluate_sites(self, part: str = "test") -> dict[int, dict[str, float]]:
        """Metrics of every site's model on its own ``part``, or on the common test set (``"common"``)."""
        tags = self.state.tags
        out = self.workers.evaluate([(i.site, tags.get(i.site)) for i in self.sites], part)
        return {i.site: metrics for i, metrics in zip(self.sites, out, strict=True)}


class _Counted:
    """An iterator that counts what it has given."""

    def __init__(self, replies: Any) -> None:
        self._iterator, self.count = iter(replies), 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> Reply:
        reply: Reply = next(self._iterator)
        self.count += 1
        return reply


def _chain(first: Reply, rest: Iterator[Reply]) -> Iterator[Reply]:
    yield first
    yield from rest


def open_engine(setup: Setup, backend: Any, state: RunState | None = None, **options: Any) -> Engine:
    """Check the composition, arrange the topology, start the workers."""
    check_method(setup.method, setup.task, setup.federation)
    workers = backend.open(setup)
    try:
        return Engine(setup, workers, state, **options)
    except BaseException:
        workers.close()
        raise


def federate(
    task: Any,
    federation: Any,
    method: Method,
    *,
    rounds: int,
    seed: int = 0,
    backend: Any = None,
    evaluate_every: int = 1,
    devices: Devices | None = None,
    on_merge: Callable[[Engine, Row], None] | None = None,
    reply_limit: int = DEFAULT_REPLY_LIMIT,
    **setup: Any,
) -> Iterator[Row]:
    """Run ``rounds`` merges and yield a ledger row after each. The row's ``engine`` holds the model.

    Args:
        devices: makes the sites' device profiles, unless ``profiles`` lists them; None: all alike.

    Example:
        >>> for row in federate(task, federation, fedavg(), rounds=3):
        ...     print(row.round, row.metrics)
    """
    from atoll.federated.backends.inline import Inline

    method = method.but(local=method.local.over(rounds))
    federation = method.topology.arrange(federation)
    num_sites = len(federation.sites)
    profiles = setup.pop("profiles", None)
    if profiles is None:
        profiles = devices.profiles(num_sites, seed) if devices else (DeviceProfile(),) * num_sites
    full = Setup(task=task, federation=federation, method=method, profiles=profiles, seed=seed, **setup)
    engine = open_engine(full, backend or Inline(), reply_limit=reply_limit)
    try:
        for r in range(rounds):
            row = engine.step()
            if evaluate_every and ((r + 1) % evaluate_every == 0 or r + 1 == rounds):
                row.metrics = engine.evaluate_global()
            if on_merge is not None:
                on_merge(engine, row)
            engine.commit()
            row.engine = engine
            if r + 1 == rounds:
                engine.conclude()
            yield row
    finally:
        engine.workers.close()
