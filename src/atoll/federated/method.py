"""What a federated method is: FedAvg with named differences, and the protocols of its parts.

Read this page and ``visit.py`` and you know the whole contract. Each protocol has one to five small functions
over plain data; state that outlives a call is a value that goes in and comes out, so checkpoint, resume and
replay are free. ``docs/architecture.md`` writes five very different methods in these words.

The round, with no codec::

    broadcast, state = server.step(replica, state, combine.combine(replies))
    replica          = share.receive(replica, broadcast)         # once: every site derives the same
    message          = local.run(visit)                          # at each site, with the replica installed

A *replica* is what any up-to-date site can compute from the broadcasts so far: for FedAvg the weights, for FLoRA
the base with every stack merged, for FedKSeed the weights rebuilt from seeds. A simulator computes it once and
shares it; a real site computes its own with the same function, so that both have the same bits.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, Protocol

import torch
from torch import nn

from atoll.core.card import Card
from atoll.core.errors import BadReply
from atoll.core.message import Message
from atoll.core.streams import stream
from atoll.core.tree import Parts, Tree, clone, copy_, named_tensors
from atoll.federated.secure.secure_sum import SecureSum
from atoll.privacy.accounting import Sampling

if TYPE_CHECKING:
    from atoll.data.dataset import Info
    from atoll.federated.visit import Result, SiteModel, Visit
    from atoll.models.model import ModelBuilder


# ------------------------------------------------------------------------------------------- plain data


@dataclass(frozen=True, slots=True)
class Split:
    """Names of a model's tensors: ``shared`` travel, ``private`` stay at the site; all others are frozen."""

    shared: tuple[str, ...] = ()
    private: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """A decoded and checked message from one site.

    Attributes:
        num_samples: training examples behind the reply (1 when a codec hides it).
        staleness: merges between the version the site worked from and now; 0 in synchronous schedules.
        seconds: virtual time from the start of the visit to the reply's arrival.
    """

    site: int
    message: Message
    num_samples: int = 1
    staleness: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Broadcast:
    """The server's answer to a round.

    Attributes:
        common: for all sites; it moves the replica.
        per_site: extra content for single sites, instead of ``common`` in their visit (the replica ignores it).
        everyone: the next round must include every site (e.g. a setup round), whatever ``select`` says.
        asks: the next round has these sites, whatever ``select`` says; it chooses when there are none, or when no
            merge came of that round.
        notes: sentences for the report of this merge, e.g. which sites were grouped.
    """

    common: Message
    per_site: Mapping[int, Message] = field(default_factory=dict)
    everyone: bool = False
    asks: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SiteInfo:
    """What the server knows about a site without seeing its data."""

    site: int
    num_samples: int
    profile: DeviceProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """A site's hardware. Feeds the virtual clock, ranks and model choice; never changes an answer by itself.

    Attributes:
        flops_per_second: sustained training speed.
        up_bytes_per_second, down_bytes_per_second: link speed.
        memory_bytes: what one visit may use.
        availability: probability that the site can be asked in a round.
    """

    flops_per_second: float = 1e10
    up_bytes_per_second: float = 1.25e6
    down_bytes_per_second: float = 1.25e6
    memory_bytes: float = 8e9
    availability: float = 1.0


@dataclass(frozen=True, slots=True)
class MergeContext:
    """What the server may use in a merge besides the replies.

    Attributes:
        round: number of this merge, from 0.
        replica: what the sites hold, exact.
        num_sites: sites in the federation.
        seed: root of the named streams.
        task: the task (model builder and loss).
        public: the server's own data, or None.
        buffers: names of the model's buffers (e.g. running statistics): averaged, never stepped like weights.
        replies: how many replies were merged; known to the server step, 0 while combining.
        num_samples: training examples of all sites together.
        site: number of the site that merges (gossip); None at a server.
        model: where a site merges what its peers sent (gossip), its own model with the replica in it; else None.
            ``public`` is then the site's own validation rows, or its training rows.
    """

    round: int
    replica: Parts
    num_sites: int
    seed: int
    task: Any
    public: Any = None
    dry: bool = False
    buffers: frozenset[str] = frozenset()
    replies: int = 0
    num_samples: int = 0
    site: int | None = None
    model: nn.Module | None = None

    def stream(self, *name: str | int) -> torch.Generator:
        return stream(self.seed, "server", *name, self.round)


# -------------------------------------------------------------------------------------------- protocols


class Share(Protocol):
    """What trains, what travels, what stays; and how a site turns broadcasts into its replica.

    Must   pure      ``receive`` depends on its arguments alone (server and sites run it and agree to the bit)
           install   puts every tensor of the replica that the model needs into the model, in place
    May    incremental  the replica depends on earlier broadcasts: a site that missed some must catch up
           same_model   every site has the same architecture (False: each may have its own)
    """

    package: ClassVar[str] = "atoll.federated.share"
    incremental: ClassVar[bool] = False
    same_model: ClassVar[bool] = True

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        """Change a fresh model once per worker (inject adapters, masks). ``site`` None: the server's copy. The global
        generators follow the run's seed, so that new weights are the same everywhere."""
        return model

    def prepare_for(self, model: nn.Module, site: SiteInfo | None, rows: Info) -> nn.Module:
        """:meth:`prepare`, for shares whose changes depend on what a row looks like (a decoder's outputs, widths)."""
        return self.prepare(model, site)

    def prepare_key(self, site: SiteInfo | None) -> object:
        """Sites with equal keys may share one prepared model instance."""
        return None

    def split(self, model: nn.Module) -> Split: ...

    def initial(self, model: nn.Module) -> Parts:
        """The replica before any broadcast: what everybody has by agreement (seed or pretrained checkpoint)."""
        return {"weights": clone({n: named_tensors(model)[n] for n in self.split(model).shared})}

    def receive(self, replica: Parts, message: Message) -> Parts:
        """The replica after a broadcast."""
        return message.parts

    def snapshot(self, replica: Parts) -> Message:
        """A broadcast that brings any site to ``replica``, however many it missed (incremental shares only)."""
        return Message("weights", replica)

    def install(self, at: SiteModel, replica: Parts) -> None:
        """Put the replica into the model, in place. ``at.tensors`` are cached views of all its tensors."""
        copy_(at.tensors, replica.get("weights", {}))

    def own(self, replica: Parts, at: SiteModel) -> Parts:
        """What of the replica a site with such a model works from (where there are models of several sizes)."""
        return replica

    def check(self, reply: Message, replica: Parts) -> None:
        """Raise :class:`BadReply` when parts, names, shapes or types of a decoded reply cannot be right."""
        expect_only(reply, "delta")
        expect_like(reply, "delta", replica.get("weights", {}))

    def export(self, model: nn.Module, replica: Parts) -> nn.Module:
        """The global model in the form its own ecosystem loads."""
        copy_(named_tensors(model), replica.get("weights", {}))
        return model

    def personal(self, model: nn.Module) -> nn.Module:
        """A site's own model in the form its own ecosystem loads, where sites keep private tensors."""
        return model

    def exported(self, network: ModelBuilder, model: nn.Module) -> ModelBuilder:
        """What builds models with the tensors of ``model``, an exported one, where ``network`` builds the task's."""
        return network


class LocalWork(Protocol):
    """What a site does with a broadcast.

    Must   stateless  all that outlives the call is in the returned ``Result.state``
           named      random numbers come from ``visit.stream(...)`` (the global generator is seeded per visit)
           dry        with ``visit.dry`` no step is taken, but message, state and cost have their true sizes
    May    data_dependent_size  a message's size depends on what was learned; a dry visit then gives the most
           epsilon              what a run spends of privacy at the site already, or None
           epsilon_of           of what: each training row, unless it says so
           tells                a message's facts speak of the data too, where no noise reaches
           alternates           knows tasks whose networks take turns, each with a loss of its own
    """

    package: ClassVar[str] = "atoll.federated.local"
    produces: ClassVar[str] = "delta"
    synchronous_only: ClassVar[bool] = False
    tells: ClassVar[bool] = False
    alternates: ClassVar[bool] = False

    @property
    def data_dependent_size(self) -> bool:
        return False

    @property
    def epsilon(self) -> float | None:
        return None

    @property
    def epsilon_of(self) -> str:
        return "row"

    def over(self, rounds: int) -> LocalWork:
        """The same work in a run of so many rounds, for what is scheduled over a whole run."""
        return self

    def run(self, visit: Visit) -> Result: ...

    def together(self, at: SiteModel, task: Any) -> int:
        """How many visits to models like this one :meth:`run_many` would like to have at once."""
        return 1

    def run_many(self, visits: Sequence[Visit]) -> list[Result]:
        """The results of several visits of one round, each with a model of its own, to the bit those of ``run``."""
        return [self.run(visit) for visit in visits]


class Codec(Protocol):
    """What happens to a message on its way. Applies to floating-point tensors; integers pass unless it says so.

    Must   shape   ``decode(encode(m))`` has the names, shapes and dtypes of ``m``
           bytes   the size of the encoded message is what the wire would carry (packed bits, real indices)
           wary    ``decode`` raises MessageError for anything that ``encode`` could not have sent, and allocates no
                   more than a fixed multiple of what it received
    May    lossy     the decoded message differs from the sent one
           private   adds noise that an accountant counts; then nothing else of the message may speak of the data
           sparse    most coordinates of the decoded message are zero
           order     clip 0 < noise 1 < sparsify 2 < quantise 3
           feedback  keeps an error at the sender (a server has no place for it)
           bound     L2 norm that no message exceeds after this codec, or None
           assumes_bound  the bound that its promise rests on; None for one that bounds the message itself
           needs_sum the promise holds for the plain sum over the cohort, not for one message
           noise     standard deviation over ``assumes_bound``, as far as an accountant may count on it
           renyi     for noise that is not Gaussian: what a release costs, instead of ``noise``
    """

    package: ClassVar[str] = "atoll.federated.codecs"
    lossy: ClassVar[bool] = True
    private: ClassVar[bool] = False
    sparse: ClassVar[bool] = False
    order: ClassVar[int] = 3

    @property
    def feedback(self) -> bool:
        return False

    @property
    def bound(self) -> float | None:
        return None

    @property
    def assumes_bound(self) -> float | None:
        return None

    @property
    def needs_sum(self) -> bool:
        return False

    @property
    def noise(self) -> float:
        return 0.0

    def renyi(self, replies: int) -> tuple[float, ...]:
        """Renyi divergence at each of ``privacy.accounting.ORDERS`` when one site's data are replaced, of a message or,
        with ``needs_sum``, of the sum of ``replies`` messages; empty when ``noise`` says it all."""
        return ()

    def encode(self, message: Message, state: Parts, context: CodecContext) -> tuple[Message, Parts]:
        """The encoded message and the codec's new state at this sender (e.g. the error it feeds back)."""
        ...

    def decode(self, message: Message) -> Message: ...


@dataclass(frozen=True, slots=True)
class CodecContext:
    """Where an encoding happens. ``cohort`` is the number of sites asked in this round."""

    seed: int
    round: int
    site: int
    cohort: int = 1

    def stream(self, *name: str | int) -> torch.Generator:
        return stream(self.seed, "codec", *name, self.round, self.site)


class Combine(Protocol):
    """Replies of one merge in, one message out.

    Must   order   the engine hands replies in canonical order; the result is a function of that sequence
           pure    nothing is remembered between calls
           stream  do not keep replies unless the mathematics needs them together
    May    additive   the result is sum_k w_k u_k, so masks or additive encryption can run underneath
           accepts    message kinds it can merge; ``("*",)`` for any
           weighted   uses num_samples (which client-level privacy must forbid)
           divisor    the constant that a sum is divided by, or None when it depends on the replies
           coordinatewise  compares replies coordinate by coordinate (zeros of a sparsifier would outvote the rest)
           least      fewest replies it can merge
           summable   additive over floating-point numbers: ``term`` and ``total`` say how, for secure sums
           counted    parts of a term that are added without the reply's weight
           interval   virtual seconds between merges that its weights count on, or None
           restless   its weights count on all sites starting again as soon as they can
           at_peers   judges replies by a site's own model and rows, so it merges at sites alone (gossip)
           again      takes what it gives, as where aggregators merge below the server
    """

    package: ClassVar[str] = "atoll.federated.combine"
    additive: ClassVar[bool] = False
    accepts: ClassVar[tuple[str, ...]] = ("delta",)
    coordinatewise: ClassVar[bool] = False
    needs_public_data: ClassVar[bool] = False
    summable: ClassVar[bool] = False
    counted: ClassVar[tuple[str, ...]] = ()
    restless: ClassVar[bool] = False
    at_peers: ClassVar[bool] = False
    again: ClassVar[bool] = True

    @property
    def interval(self) -> float | None:
        return None

    @property
    def weighted(self) -> bool:
        return False

    @property
    def divisor(self) -> float | None:
        return None

    @property
    def least(self) -> int:
        return 1

    def combine(self, replies: Iterable[Reply], context: MergeContext) -> Message: ...

    def term(self, message: Message, replica: Parts) -> Message:
        """What a reply adds to the sum, before its weight (number of examples when ``weighted``, else 1)."""
        return message

    def total(self, sums: Message, weight: float) -> Message:
        """The combined message from the sum of the weighted terms (whose tensors it may reuse) and of the weights."""
        return sums


class ServerStep(Protocol):
    """Server-side work after combining: an optimizer, a merge into a base, distillation on public data, ...

    May    accepts     kinds of combined message it understands
           broadcasts  the kind it sends after a merge; ``"weights"`` is a whole model, which must not be sparsified
           adds        the step is ``weights += delta`` and nothing else, which peers can do without a server
    """

    package: ClassVar[str] = "atoll.federated.server"
    accepts: ClassVar[tuple[str, ...]] = ("delta",)
    broadcasts: ClassVar[str] = "weights"
    needs_public_data: ClassVar[bool] = False

    @property
    def adds(self) -> bool:
        return False

    def init(self, replica: Parts) -> Parts:
        """The server's own state before round 0 (e.g. optimizer moments)."""
        return {}

    def open(self, replica: Parts) -> Broadcast:
        """The first broadcast."""
        return Broadcast(Message("weights", replica))

    def step(
        self, replica: Parts, state: Parts, combined: Message, context: MergeContext
    ) -> tuple[Broadcast, Parts]: ...

    def result(self, replica: Parts, state: Parts) -> Parts:
        """What the run would end with now: what is evaluated as the global model, saved, and in the end brought to the
        sites. It may be better than what they go on from, such as an average over rounds; ``replica`` itself says that
        there is nothing better. Sound where every broadcast is a whole model."""
        return replica


class Select(Protocol):
    """Who takes part in a round. A function of (round, sites, seed) alone, so that a plan can foresee it.

    May    sampling  the law by which sites are drawn when all are available: what a privacy accountant relies on
    """

    package: ClassVar[str] = "atoll.federated.select"

    def sampling(self, num_sites: int) -> Sampling:
        return Sampling()

    def choose(self, round: int, sites: Sequence[SiteInfo], seed: int) -> list[int]: ...


class Schedule(Protocol):
    """When the server merges what, on the fleet's virtual clock.

    May    interval  virtual seconds between merges, where they are fixed
    """

    package: ClassVar[str] = "atoll.federated.schedules"
    synchronous: ClassVar[bool] = True

    @property
    def interval(self) -> float | None:
        return None

    def collect(self, fleet: Fleet) -> Iterable[Reply]:
        """Start visits and yield the replies of the next merge, in canonical order."""
        ...


class Fleet(Protocol):
    """What a schedule sees of the engine."""

    @property
    def now(self) -> float:
        """Virtual seconds since the start."""

    @property
    def round(self) -> int: ...

    @property
    def in_flight(self) -> Mapping[int, Any]:
        """By site, the visits that have begun and not landed."""

    @property
    def sites(self) -> Sequence[SiteInfo]: ...

    def select(self) -> list[int]:
        """The sites of this round, by the method's ``select`` (others when the broadcast asks for them)."""

    def pick_idle(self, count: int) -> list[int]:
        """Up to ``count`` available sites that have no visit in flight, at random."""

    def start(self, sites: Sequence[int]) -> None:
        """Begin a visit at each site now, from the current broadcast."""

    def all_arrivals(self) -> Iterator[Reply]:
        """Replies of every visit in flight in canonical order; the clock moves to the last arrival."""

    def next_time(self) -> float:
        """When the earliest visit in flight arrives; infinity when there is none."""

    def next_arrival(self) -> Reply | None:
        """The earliest arrival (equal times: by site), moving the clock to it; None: that visit failed, or there
        is none in flight."""

    def arrivals_until(self, time: float) -> Iterator[Reply]:
        """Replies that arrive by then, in canonical order; the clock moves to ``time`` or the last arrival."""

    def wait_until(self, time: float) -> None:
        """Move the clock to ``time`` (never back)."""

    def drop_in_flight(self, reason: str) -> None:
        """Give up on every visit in flight; each is counted under ``reason``."""


class Topology(Protocol):
    """Who talks to whom.

    May    arrange   regroup the federation before the run starts
           problems  why a method cannot run on it, each a sentence with the alternative
           compose   the method in the parts that this topology needs; called again on its own result, changes nothing
           combine   run the combiner along the links between aggregators
           relays    how many links between aggregators a broadcast passes, besides those to the sites
           peers     sites merge, and no server does
    """

    package: ClassVar[str] = "atoll.federated.topologies"
    peers: ClassVar[bool] = False

    def arrange(self, federation: Any) -> Any:
        return federation

    def problems(self, method: Method) -> list[str]:
        return []

    def compose(self, method: Method) -> Method:
        return method

    def combine(self, combiner: Combine, replies: Iterable[Reply], context: MergeContext) -> tuple[Message, int]:
        """The combined message, and the bytes that links between aggregators carried for it."""
        return combiner.combine(replies, context), 0

    def relays(self, num_sites: int) -> int:
        return 0


class Backend(Protocol):
    """Where visits run. It never changes the answer. See ``backends/inline.py``, the reference."""

    package: ClassVar[str] = "atoll.federated.backends"

    def open(self, setup: Any) -> Any: ...


# ------------------------------------------------------------------------------------------- the method


def _defaults() -> dict[str, Any]:
    from atoll.federated.combine.weighted_mean import WeightedMean
    from atoll.federated.local.local_sgd import LocalSGD
    from atoll.federated.schedules.synchronous import Synchronous
    from atoll.federated.select.uniform import Uniform
    from atoll.federated.server.apply import Apply
    from atoll.federated.share.parameters import Parameters
    from atoll.federated.topologies.star import Star

    return {
        "share": Parameters(), "local": LocalSGD(), "combine": WeightedMean(), "server": Apply(),
        "select": Uniform(), "schedule": Synchronous(), "topology": Star(),
    }  # fmt: skip


def _default(name: str) -> Any:
    return field(default_factory=lambda: _defaults()[name])


@dataclass(frozen=True, kw_only=True)
class Method:
    """A composition of parts. Every default is FedAvg's, so a paper is the fields that it replaces."""

    package: ClassVar[str] = "atoll.federated.methods"

    share: Share = _default("share")
    local: LocalWork = _default("local")
    uplink: tuple[Codec, ...] = ()
    downlink: tuple[Codec, ...] = ()
    combine: Combine = _default("combine")
    server: ServerStep = _default("server")
    select: Select = _default("select")
    schedule: Schedule = _default("schedule")
    topology: Topology = _default("topology")
    secure: SecureSum | None = None
    """Masks under which replies are summed; None: the server sees each."""
    card: Card = field(default=Card(name="custom", area="federated method", summary="a composition of parts"))
    arguments: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The builder's arguments, so that a run can write down its resolved recipe."""

    def but(self, **parts: Any) -> Method:
        """The same method with other parts, e.g. ``fedavg().but(uplink=(Quantise(bits=8),))``."""
        return replace(self, **parts)


P = ParamSpec("P")


def method(card: Card) -> Callable[[Callable[P, Method]], Callable[P, Method]]:
    """Mark a builder of a published method: its result carries the card and the arguments.

    The builder's signature is the configuration schema; YAML, the command line and the docs are made from it.
    """

    def mark(builder: Callable[P, Method]) -> Callable[P, Method]:
        signature = inspect.signature(builder)

        @functools.wraps(builder)
        def build(*args: P.args, **kwargs: P.kwargs) -> Method:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return replace(builder(*args, **kwargs), card=card, arguments=dict(bound.arguments))

        return build

    return mark


def expect_only(reply: Message, *parts: str) -> None:
    """Raise :class:`BadReply` when ``reply`` has other parts: a combiner could merge it with no other reply."""
    if odd := sorted(reply.parts.keys() - set(parts)):
        raise BadReply(f"unknown part `{odd[0]}`; a reply consists of {', '.join(parts)}")


def expect_like(reply: Message, part: str, like: Tree) -> None:
    """Raise :class:`BadReply` unless ``reply`` has exactly the names, shapes and types of ``like`` under ``part``."""
    got = reply.parts.get(part, {})
    if got.keys() != like.keys():
        odd = sorted(got.keys() ^ like.keys())
        raise BadReply(f"part `{part}` has missing or unknown tensors: {', '.join(odd[:3])}")
    for name, t in got.items():
        if t.shape != like[name].shape:
            raise BadReply(f"`{part}/{name}` has shape {list(t.shape)}, expected {list(like[name].shape)}")
        if t.dtype != like[name].dtype:  # the mean would take it over, and the weights after it
            raise BadReply(f"`{part}/{name}` has type {t.dtype}, expected {like[name].dtype}")
