"""One process, one site at a time: the reference that every other backend must equal to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from atoll.core.errors import AtollError
from atoll.core.message import Message
from atoll.federated.method import Backend
from atoll.federated.states import FileStates, MemoryStates
from atoll.federated.visit import Job, Outcome, Publication, Setup
from atoll.federated.worker import Worker


@dataclass(frozen=True)
class Inline(Backend):
    """Run visits in this process, each when its result is asked for."""

    def open(self, setup: Setup) -> InlineWorkers:
        return InlineWorkers(setup)


def answer(worker: Worker, site: int, request: Message) -> Message | str:
    """A site's answer; what goes wrong at the site is an answer too."""
    try:
        return worker.answer(site, request)
    except Exception as e:
        return str(e) if isinstance(e, AtollError) else f"{type(e).__name__}: {e}"


class InlineWorkers:
    """See ``docs/architecture.md``, "Backends", for the contract of these functions."""

    def __init__(self, setup: Setup) -> None:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(setup.threads)
        states = FileStates(setup.state_folder) if setup.state_folder else MemoryStates()
        self.local = Worker(setup, states)
        self._jobs: dict[int, Job] = {}
        self._done: dict[int, Outcome] = {}
        self._next = 0

    def publish(self, publication: Publication) -> None:
        """Move every worker to a new broadcast; all submitted jobs must have been resolved."""
        self.local.publish(publication.replica)

    def submit(self, jobs: Sequence[Job]) -> list[int]:
        """Queue jobs; returns a ticket each."""
        tickets = list(range(self._next, self._next + len(jobs)))
        self._next += len(jobs)
        self._jobs.update(zip(tickets, jobs, strict=True))
        return tickets

    def result(self, ticket: int) -> Outcome:
        """Wait for a job. The outcome's tensors are valid until :meth:`release`."""
        if ticket not in self._done:
            job, others = self._jobs.pop(ticket), self._jobs.items()
            company = list(itertools.islice(others, self.local.together(job, (j for _, j in others))))
            outcomes = self.local.run_many([job, *(j for _, j in company)])
            for t, outcome in zip([ticket, *(t for t, _ in company)], outcomes, strict=True):
                self._jobs.pop(t, None)
                self._done[t] = outcome
        return self._done.pop(ticket)

    def release(self, ticket: int) -> None:
        """The engine is done with a result's tensors."""

    def evaluate(self, sites: Sequence[tuple[int, str | None]], part: str) -> list[dict[str, float]]:
        return [self.local.evaluate(site, tag, part) for site, tag in sites]

    def ask(self, requests: Mapping[int, Message]) -> dict[int, Message | str]:
        """Put a question to sites, outside of any visit; the answers, or why there is none."""
        return {site: answer(self.local, site, request) for site, request in requests.items()}

    def close(self) -> None:
        torch.set_num_threads(self._threads)
