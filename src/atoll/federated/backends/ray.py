"""Actors of a Ray cluster, on this machine or on many; the same bits as :mod:`inline`.

For simulation: a cluster is one circle of trust, whose members run each other's code. Between organisations use a
deployment.

What is copied: the setup, data included, goes into Ray's object store once a run and reaches each node once; on a
node all actors read the rows where they lie. The replica goes there once a broadcast, in the wire encoding, and each
actor decodes a copy of its own. A reply comes back in the wire encoding and is copied once more, when its turn in the
sum has come. What a site keeps lies in files, so it survives the actor that wrote it.
"""

from __future__ import annotations

import itertools
import math
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt, Le

from atoll.core.errors import RunError, SiteFailed, first_line
from atoll.core.message import NO_LIMITS, Message, decode, detach, encode
from atoll.core.tree import moved
from atoll.federated.backends._ray_actor import share
from atoll.federated.backends._ray_crew import Crew, Seat
from atoll.federated.backends.process_pool import GRACE, SHORT
from atoll.federated.method import Backend
from atoll.federated.states import FileStates
from atoll.federated.visit import Job, Outcome, Publication, Setup
from atoll.federated.worker import Worker

START_LIMIT = 300.0  # seconds without a single actor, before we say that the cluster has no room
SPREAD = 4  # calls that each actor should still get while several visits go into one: the last ones even things out
TRIES = 2  # actors that a visit may outlive: its work is deterministic, so a second death is the site's own doing


@dataclass(frozen=True)
class Ray(Backend):
    """Run visits in lasting actors of a Ray cluster.

    Args:
        workers: actors; each asks for as many CPUs as it has threads. None takes what the cluster has.
        address: None starts a cluster on this machine and ends it with the run; ``auto`` or ``host:port`` joins one
            from a machine that belongs to it. What sites keep needs a run directory that all its machines see. A
            cluster that the program has joined already is used whatever stands here, and left as it is.
        held_bytes: about how much of the object store replies may fill that wait for their turn in the sum. Within
            it the longest visits start first; beyond it visits start in the order of the sum, so memory stays bounded.
        gpus: share of a GPU per actor where tensors live on GPUs; None divides the cluster's among the actors, at
            most one each.
    """

    workers: Annotated[int, Ge(1), Le(4096)] | None = None
    address: str | None = None
    held_bytes: Annotated[int, Ge(1)] = 1 << 30
    gpus: Annotated[float, Gt(0), Le(64)] | None = None

    def open(self, setup: Setup) -> RayWorkers:
        crew = Crew(self)
        try:
            return RayWorkers(setup, crew, lasting=False)
        except BaseException:
            crew.close()
            raise


class RayWorkers:
    """The driver's side. See :class:`~atoll.federated.backends.inline.InlineWorkers` for the contract."""

    def __init__(self, setup: Setup, crew: Crew, lasting: bool) -> None:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(setup.threads)
        crew.muster(setup)
        self._folder = Path(tempfile.mkdtemp(prefix="run-", dir=crew.folder))
        if setup.state_folder is None:
            setup = replace(setup, state_folder=self._folder / "states")
        assert setup.state_folder is not None
        self.setup, self._crew, self._lasting, self._ray = setup, crew, lasting, crew.ray
        self.local = Worker(setup, FileStates(setup.state_folder))
        folder = setup.state_folder.absolute()
        self._beacon, self._token = folder.with_name(f".{folder.name}.here"), secrets.token_hex(8)
        self._beacon.write_text(self._token)
        device = "cuda" if setup.device.startswith("cuda") else setup.device  # the one that Ray shows to the actor
        self._shared = self._ray.put(share(replace(setup, state_folder=folder, device=device)))
        self._replica: list[Any] = []
        self._version = 0
        self._work: dict[int, Job | tuple[Any, ...]] = {}
        self._waiting: dict[int, None] = {}
        self._done: dict[int, Any] = {}
        self._held: set[int] = set()
        self._home: dict[int, Seat] = {}
        self._deaths = Counter[int]()
        self._seat_of: dict[Any, Seat] = {}
        self._reply_size = 0
        self._seconds: dict[str, float] = {}  # of the last visits, evaluations and answers
        self._next = 0
        for seat in crew.seats:
            self._welcome(seat)

    # ------------------------------------------------------------------- the functions of the contract

    def publish(self, publication: Publication) -> None:
        self.local.publish(publication.replica)
        whole = Message("replica", publication.replica, {"parts": list(publication.replica)})
        self._replica = [self._ray.put(np.frombuffer(encode(whole), np.uint8))]
        self._version += 1

    def submit(self, jobs: Sequence[Job]) -> list[int]:
        tickets = self._queue(jobs)
        if len(jobs) * self._reply_size <= self._crew.about.held_bytes:
            size = {t: len(self.setup.federation.sites[j.site].train) for t, j in zip(tickets, jobs, strict=True)}
            self._waiting = dict.fromkeys(sorted(self._waiting, key=lambda t: -size.get(t, 0)))
        self._dispatch()
        return tickets

    def result(self, ticket: int) -> Outcome:
        outcome, wire = self._wait(ticket)
        if wire is not None:
            message = decode(wire, NO_LIMITS)  # copies: the store's memory is read-only
            message = replace(message, parts=moved(message.parts, self.setup.device))
            outcome = replace(outcome, message=message)
        assert isinstance(outcome, Outcome)
        return outcome

    def release(self, ticket: int) -> None:
        if ticket in self._held:
            self._held.discard(ticket)
            self._dispatch()

    def evaluate(self, sites: Sequence[tuple[int, str | None]], part: str) -> list[dict[str, float]]:
        tickets = self._queue([("_evaluate", site, tag, part) for site, tag in sites])
        answers = [self._wait(ticket) for ticket in tickets]
        for (site, _), found in zip(sites, answers, strict=True):
            if isinstance(found, str):
                raise SiteFailed(f"The model of site {site} could not be evaluated: {found}")
        return answers

    def ask(self, requests: Mapping[int, Message]) -> dict[int, Message | str]:
        tickets = self._queue([("_ask", site, bytes(encode(request))) for site, request in requests.items()])
        answers = [self._wait(ticket) for ticket in tickets]
        read = [a if isinstance(a, str) else detach(decode(a, NO_LIMITS)) for a in answers]
        return dict(zip(requests, read, strict=True))

    def close(self) -> None:
        if self._lasting:
            for seat in [s for s in self._crew.seats if s.calls]:
                self._crew.dismiss(seat)  # at work that nobody waits for
        else:
            self._crew.close()
        self._seat_of.clear()
        self._done.clear()
        self._beacon.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        torch.set_num_threads(self._threads)

    # ------------------------------------------------------------------- queue and actors

    def _queue(self, work: Sequence[Any]) -> list[int]:
        tickets = list(range(self._next, self._next + len(work)))
        self._next += len(work)
        self._work.update(zip(tickets, work, strict=True))
        self._waiting.update(dict.fromkeys(tickets))
        return tickets

    def _welcome(self, seat: Seat) -> None:
        """Tell an actor about the run. It gets no work before it has answered."""
        seat.ready, seat.since = False, time.monotonic()
        self._seat_of[seat.handle.open.remote(self._shared, self._beacon, self._token)] = seat

    def _dispatch(self, urgent: int | None = None) -> None:
        """Hand waiting work to actors that have room. ``urgent``: a ticket that somebody waits for."""
        for depth in range(2):
            for seat in self._crew.seats:
                if seat.ready and len(seat.calls) == depth and (tickets := self._take(seat, urgent)):
                    self._call(seat, tickets)

    def _take(self, seat: Seat, urgent: int | None) -> list[int]:
        """The tickets of an actor's next call: several, where each takes less time than a call. An actor that is busy
        gets its next one ahead of time only if it is short: who is free first takes long ones, which balances."""
        taken: list[int] = []
        while (ticket := self._choose(seat, urgent)) is not None:
            kind = self._kind(ticket)
            seconds = self._seconds.get(kind, math.inf)
            if taken:
                spread = SPREAD * len(self._crew.seats)
                if len(taken) * seconds > SHORT or len(taken) * spread > len(taken) + len(self._waiting):
                    break
                if kind != self._kind(taken[0]) or self._deaths[ticket] or self._deaths[taken[0]]:
                    break  # who has seen an actor die goes alone
            elif seat.calls and seconds > SHORT:
                break
            del self._waiting[ticket]
            taken.append(ticket)
            if kind == "_visit":
                self._held.add(ticket)
        return taken

    def _choose(self, seat: Seat, urgent: int | None) -> int | None:
        """What this actor should do next: rather the next site that it or nobody has served before than the next."""
        if urgent in self._waiting:
            return urgent
        count = len(self._crew.seats)
        if len(self._held) >= max(2 * count, self._crew.about.held_bytes // max(1, self._reply_size)):
            return None  # many replies wait for their turn: let the sum catch up
        near = list(itertools.islice(self._waiting, 2 * count))  # beyond it we would run ahead of the sum
        own = (t for t in near if self._home.get(self._site(t), seat) is seat)
        return next(own, near[0] if near and not seat.calls else None)

    def _call(self, seat: Seat, tickets: list[int]) -> None:
        orders = []
        for work in (self._work[t] for t in tickets):
            if isinstance(work, Job):
                own = bytes(encode(work.message)) if work.message is not None else None
                orders.append(("_visit", replace(work, message=None), own))
            else:
                orders.append(work)
        call = seat.handle.do.remote(self._version, self._replica, orders)
        if not seat.calls:
            seat.since = time.monotonic()
        seat.calls[call], self._seat_of[call] = tickets, seat
        self._home.update((self._site(t), seat) for t in tickets)

    def _kind(self, ticket: int) -> str:
        work = self._work[ticket]
        return "_visit" if isinstance(work, Job) else str(work[0])

    def _site(self, ticket: int) -> int:
        work = self._work[ticket]
        return work.site if isinstance(work, Job) else int(work[1])

    def _wait(self, ticket: int) -> Any:
        while ticket not in self._done:
            self._dispatch(urgent=ticket)
            calls = list(self._seat_of)
            if self._ray.wait(calls, num_returns=1, timeout=self._patience())[0]:
                for call in self._ray.wait(calls, num_returns=len(calls), timeout=0)[0]:
                    if call in self._seat_of:  # else its actor was found dead meanwhile
                        self._receive(call)
            self._end_late()
        self._deaths.pop(ticket, None)
        del self._work[ticket]
        return self._done.pop(ticket)

    def _receive(self, call: Any) -> None:
        seat, errors = self._seat_of.pop(call), self._ray.exceptions
        try:
            said = self._ray.get(call)
        except errors.RayTaskError as e:  # not the visit's own error: that is an outcome
            said = f"{type(e.cause).__name__}: {first_line(e.cause)}" if e.cause is not None else first_line(e)
            if not seat.ready:
                raise RunError(
                    f"A Ray actor could not take up the run ({said}); every machine of the cluster needs the same "
                    "packages as this one."
                ) from e
        except errors.RayError as e:
            self._lost(seat, first_line(e))
            return
        if not seat.ready:
            seat.ready, (seat.sees, seat.machine) = True, said
        else:
            tickets = seat.calls.pop(call)
            if isinstance(said, str):
                said = 0.0, [said] * len(tickets)
            else:
                self._seconds[self._kind(tickets[0])] = said[0] / len(tickets)
            for ticket, one in zip(tickets, said[1], strict=True):
                self._landed(seat, ticket, one)
        seat.since = time.monotonic()
        self._dispatch()

    def _landed(self, seat: Seat, ticket: int, said: Any) -> None:
        """What an actor said of a ticket: metrics, an answer, or what is wrong; of a visit its outcome and wire bytes,
        or what is wrong."""
        work = self._work[ticket]
        if isinstance(work, Job):
            outcome, wire = (Outcome(work.site, None, error=said), None) if isinstance(said, str) else said
            if outcome.state_tag is not None and not seat.sees:
                raise RunError(
                    f"Machine {seat.machine} does not see {self.setup.state_folder}, where what sites keep must "
                    "outlive an actor; put the run directory on a disk that all machines of the cluster share."
                )
            if wire is None:
                self._held.discard(ticket)
            else:
                self._reply_size = max(self._reply_size, wire.nbytes)
            said = outcome, wire
        self._done[ticket] = said

    def _patience(self) -> float | None:
        """Seconds until somebody is late."""
        seats = self._crew.seats
        ends = [self._due(s) for s in seats]
        if not any(s.ready for s in seats):
            ends.append(max(s.since for s in seats) + START_LIMIT)
        end = min(ends)
        return max(0.01, end - time.monotonic()) if end < math.inf else None

    def _due(self, seat: Seat) -> float:
        """When an actor must have answered; infinity when it is not at visits, or these have no limit."""
        limit = self.setup.timeout
        current = next(iter(seat.calls.values()), [])
        if limit is None or not seat.ready or not current or self._kind(current[0]) != "_visit":
            return math.inf
        return seat.since + limit * len(current) + GRACE

    def _end_late(self) -> None:
        seats, now = self._crew.seats, time.monotonic()
        for seat in [s for s in seats if now > self._due(s)]:
            self._lost(seat, f"no answer within {self.setup.timeout:g} s, so its process was ended", late=True)
        if not any(s.ready for s in seats) and now - max(s.since for s in seats) > START_LIMIT:
            has, free = self._ray.cluster_resources(), self._ray.available_resources()
            raise RunError(
                f"No actor started within {START_LIMIT:g} s: of {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} "
                f"GPUs of the Ray cluster, {free.get('CPU', 0):g} and {free.get('GPU', 0):g} are free. Wait for them, "
                "or lower `workers`, `threads` or `gpus`."
            )

    def _lost(self, seat: Seat, why: str, late: bool = False) -> None:
        """An actor is gone, and a new one takes its place. What it was at is done once more, unless it was one visit
        that is late; what waited for it goes back to the queue."""
        if not seat.ready:
            raise RunError(f"A Ray actor ended as it started: {why}")
        self._crew.dismiss(seat)
        self._seat_of = {call: s for call, s in self._seat_of.items() if s is not seat}
        self._home = {site: s for site, s in self._home.items() if s is not seat}
        calls = list(seat.calls.values())
        back = [t for call in calls for t in call]
        self._held.difference_update(back)
        for ticket in calls[0] if calls else ():
            self._deaths[ticket] += 1
            if (late and len(calls[0]) == 1) or self._deaths[ticket] == TRIES:
                back.remove(ticket)
                self._landed(seat, ticket, why if late else f"its process died {TRIES} times")
        self._waiting = {**dict.fromkeys(back), **self._waiting}
        self._crew.muster(self.setup)
        self._welcome(self._crew.seats[-1])
