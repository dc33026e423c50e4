"""Flower's own simulation engine: visits are Flower messages to virtual SuperNodes, answered in Ray actors.

The same records cross that cross the wire of a real deployment, so Flower's engine carries what it would carry there;
the bits are those of :mod:`inline`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Le

from atoll.core.errors import AtollError, MessageError
from atoll.core.message import NO_LIMITS, Message
from atoll.federated.backends.process_pool import PREFIX, _sweep
from atoll.federated.dispatch import FAILED, Dispatch
from atoll.federated.method import Backend
from atoll.federated.records import from_records, to_records
from atoll.federated.states import FileStates
from atoll.federated.visit import Job, Outcome, Publication, Setup
from atoll.federated.worker import Worker

if TYPE_CHECKING:
    from flwr.app import Message as FlowerMessage

    from atoll.federated.backends._supernodes import SuperNodes


@dataclass(frozen=True)
class FlowerSimulation(Backend):
    """Run visits on Flower's simulation engine.

    A Ray that the program has already joined is used, and left as it is; on more than one machine, the folder of
    the run must be a shared one.

    Args:
        workers: Ray actors; None takes one per core.
    """

    workers: Annotated[int, Ge(1), Le(256)] | None = None

    def open(self, setup: Setup) -> FlowerWorkers:
        workers = self.workers or os.cpu_count() or 1
        gpus = 1 / workers if setup.device != "cpu" else 0.0
        nodes = start_nodes(len(setup.federation.sites), workers, gpus)
        try:
            return FlowerWorkers(setup, nodes)
        except BaseException:
            nodes.close()
            raise


def start_nodes(count: int, workers: int, gpus: float = 0.0) -> SuperNodes:
    """Flower's engine with ``count`` virtual SuperNodes; raises :class:`AtollError` where it is not installed."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default, without its warning
    try:
        from atoll.federated.backends._supernodes import SuperNodes
        from atoll.federated.backends._virtual_site import SiteApp
    except ImportError as e:
        raise AtollError(f"Flower's simulation engine is not here ({e}): pip install 'flwr[simulation]'.") from e
    return SuperNodes(count, workers, SiteApp(), gpus)


@dataclass(slots=True)
class _Asked:
    """A request on its way. ``job`` is None for a question outside of any visit."""

    ticket: int
    kind: str
    site: int
    job: Job | None = None
    part: str | None = None
    again: bool = False


class FlowerWorkers:
    """See :class:`~atoll.federated.backends.inline.InlineWorkers` for the contract.

    Args:
        nodes: one for each site. They are closed with this, unless ``keep``: then another run may use them.
    """

    def __init__(self, setup: Setup, nodes: SuperNodes, keep: bool = False) -> None:
        import ray

        from atoll.federated.backends._virtual_site import SiteApp

        self._threads = torch.get_num_threads()
        torch.set_num_threads(setup.threads)
        self._nodes, self._keep = nodes, keep
        _sweep(Path(tempfile.gettempdir()))
        self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        if setup.state_folder is None:
            setup = replace(setup, state_folder=self._folder / "states")
        assert setup.state_folder is not None
        replicas = self._folder / "replicas"
        replicas.mkdir()
        self.setup, self.run = setup, secrets.token_hex(8)
        self.local = Worker(setup, FileStates(setup.state_folder))
        self._dispatch = Dispatch(setup.method.share, self.run)
        assert isinstance(nodes.app, SiteApp)
        nodes.app.serve(ray.put(setup), self.run, replicas)
        self._asked: dict[str, _Asked] = {}
        self._done: dict[int, Message | str] = {}
        self._jobs: dict[int, Job] = {}
        self._next = 0

    # ------------------------------------------------------------------- the seven functions

    def publish(self, publication: Publication) -> None:
        self.local.publish(publication.replica)
        self._dispatch.publish(publication)

    def submit(self, jobs: Sequence[Job]) -> list[int]:
        tickets = []
        for job in jobs:
            ticket = self._ask(self._dispatch.request(job), "train", job.site, job)
            self._jobs[ticket] = job
            tickets.append(ticket)
        return tickets

    def result(self, ticket: int) -> Outcome:
        return self._dispatch.outcome(self._wait(ticket), self._jobs.pop(ticket))

    def release(self, ticket: int) -> None:
        """A reply's tensors are its own."""

    def evaluate(self, sites: Sequence[tuple[int, str | None]], part: str) -> list[dict[str, float]]:
        jobs = [Job(site, 0, state_tag=tag) for site, tag in sites]
        tickets = [self._ask(self._dispatch.request(j, part), "evaluate", j.site, j, part) for j in jobs]
        return [self._dispatch.metrics(self._wait(ticket), job) for ticket, job in zip(tickets, jobs, strict=True)]

    def ask(self, requests: Mapping[int, Message]) -> dict[int, Message | str]:
        tickets = [self._ask(request, "query", site) for site, request in requests.items()]
        return dict(zip(requests, map(self._wait, tickets), strict=True))

    def close(self) -> None:
        if not self._keep:
            self._nodes.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        torch.set_num_threads(self._threads)

    # ------------------------------------------------------------------- questions and answers

    def _ask(self, request: Message, kind: str, site: int, job: Job | None = None, part: str | None = None) -> int:
        self._next += 1
        name = self._nodes.send(site, kind, to_records(request))
        self._asked[name] = _Asked(self._next, kind, site, job, part)
        return self._next

    def _wait(self, ticket: int) -> Message | str:
        """An answer, or why there is none."""
        while ticket not in self._done:
            for name, reply in self._nodes.receive().items():
                asked = self._asked.pop(name, None)
                if asked is None:
                    continue  # an answer to a run that was given up
                said = self._read(reply)
                if isinstance(said, Message) and self._dispatch.lacks(said) and asked.job and not asked.again:
                    request = to_records(self._dispatch.request(asked.job, asked.part, lacking=True))
                    asked.again = True
                    self._asked[self._nodes.send(asked.site, asked.kind, request)] = asked
                else:
                    self._done[asked.ticket] = said
        return self._done.pop(ticket)

    def _read(self, reply: FlowerMessage) -> Message | str:
        if reply.has_error():
            limit, reason = self.setup.timeout, reply.error.reason or ""
            late = f" or gave no answer within {limit:g} s" if limit else ""
            died = "ActorDied" in reason or "ActorUnavailable" in reason
            return f"its process died{late}" if died else f"Flower: {reason[:300]}"
        try:
            said = from_records(reply.content, NO_LIMITS)
        except MessageError as e:
            return str(e)
        return str(said.facts["error"]) if said.kind == FAILED else said
