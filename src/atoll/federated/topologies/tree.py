"""Aggregators between the sites and the server: each merges what its children send and sends one message upwards."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge

from atoll.core import tree as tensors
from atoll.core.card import Card, Cite
from atoll.core.message import Message, encoded_size
from atoll.federated.method import Combine, MergeContext, Method, Reply, Topology

CARD = Card(
    name="tree",
    area="topology",
    summary="aggregators between sites and server merge what their children send",
    cites=(
        Cite(
            authors="Lumin Liu, Jun Zhang, S.H. Song, Khaled B. Letaief",
            year=2019,
            title="Client-Edge-Cloud Hierarchical Federated Learning",
            arxiv="1905.06641",
            venue="ICC",
        ),
    ),
    server_sees="what the uppermost aggregators send; each aggregator sees its children's messages",
    suits=("many sites",),
)


@dataclass(frozen=True)
class Tree(Topology):
    """Hierarchical aggregation (Liu et al., 2019, arXiv 1905.06641), with one merge a round on every level.

    Sites ``0 .. fan_out - 1`` report to the first aggregator, the next ones to the second, and so on; above the
    lowest level, ``fan_out`` aggregators report to one, until as many are left as report to the server.

    A sum travels as a sum and its weight, so that a mean is the star's mean up to rounding. Other combiners are used
    at each aggregator and again above it: the median of medians is not the median of all, and an aggregator whose
    sites are mostly hostile is lost, while each of the others counts once. An aggregator holds what its combiner
    holds for ``fan_out`` children. Broadcasts pass each link between aggregators once; the virtual clock does not count
    the time on these links.

    Args:
        fan_out: children of an aggregator.
    """

    fan_out: Annotated[int, Ge(2)] = 10

    def levels(self, num_sites: int) -> list[int]:
        """How many aggregators there are, from the lowest level up; empty when all sites fit below the server."""
        out = []
        while num_sites > self.fan_out:
            num_sites = -(-num_sites // self.fan_out)
            out.append(num_sites)
        return out

    def relays(self, num_sites: int) -> int:
        return sum(self.levels(num_sites))

    def problems(self, method: Method) -> list[str]:
        combiner = type(method.combine).__name__
        out = []
        if not method.schedule.synchronous:
            out.append(
                f"Tree merges the replies of a round below the server, and under {type(method.schedule).__name__} they "
                "come one by one; use Synchronous, or Star."
            )
        if method.secure is not None:
            out.append(f"{type(method.secure).__name__} adds replies at the server, not in a Tree; use Star.")
        if not method.combine.summable and not ("delta" in method.combine.accepts and method.combine.again):
            out.append(
                f"Tree merges once more what aggregators send, and {combiner} gives another kind of message than it "
                "takes; use Star."
            )
        if not method.combine.summable and method.combine.least > self.fan_out:
            out.append(
                f"{combiner} needs {method.combine.least} replies, and an aggregator of this Tree has "
                f"{self.fan_out} children; use Tree(fan_out={method.combine.least})."
            )
        return out

    def combine(self, combiner: Combine, replies: Iterable[Reply], context: MergeContext) -> tuple[Message, int]:
        depth, carried = len(self.levels(context.num_sites)), [0]
        if combiner.summable:
            terms: Iterator[_Sum] = (_term(combiner, reply, context) for reply in replies)
            for _ in range(depth):
                terms = self._sums(terms, carried)
            sums = _added(terms)
            return combiner.total(sums.message, sums.weight), carried[0]
        for _ in range(depth):
            replies = self._merged(combiner, replies, context, carried)
        return combiner.combine(replies, context), carried[0]

    def _sums(self, terms: Iterable[_Sum], carried: list[int]) -> Iterator[_Sum]:
        for _, group in itertools.groupby(terms, key=lambda t: t.node // self.fan_out):
            total = _added(group)
            about = {**total.message.facts, "weight": total.weight}
            carried[0] += encoded_size(Message(total.message.kind, total.message.parts, about))
            yield replace(total, node=total.node // self.fan_out)

    def _merged(
        self, combiner: Combine, replies: Iterable[Reply], context: MergeContext, carried: list[int]
    ) -> Iterator[Reply]:
        for node, group in itertools.groupby(replies, key=lambda r: r.site // self.fan_out):
            counted = _Counted(group)
            message = combiner.combine(counted, context)
            carried[0] += encoded_size(Message(message.kind, message.parts, {"num_samples": counted.num_samples}))
            yield Reply(node, message, counted.num_samples)


@dataclass(frozen=True, slots=True)
class _Sum:
    """What an aggregator knows of the sites below it."""

    node: int
    message: Message
    weight: float


def _term(combiner: Combine, reply: Reply, context: MergeContext) -> _Sum:
    """A reply as a sum of one, in memory of its own."""
    weight = float(reply.num_samples) if combiner.weighted else 1.0
    message = combiner.term(reply.message, context.replica)
    parts = {
        part: {n: t * (1.0 if part in combiner.counted else weight) for n, t in tree.items()}
        for part, tree in message.parts.items()
    }
    return _Sum(reply.site, Message(message.kind, parts), weight)


def _added(terms: Iterable[_Sum]) -> _Sum:
    """The sum of terms, which it reuses. The engine asks for a merge only when there is a reply."""
    rest = iter(terms)
    first = next(rest)
    weight = first.weight
    for term in rest:
        for part, tree in term.message.parts.items():
            tensors.add_(first.message.parts[part], tree)
        weight += term.weight
    return replace(first, weight=weight)


class _Counted:
    """Replies, and the examples behind those that were taken."""

    def __init__(self, replies: Iterable[Reply]) -> None:
        self._replies, self.num_samples = replies, 0

    def __iter__(self) -> Iterator[Reply]:
        for reply in self._replies:
            self.num_samples += reply.num_samples
            yield reply
