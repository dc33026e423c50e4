"""What a run will cost, before anything starts.

The plan runs the real engine on a backend whose visits take no training steps: same selection, same clock, same
codecs, same encodings. So bytes are exact wherever a reply's size does not depend on what was learned; elsewhere
they are upper bounds, and the plan says so.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from atoll.core.errors import RunError
from atoll.core.memory import tree_bytes
from atoll.core.message import Message
from atoll.core.tree import Parts
from atoll.federated import checkpoint
from atoll.federated.backends.inline import InlineWorkers
from atoll.federated.check import check_method
from atoll.federated.engine import Engine
from atoll.federated.privacy import spent, unit_of
from atoll.federated.secure import rehearsal
from atoll.federated.secure.site import blank
from atoll.federated.visit import Job, Outcome, Setup

BUDGET = 10.0
MOST_ACCOUNTED = 100_000  # merges; beyond it a plan accounts for so many
"""Seconds that a plan may take before it extrapolates."""

FEW = 3
"""Reasons for refusal that a plan keeps."""

WORKER_BYTES = 90 << 20
"""What a forked worker does not share with its parent once it has trained."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Foreseen cost of a run.

    Attributes:
        exact: every merge was foreseen; otherwise totals are extrapolated from the first ``foreseen`` merges.
        at_most: bytes, FLOPs and virtual seconds are upper bounds, since replies depend on what was learned.
        up_bytes, down_bytes: all sites, all merges.
        relayed_bytes: between aggregators, where the topology has any.
        round_bytes: up and down of the first merge with replies.
        flops: of all visits.
        virtual_seconds: on the devices' clock.
        seconds: on this machine, from one timed visit.
        memory_bytes: peak of this machine's processes.
        epsilon, delta: of the privacy ledger, for one ``privacy_unit``; None without noise.
        sites, per_round: in the federation, and visits of the first merge.
        refused: why replies will be refused, as far as that was foreseen (the first few reasons).
        parameters: of the global model.
    """

    rounds: int
    sites: int
    per_round: int
    parameters: int
    up_bytes: int
    down_bytes: int
    round_bytes: int
    flops: float
    virtual_seconds: float
    seconds: float
    memory_bytes: int
    epsilon: float | None
    delta: float | None
    exact: bool
    foreseen: int
    at_most: bool
    refused: tuple[str, ...] = ()
    relayed_bytes: int = 0
    privacy_unit: str = "site"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class DryWorkers(InlineWorkers):
    """Visits without steps. A site's reply is made once when its size cannot depend on the round; replies of the
    same form share their tensors, so memory does not grow with the sites."""

    dry = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(replace(setup, state_folder=None, timeout=None))
        self._known: dict[int, Outcome] = {}
        self._forms: dict[tuple[object, ...], Parts] = {}
        m = setup.method
        self._reuse = not (m.share.incremental or m.local.data_dependent_size) and m.secure is None

    def result(self, ticket: int) -> Outcome:
        job = replace(self._jobs.pop(ticket), dry=True, state_tag=None)
        known = self._known.get(job.site) if self._reuse and job.message is None else None
        if known is None:
            known = self.local.run(job)
            if self._reuse and job.message is None:
                known = self._known[job.site] = self._slim(known)
        return known

    def _slim(self, outcome: Outcome) -> Outcome:
        if outcome.message is None:
            return outcome
        kind, parts, facts = outcome.message.kind, outcome.message.parts, outcome.message.facts
        form = tuple((p, n, t.shape, t.dtype) for p, tree in parts.items() for n, t in tree.items())
        return replace(outcome, message=Message(kind, self._forms.setdefault(form, parts), facts))

    def ask(self, requests: Mapping[int, Message]) -> dict[int, Message | str]:
        return {site: blank(site, request) for site, request in requests.items()}

    def evaluate(self, sites: Sequence[tuple[int, str | None]], part: str) -> list[dict[str, float]]:
        return [{} for _ in sites]


def make_plan(setup: Setup, rounds: int, *, workers: int = 1, evaluations: int = 0, delta: float | None = None) -> Plan:
    """Foresee ``rounds`` merges.

    Args:
        workers: processes that will share the visits.
        evaluations: of the global model on the common test set.

    Raises:
        RunError: when no visit can succeed.
    """
    check_method(setup.method, setup.task, setup.federation)
    dry = DryWorkers(setup)
    try:
        engine = Engine(setup, dry)
        started, up, down, flops, visits, first = time.perf_counter(), 0, 0, 0.0, 0, 0
        per_round = round_bytes = 0
        replies, relayed, refused = 0, 0, dict[str, None]()
        done = 0
        while done < rounds:
            row = engine.step()
            done += 1
            up += sum(row.up_bytes.values())
            down += sum(row.down_bytes.values())
            flops += sum(row.flops.values())
            visits += len(row.up_bytes)
            replies += row.replies
            relayed += row.relayed_bytes
            refused |= {f"site {site}: {why}": None for site, why in row.refused.items()}
            if not first and row.up_bytes:
                first, per_round = 1, len(row.up_bytes)
                round_bytes = sum(row.up_bytes.values()) + sum(row.down_bytes.values())
            if time.perf_counter() - started > BUDGET:
                break
        if refused and not replies:
            raise RunError(f"No visit can succeed. {next(iter(refused))}")
        scale = rounds / done
        merging = (time.perf_counter() - started) / done * rounds  # all that a round does besides training
        training, memory = _measure(setup, engine, flops * scale, visits * scale, workers, per_round)
        seconds = training + merging + rounds * _saving(engine) + evaluations * _evaluating(setup, engine)
        epsilon = _epsilon(engine, scale, delta)
        at = dry.local.site_model(None)
        return Plan(
            rounds=rounds, sites=len(engine.sites), per_round=per_round,
            parameters=sum(p.numel() for p in at.model.parameters()), up_bytes=round(up * scale),
            down_bytes=round(down * scale), round_bytes=round_bytes, flops=flops * scale,
            virtual_seconds=engine.state.now * scale, seconds=seconds, memory_bytes=memory, epsilon=epsilon,
            delta=delta, exact=done == rounds, foreseen=done, at_most=setup.method.local.data_dependent_size,
            refused=tuple(refused)[:FEW], relayed_bytes=round(relayed * scale),
            privacy_unit=unit_of(setup.method),
        )  # fmt: skip
    finally:
        dry.close()


def _measure(
    setup: Setup, engine: Engine, flops: float, visits: float, workers: int, per_round: int
) -> tuple[float, int]:
    """Seconds of all training and peak bytes, scaled from real visits to a site of middle size (their replies are
    thrown away)."""
    local = engine.workers.local
    masks = 0.0
    if local.secure is not None:
        masks = visits * rehearsal.seconds(setup.method, local.form(0, per_round), per_round)
        local.setup, local.secure = replace(setup, method=setup.method.but(secure=None)), None
    sizes = sorted((len(s.train), i) for i, s in enumerate(setup.federation.sites))
    job = Job(sizes[len(sizes) // 2][1], engine.state.round, cohort=max(1, per_round))
    local.run(job)  # the first visit pays for imports and warm-up
    outcome = local.run(job)
    local.states.sweep(set())
    rate = outcome.flops / outcome.seconds if outcome.flops and outcome.seconds else 0.0
    training = flops / rate if rate else visits * outcome.seconds
    model = sum(t.numel() * t.element_size() for t in local.site_model(None).tensors.values())
    extra = 3 * model if workers == 1 else workers * (WORKER_BYTES + 3 * model) + per_round * model
    return training / workers + masks, tree_bytes() + extra


def _saving(engine: Engine) -> float:
    """Seconds of one checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        checkpoint.save(engine.state, Path(folder), {})
        return time.perf_counter() - started


def _evaluating(setup: Setup, engine: Engine) -> float:
    """Seconds of one evaluation, from some of its rows."""
    local, federation = engine.workers.local, setup.federation
    personal = bool(local.site_model(None).split.private)
    pools = [s.test for s in federation.sites] if personal else [federation.test]
    rows = sum(len(p) for p in pools)
    some = next((p.select(range(min(len(p), 512))) for p in pools if len(p)), None)
    if some is None:
        return 0.0
    started = time.perf_counter()
    setup.task.evaluate(local.site_model(0 if personal else None).model, some)
    return (time.perf_counter() - started) * rows / len(some)


def _epsilon(engine: Engine, scale: float, delta: float | None) -> float | None:
    foreseen = engine.state.cohorts
    rounds = round(len(foreseen) * scale)
    cohorts = list(itertools.islice(itertools.cycle(foreseen), min(rounds, MOST_ACCOUNTED)))
    return spent(engine.method, cohorts, len(engine.sites), delta)
