"""An ordinary ClientApp that does what a method asks of a site.

A visit arrives as native records, so Flower's mods see every array. What the site keeps between visits (private layers,
a codec's error, the replica of an incremental share) lies in Flower's own ``context.state``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp

from atoll.core.errors import AtollError
from atoll.core.message import NO_LIMITS, decode, detach, encode, seal, unseal
from atoll.core.message import Message as Ours
from atoll.core.tree import Parts
from atoll.data.dataset import Dataset, Federation, SiteData
from atoll.federated.dispatch import failed
from atoll.federated.method import DeviceProfile, Method
from atoll.federated.records import from_records, to_records
from atoll.federated.remote import RemoteSite
from atoll.federated.states import MemoryStates
from atoll.federated.visit import Setup
from atoll.federated.wire import unpack
from atoll.federated.worker import Worker
from atoll.flower.records import HELLO, seed_of

Numbers = dict[str, int | float | list[int] | list[float]]
Data = Callable[[Context], SiteData | Dataset]


def client_app(
    task: Any,
    method: Method,
    data: Data,
    *,
    mods: list[Any] | None = None,
    profile: DeviceProfile = DeviceProfile(),
    device: str = "cpu",
    threads: int = 1,
    timeout: float | None = None,
) -> ClientApp:
    """The site's side of :func:`atoll.flower.strategy`, with the same ``task`` and ``method``.

    Args:
        data: a node's rows, given Flower's context: three parts, or a data set to train on. Called for each message,
            so keep what is slow to load.
        mods: Flower's.
        profile: this site's hardware, where the method asks for it.
        device: where tensors live.
        threads: of one operator; the same number everywhere gives the same bits everywhere.
        timeout: seconds after which a visit counts as failed.
    """
    app, site = ClientApp(mods=mods), _Site(task, method, data, profile, device, threads, timeout)
    for register in (app.train, app.evaluate, app.query):
        register()(site.answer)
    return app


@dataclass(frozen=True)
class _Site:
    """What Flower pickles with every message of a simulation."""

    task: Any
    method: Method
    data: Data
    profile: DeviceProfile
    device: str
    threads: int
    timeout: float | None

    def answer(self, message: Message, context: Context) -> Message:
        """The reply; what goes wrong is said in it."""
        try:
            said, numbers = self._answer(message, context)
        except Exception as e:
            said, numbers = failed(str(e) if isinstance(e, AtollError) else f"{type(e).__name__}: {e}"), {}
        records = to_records(said)
        if numbers:
            records["metrics"] = MetricRecord(numbers)
        return Message(records, reply_to=message)

    def _answer(self, message: Message, context: Context) -> tuple[Ours, Numbers]:
        request = from_records(message.content)
        if request.kind == HELLO:
            return Ours(HELLO, {}, {"partition": context.node_config.get("partition-id")}), {}
        number, seed = unpack(request).job.site, seed_of(message.content)
        found = self.data(context)
        rows = found if isinstance(found, SiteData) else _only_train(found)
        kept = self._kept(message.metadata.run_id, seed, rows, number)
        said = ContextSite(kept, number, context).handle(request)
        if said.kind == "metrics":
            return said, {"num-examples": len(rows.test)}
        samples = said.facts.get("num_samples")  # a lack of broadcasts has none
        return said, {"num-examples": samples} if samples is not None else {}

    def _kept(self, run: int, seed: int, rows: SiteData, number: int) -> Kept:
        """This process's worker, given the rows of the site that it works for now."""
        none = SiteData(*(part.select([]) for part in (rows.train, rows.validation, rows.test)))
        setup = Setup(
            task=self.task, method=self.method, seed=seed, device=self.device, threads=self.threads,
            timeout=self.timeout, profiles=(self.profile,) * (number + 1),
            federation=Federation((none,) * number + (rows,), none.test, info=rows.train.info),
        )  # fmt: skip
        if (run, seed) not in _KEPT:
            _KEPT.clear()
            torch.set_num_threads(self.threads)
            _KEPT[run, seed] = Kept(Worker(setup, MemoryStates()), f"{run}")
        kept = _KEPT[run, seed]
        kept.worker.setup = setup
        return kept


class Kept:
    """A worker, and the replica before any broadcast (later, its model holds what visits left in it)."""

    def __init__(self, worker: Worker, run: str) -> None:
        self.worker, self.run = worker, run
        self.initial = worker.setup.method.share.initial(worker.site_model(None).model)


_KEPT: dict[tuple[int, int], Kept] = {}
"""By run and seed. A simulation unpickles the app for every message; only modules outlive that."""


def _only_train(data: Dataset) -> SiteData:
    return SiteData(data, data.select([]), data.select([]))


class ContextSite(RemoteSite):
    """A site that keeps everything in Flower's context, which follows the node from process to process."""

    def __init__(self, kept: Kept, number: int, context: Context) -> None:
        self._context, self._initial = context, kept.initial
        kept.worker.states = self
        self.worker, self.site, self.run = kept.worker, number, kept.run
        self.version, self._replica = self._stored()

    # ---------------------------------------------------------------- states (see atoll.federated.states.States)

    def get(self, site: int, tag: str) -> Ours:
        kept = self._read(f"atoll.state.{tag}")
        if kept is None:
            raise AtollError("this site no longer has the state that the server counts on; start the run again")
        return kept

    def put(self, site: int, tag: str, state: Ours) -> None:
        self._write(f"atoll.state.{tag}", state)

    def drop(self, site: int, tag: str) -> None:
        self._context.state.pop(f"atoll.state.{tag}", None)

    def sweep(self, keep: set[tuple[int, str]]) -> None:
        tags = {tag for _, tag in keep}
        for name in [n for n in self._context.state if n.startswith("atoll.state.")]:
            if name.removeprefix("atoll.state.") not in tags:
                del self._context.state[name]

    # ---------------------------------------------------------------- the same for RemoteSite

    def _sweep(self, tag: str | None) -> None:
        if tag is not None:
            self.get(self.site, tag)
        self.sweep({(self.site, tag)} if tag is not None else set())

    def _store(self) -> None:
        facts = {"version": self.version, "parts": list(self._replica)}
        self._write("atoll.replica", Ours("replica", self._replica, facts))

    def _stored(self) -> tuple[int, Parts]:
        kept = self._read("atoll.replica")
        if kept is None:
            return -1, self._initial
        return int(kept.facts["version"]), {name: kept.parts.get(name, {}) for name in kept.facts["parts"]}

    def _write(self, name: str, message: Ours) -> None:
        self._context.state[name] = ConfigRecord({"message": bytes(encode(seal(message)))})

    def _read(self, name: str) -> Ours | None:
        record = self._context.state.config_records.get(name)
        stored = record["message"] if record is not None else None
        return detach(unseal(decode(stored, NO_LIMITS))) if isinstance(stored, bytes) else None
