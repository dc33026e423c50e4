"""An ordinary Strategy that runs a method: Flower's loop asks whom to send what, and hands over the replies.

Behind it is the engine of every other backend. Its ``step`` is one function, which submits visits and then wants their
results, while Flower's is two (``configure_train``, ``aggregate_train``) with the exchange between them; so the step
runs in a thread of its own, which rests while the messages travel.
"""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from logging import INFO
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore import log

from atoll.core.errors import AtollError, RunError, SiteFailed
from atoll.core.message import Limits
from atoll.core.message import Message as Ours
from atoll.core.tree import Tree, named_tensors
from atoll.data.dataset import Dataset, Federation, Info, SiteData
from atoll.federated.check import check_method
from atoll.federated.dispatch import FAILED, Dispatch
from atoll.federated.engine import DEFAULT_REPLY_LIMIT, Engine
from atoll.federated.ledger import Row
from atoll.federated.method import DeviceProfile, Method
from atoll.federated.records import from_records, to_records
from atoll.federated.states import MemoryStates
from atoll.federated.visit import Job, Outcome, Publication, Setup
from atoll.federated.worker import Worker
from atoll.flower.records import HELLO, with_seed

Numbers = dict[str, int | float | list[int] | list[float]]
"""What Flower's metric records hold."""
LOOK = 0.2  # seconds between looks for nodes that are still missing


def strategy(
    method: Method,
    task: Any,
    num_sites: int,
    *,
    seed: int = 0,
    public: Dataset | None = None,
    profiles: Sequence[DeviceProfile] | None = None,
    evaluate: bool = True,
    patience: float = 600.0,
    reply_limit: int = DEFAULT_REPLY_LIMIT,
) -> MethodStrategy:
    """A method of Atoll as a Flower strategy; :func:`atoll.flower.client_app` is the other side of it.

    Share, local work, codecs, combiner, server step, selection and synchronous schedules are honoured. Schedules that
    do not wait for replies are refused: Flower's loop has no place for them.

    Args:
        num_sites: nodes that take part; the first round waits for all of them.
        seed: root of all random streams, at the sites too.
        public: the server's own rows, for methods that need some.
        profiles: of the sites' hardware; None: all alike.
        evaluate: also ask every site for the metrics of its model on its own test rows, after each round.
        patience: seconds to wait for the nodes.
        reply_limit: largest reply, in bytes, that is accepted.

    Raises:
        AtollError: a method whose parts clash, or that Flower's loop cannot run.
    """
    if not method.schedule.synchronous:
        raise AtollError(
            f"{type(method.schedule).__name__} merges without waiting for all replies, but a Flower strategy gets the "
            "replies of a round together; use a method with the schedule Synchronous, or run it with `atoll run`."
        )
    if method.secure is not None:
        raise AtollError(
            "A secure sum needs several exchanges with the sites in a round, but a Flower strategy has one; run it "
            "with `atoll server`, or leave `secure` out."
        )
    empty = Dataset({"x": torch.empty(0)}, Info(name="empty"))
    sites = tuple(SiteData(empty, empty, empty) for _ in range(num_sites))
    federation = Federation(sites, empty, public, getattr(task, "info", empty.info))
    if method.topology.arrange(federation) is not federation:
        raise AtollError(f"{type(method.topology).__name__} moves rows between sites, which real sites cannot do.")
    check_method(method, task, federation)
    setup = Setup(
        task=task, method=method, federation=federation, seed=seed,
        profiles=tuple(profiles) if profiles is not None else (DeviceProfile(),) * num_sites,
    )  # fmt: skip
    return MethodStrategy(setup, evaluate, patience, reply_limit)


class MethodStrategy(Strategy):
    """Made by :func:`strategy`. ``engine`` holds the run, ``rows`` the ledger, one row a round."""

    def __init__(self, setup: Setup, evaluate: bool, patience: float, reply_limit: int) -> None:
        self.setup, self.evaluate, self.patience = setup, evaluate, patience
        self.limits = Limits(max_bytes=reply_limit)
        self.rows: list[Row] = []
        self.engine: Engine | None = None
        self._last = 0

    def start(self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, *more: Any, **named: Any) -> Result:
        """Flower's loop. After the last round sites are brought what the run ends with, where that is not what the
        round ended with."""
        self._last = num_rounds
        return super().start(grid, initial_arrays, num_rounds, *more, **named)

    def initial_arrays(self) -> ArrayRecord:
        """The weights that the task builds from the seed, for ``start``."""
        return _arrays(named_tensors(self.setup.task.model(self.setup.seed, None)))

    def summary(self) -> None:
        m = self.setup.method
        parts = {"Share": m.share, "Local": m.local, "Combine": m.combine, "Server": m.server, "Select": m.select}
        log(INFO, "\t├──> Method: %s (%s)", m.card.name, m.card.summary)
        for name, part in parts.items():
            log(INFO, "\t├──> %s: %s", name, type(part).__name__)
        codecs = [" -> ".join(type(c).__name__ for c in chain) or "none" for chain in (m.uplink, m.downlink)]
        log(INFO, "\t└──> Codecs: up %s, down %s", *codecs)

    # ---------------------------------------------------------------- training

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to the sites of this round. In round 1 the run starts, from ``arrays``."""
        if server_round == 1:
            self._begin(arrays, grid)
        assert self.engine is not None
        self._step = _Step(self.engine)
        jobs = self._workers.submitted(self._step)
        config["server-round"] = server_round
        requests = {job.site: self._workers.dispatch.request(job) for job in jobs}
        return [self._message(site, request, config, "train") for site, request in requests.items()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new global arrays (None where sites share no weights), and what the round has cost."""
        assert self.engine is not None
        for site, said in self._read(replies).items():
            self._workers.arrived(site, said)
        self._workers.over()
        row = self._step.result()
        self.engine.commit()
        if server_round == self._last:
            self.engine.conclude()
        for site in self._workers.lacking:
            self.engine.state.seen.pop(site, None)  # it gets all that it may lack when it is asked again
        self._workers.lacking.clear()
        self.rows.append(row)
        for site, reason in row.refused.items():
            log(INFO, "\t> Site %d: %s", site, reason)
        for note in row.notes:
            log(INFO, "\t> %s", note)
        cost: Numbers = {
            "replies": row.replies, "refused": len(row.refused),
            "down-bytes": sum(row.down_bytes.values()), "up-bytes": sum(row.up_bytes.values()),
        }  # fmt: skip
        weights = {site: self._workers.examples.get(site, 0) for site in row.site_metrics}
        return self._global(), MetricRecord({**cost, **_mean(row.site_metrics, weights)})

    # ---------------------------------------------------------------- evaluation at the sites

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Every site is asked for the metrics of the model that it would use now."""
        if not self.evaluate or self.engine is None:
            return []
        config["server-round"], tags = server_round, self.engine.state.tags
        jobs = [Job(site, 0, state_tag=tags.get(site)) for site in self._nodes]
        return [self._message(j.site, self._workers.dispatch.request(j, "test"), config, "evaluate") for j in jobs]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The mean over the sites, weighted by their test rows."""
        replies = list(replies)
        weights = {self._site_of[m.metadata.src_node_id]: _examples(m) for m in replies}
        metrics = {}
        for site, said in self._read(replies).items():
            try:
                metrics[site] = self._workers.dispatch.metrics(said, Job(site, 0))
            except SiteFailed as e:
                log(INFO, "\t> %s", e)
        found = _mean(metrics, weights)
        return MetricRecord(found) if found else None

    # ---------------------------------------------------------------- the run

    def _begin(self, arrays: ArrayRecord, grid: Grid) -> None:
        self._nodes = self._find(grid)
        self._site_of = {node: site for site, node in self._nodes.items()}
        self._workers = _Mail(self.setup, f"{grid.run.run_id}")
        self._take_over(arrays)
        self.rows.clear()
        self.engine = Engine(self.setup, self._workers, reply_limit=self.limits.max_bytes)

    def _take_over(self, arrays: ArrayRecord) -> None:
        """Start from the caller's weights. What the first broadcast does not bring to the sites must be what they
        have by agreement."""
        method, at = self.setup.method, self._workers.local.site_model(None)
        opening = method.server.open(method.share.initial(at.model)).common
        agreed = named_tensors(self.setup.task.model(self.setup.seed, None))
        given = {n: torch.from_numpy(a.numpy()) for n, a in arrays.items()}
        if odd := sorted(given.keys() ^ agreed.keys()) or [n for n, t in given.items() if t.shape != agreed[n].shape]:
            raise AtollError(
                f"`initial_arrays` and the task's model do not agree about `{odd[0]}`; give "
                "`ArrayRecord(model.state_dict())` of that model, or `strategy.initial_arrays()`."
            )
        for name, t in given.items():
            if name in opening.parts.get("weights", {}):
                at.tensors[name].detach().copy_(t)
            elif t.is_floating_point() and not torch.equal(t, agreed[name].detach().to(t.dtype)):
                raise AtollError(
                    f"`initial_arrays` has other values in `{name}` than the task builds from seed {self.setup.seed}, "
                    f"and {method.card.name} does not send these to the sites; start from `strategy.initial_arrays()`, "
                    "or give the task your weights."
                )

    def _find(self, grid: Grid) -> dict[int, int]:
        """The node of each site. A site's number is its partition where Flower gave it one."""
        until, wanted = time.monotonic() + self.patience, len(self.setup.federation.sites)
        while len(nodes := sorted(grid.get_node_ids())) < wanted and time.monotonic() < until:
            time.sleep(LOOK)
        if len(nodes) != wanted:
            raise RunError(f"{len(nodes)} nodes are there, but the strategy was made for {wanted} sites.")
        hello = [Message(to_records(Ours(HELLO)), node, "query") for node in nodes]
        left = max(1.0, until - time.monotonic())
        said = {m.metadata.src_node_id: self._plain(m) for m in grid.send_and_receive(hello, timeout=left)}
        for node in nodes:
            if not isinstance(answer := said.get(node, "no answer"), Ours) or answer.kind != HELLO:
                raise RunError(f"Node {node} does not run `atoll.flower.client_app` ({answer}).")
        numbers = {node: m.facts.get("partition") for node, m in said.items() if isinstance(m, Ours)}
        if sorted(map(str, numbers.values())) == sorted(map(str, range(wanted))):
            return {int(str(number)): node for node, number in sorted(numbers.items(), key=lambda i: int(str(i[1])))}
        return dict(enumerate(nodes))

    def _message(self, site: int, request: Ours, config: ConfigRecord, kind: str) -> Message:
        records = with_seed(to_records(request), self.setup.seed)
        records["config"] = config
        return Message(records, self._nodes[site], kind)

    def _read(self, replies: Iterable[Message]) -> dict[int, Ours | str]:
        """By site, the answer or why there is none."""
        return {self._site_of[m.metadata.src_node_id]: self._plain(m) for m in replies}

    def _plain(self, reply: Message) -> Ours | str:
        if reply.has_error():
            return f"Flower: {(reply.error.reason or 'no reason given')[:300]}"
        try:
            said = from_records(reply.content, self.limits)
        except AtollError as e:
            return str(e)
        return str(said.facts.get("error"))[:300] if said.kind == FAILED else said

    def _global(self) -> ArrayRecord | None:
        """The global model, without what stays at the sites."""
        assert self.engine is not None
        at, s = self._workers.local.site_model(None), self.engine.state
        replica = self.setup.method.server.result(s.replica, s.server)
        model = copy.deepcopy(at.model)  # an export may change the model for good
        tensors = named_tensors(self.setup.method.share.export(model, replica))
        found = {n: t for n, t in tensors.items() if n not in at.split.private}
        return _arrays(found) if at.split.shared else None


class _Step:
    """One merge of the engine, in a thread."""

    def __init__(self, engine: Engine) -> None:
        self._row: Row | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(engine,), name="atoll-round", daemon=True)
        self._thread.start()

    def _run(self, engine: Engine) -> None:
        try:
            self._row = engine.step()
        except BaseException as e:
            self._error = e

    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Row:
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._row is not None
        return self._row


class _Mail:
    """The engine's workers: what it submits goes to Flower's loop, and what that hands over is the result."""

    def __init__(self, setup: Setup, run: str) -> None:
        self.local = Worker(setup, MemoryStates())
        self.dispatch = Dispatch(setup.method.share, run)
        self.examples: dict[int, int] = {}
        self.lacking: set[int] = set()
        self._submitted: queue.Queue[Sequence[Job]] = queue.Queue()
        self._jobs: dict[int, Job] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._over = threading.Event()

    # ---------------------------------------------------------------- as the engine sees it

    def publish(self, publication: Publication) -> None:
        self.local.publish(publication.replica)
        self.dispatch.publish(publication)

    def submit(self, jobs: Sequence[Job]) -> list[int]:
        self._over.clear()
        self._outcomes.clear()
        self._jobs = {job.site: job for job in jobs}
        self._submitted.put(jobs)
        return [job.site for job in jobs]

    def result(self, ticket: int) -> Outcome:
        self._over.wait()
        return self._outcomes.get(ticket) or Outcome(ticket, None, error="no answer in time")

    def release(self, ticket: int) -> None:
        """Replies have memory of their own."""

    # ---------------------------------------------------------------- as the strategy sees it

    def submitted(self, step: _Step) -> Sequence[Job]:
        """The visits of this round; none when the step ended without any."""
        while True:
            try:
                return self._submitted.get(timeout=0.05)
            except queue.Empty:
                if not step.running():
                    return []

    def arrived(self, site: int, said: Ours | str) -> None:
        if site not in self._jobs:
            return  # a stranger's reply: nobody asked this site
        if isinstance(said, Ours) and self.dispatch.lacks(said):
            self.lacking.add(site)
            said = "the site has lost its model; it gets a new one with its next visit"
        outcome = self.dispatch.outcome(said, self._jobs[site])
        self._outcomes[site], self.examples[site] = outcome, outcome.num_samples

    def over(self) -> None:
        """No more replies come in this round."""
        self._over.set()


def _arrays(tensors: Tree) -> ArrayRecord:
    """For Flower and NumPy, which have no bfloat16: such tensors become float32."""
    plain = {n: t.detach().cpu() for n, t in tensors.items()}
    return ArrayRecord({n: Array((t.float() if t.dtype == torch.bfloat16 else t).numpy()) for n, t in plain.items()})


def _examples(reply: Message) -> int:
    """How many rows a site says are behind its metrics."""
    record = None if reply.has_error() else reply.content.metric_records.get("metrics")
    count = record.get("num-examples") if record is not None else None
    return count if isinstance(count, int) and count > 0 else 0


def _mean(metrics: Mapping[int, Mapping[str, float]], weights: Mapping[int, int]) -> Numbers:
    """By name, the weighted mean over the sites that have it."""
    out: Numbers = {}
    for name in sorted({name for m in metrics.values() for name in m}):
        having = [s for s, m in metrics.items() if name in m]
        if total := sum(weights.get(s, 0) for s in having):
            out[name] = sum(metrics[s][name] * weights.get(s, 0) for s in having) / total
    return out
