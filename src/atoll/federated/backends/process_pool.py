"""Lasting worker processes on one machine; the same bits as :mod:`inline`.

The replica and every reply lie in memory-mapped blocks, in the wire encoding; a job and its answer are a few
numbers through a pipe. Nothing polls, no model is pickled, and no process is started after the first round unless
one died.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le

from atoll.core.errors import RunError, SiteFailed
from atoll.core.message import NO_LIMITS, Message, decode, detach, encode, encode_into, encoded_size
from atoll.core.tree import Parts
from atoll.federated.backends.inline import answer
from atoll.federated.method import Backend
from atoll.federated.states import FileStates
from atoll.federated.visit import Job, Outcome, Publication, Setup
from atoll.federated.worker import Worker

SHORT = 0.05  # seconds: a worker gets its next visit ahead of time only if visits are shorter, or it would idle while
# we merge; longer ones wait for whoever is free first, which balances better
PREFIX = "atoll-"  # of folders with shared blocks; the owner's process id follows
GRACE = 2.0  # seconds beyond the time limit before a worker that does not stop by itself is killed


@dataclass(frozen=True)
class ProcessPool(Backend):
    """Run visits in lasting processes.

    Args:
        workers: processes; None takes one per core.
        held_bytes: replies that may wait in shared memory for their turn in the sum. Within it the longest visits
            start first; beyond it visits start in the order of the sum, so memory stays bounded.
    """

    workers: Annotated[int, Ge(1), Le(256)] | None = None
    held_bytes: Annotated[int, Ge(1)] = 1 << 30

    def open(self, setup: Setup) -> PoolWorkers:
        return PoolWorkers(setup, self.workers or os.cpu_count() or 1, self.held_bytes)


class Block:
    """A file that several processes map. It grows; a reader maps it anew when it did."""

    def __init__(self, path: Path) -> None:
        self.path, self._map, self._size = path, None, 0

    def ensure(self, size: int) -> memoryview:
        """At least ``size`` writable bytes."""
        if self._map is None or self._size < size:
            with open(self.path, "ab") as f:
                if f.tell() < size:
                    _reserve(f.fileno(), size)
                    f.truncate(size + size // 8)
            with open(self.path, "r+b") as f:
                self._map = mmap.mmap(f.fileno(), 0)  # the old map lives on while tensors refer to it
            self._size = len(self._map)
        return memoryview(self._map)

    _map: mmap.mmap | None


def _reserve(file: int, size: int) -> None:
    """Pages for ``size`` bytes now: where memory is short, a write to a mapping later would kill the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as e:
        if e.errno != errno.ENOSPC:
            return  # a file system that cannot reserve
        raise RunError(
            f"There is no room for {size:,} bytes in shared memory (/dev/shm). Give the machine more (a container: "
            "`--shm-size`), lower the pool's `held_bytes`, or use the inline backend."
        ) from e


@dataclass(slots=True)
class _Process:
    """``since``: when its current job began, or it got ready; ``ready``: it has started."""

    process: Any
    pipe: Connection
    tickets: deque[int] = field(default_factory=deque)
    since: float = 0.0
    ready: bool = False


class PoolWorkers:
    """The parent's side. See :class:`~atoll.federated.backends.inline.InlineWorkers` for the contract."""

    def __init__(self, setup: Setup, count: int, held_bytes: int) -> None:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(setup.threads)
        shm = Path("/dev/shm")
        home = shm if os.access(shm, os.W_OK) else Path(tempfile.gettempdir())
        _sweep(home)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=home))
        if setup.state_folder is None:
            setup = replace(setup, state_folder=self._folder / "states")
        assert setup.state_folder is not None
        self.setup, self._held_bytes = setup, held_bytes
        self.local = Worker(setup, FileStates(setup.state_folder))
        # A forked child shares the data without a copy. With several threads per worker, fork is not safe.
        fork = "fork" in multiprocessing.get_all_start_methods() and setup.threads == 1 and setup.device == "cpu"
        self._context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        self._replica = Block(self._folder / "replica")
        self._published = 0
        self._jobs: dict[int, Job | tuple[Any, ...]] = {}
        self._waiting: deque[int] = deque()
        self._done: dict[int, Any] = {}
        self._slots: dict[int, Block] = {}
        self._free: list[int] = []
        self._slot_of: dict[int, int] = {}
        self._reply_size = 0
        self._visit_seconds = math.inf  # of the last visit
        self._next = 0
        self._processes: list[_Process] = []
        self._spawn(count)

    # ------------------------------------------------------------------- the six functions

    def publish(self, publication: Publication) -> None:
        self.local.publish(publication.replica)
        whole = Message("replica", publication.replica, {"parts": list(publication.replica)})
        size = encoded_size(whole)
        encode_into(whole, self._replica.ensure(size))
        self._published = size
        for p in self._processes:
            self._tell(p, ("publish", size))

    def submit(self, jobs: Sequence[Job]) -> list[int]:
        tickets = self._queue(jobs)
        if len(jobs) * self._reply_size <= self._held_bytes:
            size = {t: len(self.setup.federation.sites[j.site].train) for t, j in zip(tickets, jobs, strict=True)}
            self._waiting = deque(sorted(self._waiting, key=lambda t: -size.get(t, 0)))
        self._dispatch()
        return tickets

    def result(self, ticket: int) -> Outcome:
        outcome = self._wait(ticket)
        assert isinstance(outcome, Outcome)
        return outcome

    def release(self, ticket: int) -> None:
        slot = self._slot_of.pop(ticket, None)
        if slot is not None:
            self._free.append(slot)
            self._dispatch()

    def evaluate(self, sites: Sequence[tuple[int, str | None]], part: str) -> list[dict[str, float]]:
        tickets = self._queue([(site, tag, part) for site, tag in sites])
        self._dispatch()
        answers = [self._wait(ticket) for ticket in tickets]
        for (site, _), found in zip(sites, answers, strict=True):
            if isinstance(found, str):
                raise SiteFailed(f"The model of site {site} could not be evaluated: {found}")
        return answers

    def ask(self, requests: Mapping[int, Message]) -> dict[int, Message | str]:
        tickets = self._queue([(site, bytes(encode(request))) for site, request in requests.items()])
        self._dispatch()
        answers = [self._wait(ticket) for ticket in tickets]
        read = [a if isinstance(a, str) else detach(decode(a, NO_LIMITS)) for a in answers]
        return dict(zip(requests, read, strict=True))

    def close(self) -> None:
        for p in self._processes:
            with contextlib.suppress(OSError):
                p.pipe.send(None)
        for p in self._processes:
            p.process.join(timeout=5)
            if p.process.is_alive():
                p.process.kill()
                p.process.join()
            p.pipe.close()
        self._processes.clear()
        shutil.rmtree(self._folder, ignore_errors=True)
        torch.set_num_threads(self._threads)

    # ------------------------------------------------------------------- queue and processes

    def _queue(self, jobs: Sequence[Any]) -> list[int]:
        tickets = list(range(self._next, self._next + len(jobs)))
        self._next += len(jobs)
        self._jobs.update(zip(tickets, jobs, strict=True))
        self._waiting.extend(tickets)
        return tickets

    def _spawn(self, count: int) -> None:
        for _ in range(count):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(self.setup, theirs, self._folder), daemon=True)
            process.start()
            theirs.close()
            p = _Process(process, ours)
            self._processes.append(p)
            if self._published:
                self._tell(p, ("publish", self._published))

    def _tell(self, p: _Process, what: Any) -> None:
        with contextlib.suppress(OSError):  # a dead worker is noticed where we wait for it
            p.pipe.send(what)

    def _dispatch(self, urgent: int | None = None) -> None:
        """Hand waiting jobs to workers that have room. ``urgent``: a ticket that somebody waits for."""
        held_limit = max(2 * len(self._processes), self._held_bytes // max(1, self._reply_size))
        for depth in range(2 if self._visit_seconds < SHORT else 1):
            for p in self._processes:
                if len(p.tickets) != depth or not self._waiting:
                    continue
                ticket = self._waiting[0]
                if len(self._slot_of) >= held_limit:
                    if urgent is None or urgent not in self._waiting:
                        return  # many replies wait for their turn: let the sum catch up
                    ticket = urgent  # the sum itself waits for this one
                self._waiting.remove(ticket)
                self._assign(p, ticket)

    def _assign(self, p: _Process, ticket: int) -> None:
        job = self._jobs[ticket]
        if isinstance(job, Job):
            slot = self._free.pop() if self._free else len(self._slots)
            if slot not in self._slots:
                self._slots[slot] = Block(self._folder / f"slot{slot}")
            self._slot_of[ticket] = slot
            own = bytes(encode(job.message)) if job.message is not None else None
            self._tell(p, ("visit", ticket, slot, replace(job, message=None), own))
        else:
            self._tell(p, ("evaluate" if len(job) == 3 else "ask", ticket, *job))
        if not p.tickets:
            p.since = time.monotonic()
        p.tickets.append(ticket)

    def _wait(self, ticket: int) -> Any:
        while ticket not in self._done:
            self._dispatch(urgent=ticket)
            ready = wait([p.pipe for p in self._processes], timeout=self._patience())
            for p in [p for p in self._processes if p.pipe in ready]:
                self._receive(p)
            self._kill_late()
        del self._jobs[ticket]
        return self._done.pop(ticket)

    def _receive(self, p: _Process) -> None:
        try:
            ticket, size, answer = p.pipe.recv()
        except (EOFError, OSError):
            self._lost(p, "its process died")
            return
        if ticket is None:
            p.ready, p.since = True, time.monotonic()
            return
        if size:
            self._reply_size = max(self._reply_size, size)
            view = self._slots[self._slot_of[ticket]].ensure(size)
            answer = replace(answer, message=decode(view[:size], NO_LIMITS))
        elif isinstance(answer, Outcome) and ticket in self._slot_of:
            self._free.append(self._slot_of.pop(ticket))
        p.tickets.remove(ticket)
        p.since = time.monotonic()
        self._done[ticket] = answer
        if isinstance(answer, Outcome):
            self._visit_seconds = answer.seconds
        self._dispatch()

    def _patience(self) -> float | None:
        limit = self.setup.timeout
        if limit is None:
            return None
        started = [p.since for p in self._processes if self._visiting(p)]
        return max(0.01, min(started) + limit + GRACE - time.monotonic()) if started else None

    def _kill_late(self) -> None:
        limit = self.setup.timeout
        if limit is None:
            return
        for p in list(self._processes):
            if self._visiting(p) and time.monotonic() - p.since > limit + GRACE:
                p.process.kill()
                self._lost(p, f"no answer within {limit:g} s, so its process was ended")

    def _visiting(self, p: _Process) -> bool:
        """Whether it is at a visit: neither starting nor evaluating, for which there is no limit."""
        return p.ready and bool(p.tickets) and isinstance(self._jobs[p.tickets[0]], Job)

    def _lost(self, p: _Process, why: str) -> None:
        """A worker is gone: its current job failed, its waiting job goes back to the queue, a new one starts."""
        p.process.join()
        p.pipe.close()
        self._processes.remove(p)
        if not p.ready:
            raise RunError(
                f"A worker process ended as it started (exit code {p.process.exitcode}); its own words are above. A "
                'Python program that is not under `if __name__ == "__main__":` does this where processes are spawned.'
            )
        if p.tickets:
            ticket = p.tickets.popleft()
            job = self._jobs[ticket]
            if ticket in self._slot_of:
                self._free.append(self._slot_of.pop(ticket))
            site = job.site if isinstance(job, Job) else job[0]
            self._done[ticket] = Outcome(site, None, error=why) if isinstance(job, Job) else why
            for waiting in reversed(p.tickets):
                if waiting in self._slot_of:
                    self._free.append(self._slot_of.pop(waiting))
                self._waiting.appendleft(waiting)
        self._spawn(1)


def _sweep(home: Path) -> None:
    """Remove the blocks of processes that were killed before they could."""
    for folder in home.glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).split("-")[0]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _serve(setup: Setup, pipe: Connection, folder: Path) -> None:
    """A worker's life: publications and jobs in, answers out, until None or the parent is gone."""
    parent = os.getppid()
    torch.set_num_threads(setup.threads)
    assert setup.state_folder is not None
    worker = Worker(setup, FileStates(setup.state_folder))
    replica, slots, published = Block(folder / "replica"), dict[int, Block](), 0
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        pipe.send((None, 0, None))  # ready
        while (what := _next(pipe, parent)) is not None:
            if what[0] == "publish":
                published = what[1]
                continue
            if published:  # only now: until there is a job, the next publication may be on its way into the block
                worker.publish(_read_replica(replica, published))
                published = 0
            if what[0] == "visit":
                _, ticket, slot, job, own = what
                outcome = worker.run(replace(job, message=detach(decode(own, NO_LIMITS)) if own is not None else None))
                size = 0
                if outcome.message is not None:
                    size = encoded_size(outcome.message)
                    block = slots.setdefault(slot, Block(folder / f"slot{slot}"))
                    try:
                        encode_into(outcome.message, block.ensure(size))
                    except RunError as e:
                        size, outcome = 0, replace(outcome, error=str(e))
                pipe.send((ticket, size, replace(outcome, message=None)))
            elif what[0] == "evaluate":
                _, ticket, site, tag, part = what
                pipe.send((ticket, 0, _evaluate(worker, site, tag, part)))
            else:
                _, ticket, site, request = what
                said = answer(worker, site, decode(request, NO_LIMITS))
                pipe.send((ticket, 0, said if isinstance(said, str) else bytes(encode(said))))


def _evaluate(worker: Worker, site: int, tag: str | None, part: str) -> dict[str, float] | str:
    """The metrics, or what went wrong."""
    try:
        return worker.evaluate(site, tag, part)
    except Exception as e:
        return f"{type(e).__name__}: {e}"


def _next(pipe: Connection, parent: int) -> Any:
    """The next order, or None when the parent is gone: its siblings hold copies of our pipe, so no end is seen."""
    while not pipe.poll(1.0):
        if os.getppid() != parent:
            return None
    return pipe.recv()


def _read_replica(block: Block, size: int) -> Parts:
    whole = decode(block.ensure(size)[:size], NO_LIMITS)
    return {name: whole.parts.get(name, {}) for name in whole.facts["parts"]}  # empty trees leave no tensor behind
