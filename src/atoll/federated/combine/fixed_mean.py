"""The sum of replies over a constant: a mean whose divisor says nothing (McMahan et al., 2018)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from atoll.core.card import Card, Cite
from atoll.core.errors import BadReply
from atoll.core.message import Message
from atoll.core.tree import add_, scale_
from atoll.federated.method import Combine, MergeContext, Reply

CARD = Card(
    name="fixed_mean",
    area="combiner",
    summary="the sum of the updates divided by the expected number of sites",
    cites=(
        Cite(
            authors="H. Brendan McMahan, Daniel Ramage, Kunal Talwar, Li Zhang",
            year=2018,
            title="Learning Differentially Private Recurrent Language Models",
            arxiv="1710.06963",
            venue="ICLR",
        ),
    ),
    server_sees="each site's update",
    additive=True,
    suits=("a privacy guarantee",),
)


@dataclass(frozen=True)
class FixedMean(Combine):
    """sum_i u_i / count, one reply in memory at a time. The paper's estimator f with a fixed denominator.

    Dividing by the number of replies would tell how many took part, which a Poisson draw must not.

    Args:
        count: expected number of replies, e.g. rate * sites for a Poisson draw.
    """

    count: Annotated[float, Gt(0)]
    additive: ClassVar[bool] = True
    summable: ClassVar[bool] = True
    accepts: ClassVar[tuple[str, ...]] = ("*",)

    @property
    def divisor(self) -> float:
        return self.count

    def combine(self, replies: Iterable[Reply], context: MergeContext) -> Message:
        total: Message | None = None
        for reply in replies:
            parts = reply.message.parts
            if total is None:  # clones: the reply may be a view of a buffer that is reused
                total = Message(reply.message.kind, {p: {n: t.clone() for n, t in parts[p].items()} for p in parts})
            elif total.parts.keys() != parts.keys():
                raise BadReply(f"site {reply.site} sent parts {sorted(parts)}, others {sorted(total.parts)}")
            else:
                for part, tree in parts.items():
                    add_(total.parts[part], tree)
        assert total is not None  # the engine merges when there is at least one reply
        return self.total(total)

    def total(self, sums: Message, weight: float = 0.0) -> Message:
        for tree in sums.parts.values():
            scale_(tree, 1.0 / self.count)
        return sums
