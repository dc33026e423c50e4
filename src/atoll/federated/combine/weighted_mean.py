"""The weighted mean of replies: FedAvg's merge."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from atoll.core.errors import BadReply
from atoll.core.message import Message
from atoll.core.tree import Tree, add_, scale_
from atoll.federated.method import Combine, MergeContext, Reply


@dataclass(frozen=True)
class WeightedMean(Combine):
    """sum_k w_k u_k / sum_k w_k for every part, one reply in memory at a time.

    Args:
        by: ``"samples"`` weights a site by its number of training examples, ``"uniform"`` all alike.
        staleness: exponent a of the discount (1 + staleness)^-a that stale replies of asynchronous schedules
            get. The divisor stays the sum of undiscounted weights (as in FedBuff), so a stale reply takes a
            smaller step instead of a larger share.
    """

    by: Literal["samples", "uniform"] = "samples"
    staleness: float = 0.0
    additive: ClassVar[bool] = True
    summable: ClassVar[bool] = True
    accepts: ClassVar[tuple[str, ...]] = ("*",)

    @property
    def weighted(self) -> bool:
        return self.by == "samples"

    def combine(self, replies: Iterable[Reply], context: MergeContext) -> Message:
        total, kind = 0.0, ""
        sums: dict[str, Tree] = {}
        for reply in replies:
            weight = float(reply.num_samples) if self.by == "samples" else 1.0
            step = weight * (1.0 + reply.staleness) ** -self.staleness
            parts = reply.message.parts
            if not sums:
                kind = reply.message.kind
                # Multiplying makes tensors of our own: the reply may be a view of a buffer that is reused.
                sums = {part: {n: t * step for n, t in tree.items()} for part, tree in parts.items()}
            elif sums.keys() != parts.keys():
                raise BadReply(f"site {reply.site} sent parts {sorted(parts)}, others {sorted(sums)}")
            else:
                for part, tree in parts.items():
                    add_(sums[part], tree, alpha=step)
            total += weight
        return self.total(Message(kind, sums), total)

    def total(self, sums: Message, weight: float) -> Message:
        if not weight:
            raise BadReply("the sites that replied have no training examples, so their replies weigh nothing")
        for tree in sums.parts.values():
            scale_(tree, 1.0 / weight)
        return sums
