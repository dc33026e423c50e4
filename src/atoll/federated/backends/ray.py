"""Actors of a Ray cluster, on this machine or on many; the same bits as :mod:`inline`.

For simulation: a cluster is one circle of trust, whose members run each other's code. Between organisations use a
deployment.

What is copied: the setup, data included, goes into Ray's object store once a run and reaches each node once; on a
node all actors read the rows where they lie. The replica goes there once a broadcast, in the wire encoding, and each
actor decodes a copy of its own. A reply comes back in the wire encoding and is copied once more, when its turn in the
sum has come. What a site keeps lies in files, so it survives the actor that wrote it.
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import logging
import math
import os
import pickle
import secrets
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from atoll.core.errors import RunError, SiteFailed
from atoll.core.message import NO_LIMITS, Message, decode, detach, encode
from atoll.core.tree import moved
from atoll.data.dataset import Dataset, Info
from atoll.federated.backends.inline import answer
from atoll.federated.backends.process_pool import GRACE, PREFIX, SHORT, _evaluate, _sweep
from atoll.federated.method import Backend
from atoll.federated.states import FileStates
from atoll.federated.visit import Job, Outcome, Publication, Setup, Worker

START_LIMIT = 300.0  # seconds without a single actor, before we say that the cluster has no room
SMALL = 4096  # bytes: smaller arrays travel within the pickle, where they cost less than an entry of their own
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


# --------------------------------------------------------------------------------------------- in an actor


class Host:
    """What an actor does: it holds one worker, and hands it the replica that a call names."""

    def open(self, shared: list[Any], beacon: Path, token: str) -> tuple[bool, str]:
        """Take up a run. Returns whether this machine sees the folder of the states, and the machine's name."""
        setup: Setup = pickle.loads(shared[0], buffers=shared[1:])
        torch.set_num_threads(setup.threads)
        assert setup.state_folder is not None
        seen = beacon.exists() and beacon.read_text() == token
        self.worker, self.version = Worker(setup, FileStates(setup.state_folder)), -1
        return seen, socket.gethostname()

    def do(self, version: int, replica: list[Any], orders: list[tuple[Any, ...]]) -> tuple[float, list[Any]]:
        """Do each order with the replica that ``version`` names; returns seconds in all, and an answer for each."""
        self._receive(version, replica)
        started = time.perf_counter()
        answers = [getattr(self, what)(*about) for what, *about in orders]
        return time.perf_counter() - started, answers

    def _visit(self, job: Job, own: bytes | None) -> tuple[Outcome, Any]:
        """The outcome, and its message apart from it as wire bytes, or None."""
        if own is not None:
            job = replace(job, message=detach(decode(own, NO_LIMITS)))
        outcome = self.worker.run(job)
        wire = np.frombuffer(encode(outcome.message), np.uint8) if outcome.message is not None else None
        return replace(outcome, message=None), wire

    def _evaluate(self, site: int, tag: str | None, part: str) -> dict[str, float] | str:
        return _evaluate(self.worker, site, tag, part)

    def _ask(self, site: int, request: bytes) -> bytes | str:
        said = answer(self.worker, site, decode(request, NO_LIMITS))
        return said if isinstance(said, str) else bytes(encode(said))

    def _receive(self, version: int, replica: list[Any]) -> None:
        if version == self.version or not replica:
            return
        import ray

        whole = decode(ray.get(replica[0]), NO_LIMITS)  # copies: the store's memory is read-only
        parts = {name: whole.parts.get(name, {}) for name in whole.facts["parts"]}  # empty trees leave no tensor
        self.worker.publish(moved(parts, self.worker.setup.device))
        self.version = version


# --------------------------------------------------------------------------------------------- the setup, once


def share(setup: Setup) -> list[Any]:
    """The setup as a pickle and the arrays that it refers to. From the object store, :class:`Host` reads data sets
    in place; they are read-only. Code that is not installed as a package (a script, a notebook) travels too."""
    from ray import cloudpickle

    buffers: list[Any] = []
    arrays: dict[int, tuple[Tensor, Any]] = {}  # many data sets own one storage

    def apart(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes >= SMALL:
            buffers.append(np.frombuffer(raw, np.uint8))
        return raw.nbytes < SMALL

    def array(t: Tensor) -> Any:
        if id(t) not in arrays:
            plain = t.device.type == "cpu" and t.dtype != torch.bfloat16
            arrays[id(t)] = t, (t.detach().contiguous().numpy() if plain else t)
        return arrays[id(t)][1]

    class Pickler(cloudpickle.CloudPickler):
        def reducer_override(self, obj: Any) -> Any:
            if type(obj) is Dataset:
                columns = {name: array(t) for name, t in obj.columns.items()}
                return _dataset, (columns, obj.info, None if obj.rows is None else array(obj.rows))
            if isinstance(obj, type) or callable(obj):
                _by_value(getattr(obj, "__module__", None), registered)
            return super().reducer_override(obj)

    out, registered = io.BytesIO(), list[Any]()
    try:
        Pickler(out, protocol=5, buffer_callback=apart).dump(setup)
    except (pickle.PicklingError, TypeError, AttributeError) as e:
        raise RunError(f"The task, the method or the data cannot be sent to Ray's actors: {e}") from e
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)
    return [np.frombuffer(out.getbuffer(), np.uint8), *buffers]


def _dataset(columns: dict[str, Any], info: Info, rows: Any) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only: so are a federation's rows, by agreement
        tensors = {name: torch.as_tensor(a) for name, a in columns.items()}
        return Dataset(tensors, info, None if rows is None else torch.as_tensor(rows))


def _by_value(name: str | None, registered: list[Any]) -> None:
    """Let a module's code travel with what refers to it, unless every worker can import it by name."""
    from ray import cloudpickle

    module = sys.modules.get(name or "")
    origin = getattr(module, "__file__", None)
    if module is None or origin is None or name == "__main__" or module in registered:
        return  # built in, or the pickler sees to it
    ours = [str(Path(__file__).parents[2]), *sysconfig.get_paths().values()]
    if not any(Path(origin).is_relative_to(place) for place in ours):
        cloudpickle.register_pickle_by_value(module)
        registered.append(module)


# --------------------------------------------------------------------------------------------- the cluster


@dataclass(slots=True, eq=False)
class Seat:
    """An actor. ``calls``: the tickets of each, the current one first; ``since``: when that began, or the actor got
    ready; ``ready``: it has taken up the run; ``sees``: its machine sees the folder of the states."""

    handle: Any
    calls: dict[Any, list[int]] = field(default_factory=dict)
    since: float = 0.0
    ready: bool = False
    sees: bool = True
    machine: str = ""


class Crew:
    """Actors that may outlive a run, so that many runs pay once for their start.

    Example:
        >>> with Crew(Ray(workers=4)) as crew:
        ...     for seed in range(10):
        ...         rows = list(federate(task, federation, fedavg(), rounds=20, seed=seed, backend=crew))
    """

    def __init__(self, about: Ray) -> None:
        try:
            import ray
        except ImportError as e:
            raise RunError("The backend `ray` needs Ray: `pip install atoll[ray]`.") from e
        self.ray: Any = ray
        self.about, self.seats, self.folder = about, list[Seat](), Path()
        self._ours = False
        self._actor: Any = None

    def open(self, setup: Setup) -> RayWorkers:
        return RayWorkers(setup, self, lasting=True)

    def muster(self, setup: Setup) -> None:
        """Connect, and bring the crew to its size; does nothing when both are so."""
        if self._actor is None:
            self._connect(setup)
        while len(self.seats) < self.size:
            self.seats.append(Seat(self._actor.remote()))

    def _connect(self, setup: Setup) -> None:
        _sweep(Path(tempfile.gettempdir()))
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        about = self.about
        if not self.ray.is_initialized():  # else the program that we are part of has chosen one
            self._ours = True
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            options: dict[str, Any] = {"address": about.address}
            if about.address is None:
                workers = about.workers or os.cpu_count() or 1
                options = {"address": "local", "num_cpus": workers * setup.threads, "include_dashboard": False}
                if len(str(self.folder)) < 40:  # it holds sockets, whose paths must stay under 107 characters
                    options["_temp_dir"] = str(self.folder)
            try:
                if about.address not in (None, "auto"):
                    host, _, port = str(about.address).rpartition(":")
                    socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would try for minutes
                with _quietly():
                    self.ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, RuntimeError, ValueError, OSError) as e:
                what = "No Ray cluster could be started" if about.address is None else f"Cannot join {about.address!r}"
                raise RunError(f"{what}: {_line(e)}") from e
        has = self.ray.cluster_resources()
        self.size = about.workers or max(1, int(has.get("CPU", 1)) // setup.threads)
        gpus = 0.0
        if setup.device.startswith("cuda"):
            if not has.get("GPU"):
                raise RunError("`device: cuda` needs GPUs, and the Ray cluster has none; use `device: cpu`.")
            gpus = about.gpus or min(1.0, math.floor(has["GPU"] / self.size * 1e4) / 1e4)
        remote = self.ray.remote(num_cpus=setup.threads, num_gpus=gpus, max_restarts=0, max_task_retries=0)
        self._actor = remote(Host)

    def dismiss(self, seat: Seat) -> None:
        self.ray.kill(seat.handle)
        self.seats.remove(seat)

    def close(self) -> None:
        for seat in list(self.seats):
            with contextlib.suppress(Exception):  # the cluster itself may be gone
                self.ray.kill(seat.handle)
        self.seats.clear()
        if self._ours:
            with _quietly():
                self.ray.shutdown()
        self._ours, self._actor = False, None
        if self.folder.name:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings of Ray's own code, and with the program's own answer to SIGTERM afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = signal.getsignal(signal.SIGTERM)
        try:
            yield
        finally:
            gc.collect()  # files that Ray forgot to close warn when they are collected: now
            with contextlib.suppress(ValueError, TypeError):  # not in the main thread; not set from Python
                signal.signal(signal.SIGTERM, before)


def _line(e: BaseException) -> str:
    """The first line of what an exception says."""
    return next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)[:300]


# --------------------------------------------------------------------------------------------- a run


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
            said = f"{type(e.cause).__name__}: {_line(e.cause)}" if e.cause is not None else _line(e)
            if not seat.ready:
                raise RunError(
                    f"A Ray actor could not take up the run ({said}); every machine of the cluster needs the same "
                    "packages as this one."
                ) from e
        except errors.RayError as e:
            self._lost(seat, _line(e))
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
