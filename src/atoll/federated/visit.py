"""One visit as plain data: what a site is told, what its work may see, and what comes of it. The one who makes them is
the :class:`~atoll.federated.worker.Worker`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from atoll.core.message import Message
from atoll.core.streams import stream
from atoll.core.tree import Parts, Tree, pick
from atoll.data.dataset import Federation, SiteData
from atoll.federated.method import Codec, CodecContext, DeviceProfile, Method, SiteInfo, Split
from atoll.federated.secure.cohort import Cohort
from atoll.federated.secure.vault import Vault
from atoll.tasks.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """All that a worker needs to know, once.

    Attributes:
        method: as its topology composes it.
        vault: what sites keep to themselves for secure sums; None in a simulation.
    """

    task: Task
    method: Method
    federation: Federation
    profiles: tuple[DeviceProfile, ...]
    seed: int
    device: str = "cpu"
    threads: int = 1
    timeout: float | None = None
    state_folder: Path | None = None
    vault: Vault | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", self.method.topology.compose(self.method))

    def info(self, site: int) -> SiteInfo:
        return SiteInfo(site, len(self.federation.sites[site].train), self.profiles[site])


@dataclass(slots=True)
class SiteModel:
    """A prepared model and cached facts about it.

    Attributes:
        tensors: views of all parameters and buffers by name.
        initial: copies of what must be reset at each visit (private tensors of a new site, integer buffers).
        buffers: names of the tensors that are not parameters.
        flops: of one forward and one backward pass for one example, by which parameters train.
    """

    model: nn.Module
    tensors: Tree
    split: Split
    initial: Tree
    buffers: frozenset[str] = frozenset()
    flops: dict[tuple[bool, ...], tuple[float, float]] = field(default_factory=dict)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters to train: shared or private, and requiring a gradient."""
        names = {*self.split.shared, *self.split.private}
        return {n: p for n, p in self.model.named_parameters() if n in names and p.requires_grad}


@dataclass(frozen=True, slots=True)
class Cost:
    """Work in example passes: one forward, one backward through the model for one example."""

    forward: float = 0.0
    backward: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """What local work returns.

    Attributes:
        state: what this kind of work keeps at the site for the next visit.
        metrics: numbers for the report; they do not travel in the message.
    """

    message: Message
    state: Parts = field(default_factory=dict)
    cost: Cost = Cost()
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Visit:
    """What local work may see. The model holds the replica and this site's private tensors.

    Attributes:
        replica: what the site knows from broadcasts, e.g. ``replica["weights"]``. Read only.
        message: content for this site alone, decoded, or None.
        state: what the same work returned at this site's previous visit; empty at the first.
        dry: take no steps; reply with the true shapes (used to plan bytes).
    """

    site: SiteInfo
    round: int
    task: Task
    at: SiteModel
    data: SiteData
    replica: Parts
    message: Message | None
    state: Parts
    seed: int
    device: str = "cpu"
    repeat: int = 0
    dry: bool = False

    @property
    def model(self) -> nn.Module:
        return self.at.model

    def stream(self, *name: str | int) -> torch.Generator:
        """A random stream of this visit, e.g. ``visit.stream("batches")``."""
        again = (self.repeat,) if self.repeat else ()
        return stream(self.seed, *name, self.round, self.site.site, *again)

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.at.trainable()

    def shared(self) -> Tree:
        """Views of the tensors that travel."""
        return pick(self.at.tensors, self.at.split.shared)

    def batches(self, size: int, epochs: int = 1) -> Iterator[dict[str, Tensor]]:
        """The training rows in a fresh order each epoch, ``size`` at a time, the last batch as it comes; no batch
        for a site without rows. Rows that belong together (the nodes of a graph) are one batch, whatever ``size``."""
        train, order = self.data.train, self.stream("batches")
        n = len(train)
        if self.dry or not n:
            return
        if train.info.whole:
            yield from itertools.repeat(train.ready(device=self.device), epochs)
            return
        rows = train.ready(device=self.device) if epochs > 1 else None
        for _ in range(epochs):
            permutation = torch.randperm(n, generator=order)
            if rows is None:
                epoch = train.ready(permutation, self.device)
            else:
                where = permutation.to(self.device)
                epoch = {name: column[where] for name, column in rows.items()}
            names = list(epoch)
            for columns in zip(*(epoch[name].split(size) for name in names), strict=True):
                yield dict(zip(names, columns, strict=True))

    def random_batches(self, size: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """``steps`` batches of ``size`` rows, each drawn without replacement (all rows, where they belong together)."""
        if self.dry:
            return
        rows, order = self.data.train.ready(device=self.device), self.stream("batches")
        if self.data.train.info.whole:
            yield from itertools.repeat(rows, steps)
            return
        n = len(self.data.train)
        for _ in range(steps):
            where = torch.randperm(n, generator=order)[:size].to(self.device)
            yield {name: column[where] for name, column in rows.items()}


@dataclass(frozen=True, slots=True)
class Publication:
    """A broadcast, as the server, the wire and the sites see it.

    Attributes:
        round: names it.
        replica: what a site holds that has received it and, for an incremental share, all before it.
        encoded: the message as it travels.
    """

    round: int
    replica: Parts
    encoded: Message


@dataclass(frozen=True, slots=True)
class Job:
    """One visit to be done.

    Attributes:
        message: content for this site alone.
        state_tag: names the site's committed state.
        missing: the broadcasts that the site has not received, oldest first; None when a snapshot of the replica is
            the cheaper way (or the only one) to bring it up to date.
        secure: whom the reply is masked for.
    """

    site: int
    round: int
    repeat: int = 0
    cohort: int = 1
    message: Message | None = None
    state_tag: str | None = None
    missing: tuple[int, ...] | None = None
    dry: bool = False
    secure: Cohort | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job. ``message`` is encoded by the uplink codecs; ``error`` is set when the visit failed."""

    site: int
    message: Message | None
    state_tag: str | None = None
    num_samples: int = 1
    flops: float = 0.0
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


def encode_chain(
    codecs: tuple[Codec, ...], message: Message, states: list[Parts], context: CodecContext
) -> tuple[Message, list[Parts]]:
    """Apply codecs in order; each has its own state."""
    out = []
    for codec, state in zip(codecs, states, strict=True):
        message, new = codec.encode(message, state, context)
        out.append(new)
    return message, out


def decode_chain(codecs: tuple[Codec, ...], message: Message) -> Message:
    for codec in reversed(codecs):
        message = codec.decode(message)
    return message
