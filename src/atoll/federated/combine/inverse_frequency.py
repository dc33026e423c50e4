"""Weights that make up for how often a site reports (Fraboni et al., 2022, arXiv 2206.10189)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from atoll.core.errors import BadReply
from atoll.core.message import Message
from atoll.core.tree import Tree, add_
from atoll.federated.method import Combine, MergeContext, Reply


@dataclass(frozen=True)
class InverseFrequency(Combine):
    """sum_i d_i u_i with d_i = p_i / (site i's reports per merge), p_i its part of all training examples.

    A site that starts again as soon as it can reports once in as many merges as its visit takes. So each reply counts
    for the merges that went by while it was made: over time, E[omega_i] = p_i for every site, whatever its speed, also
    when visits of one site take different times. The sum is not divided: sites that have not reported are not made up
    for by those that have.
    Departs from the paper in one way: the length of a visit is the one that was observed, not one that is known before.

    Args:
        dt: virtual seconds between merges. Of merges after every k arrivals: k / sum_j (1 / tau_j) on average, tau_j
            the length of site j's visits.
        ticks: sites start at merges alone, so a visit takes a whole number of them: ceil(tau / dt) instead of tau / dt.
    """

    dt: Annotated[float, Gt(0)] = 1.0
    ticks: bool = True
    additive: ClassVar[bool] = True
    accepts: ClassVar[tuple[str, ...]] = ("*",)
    restless: ClassVar[bool] = True

    @property
    def weighted(self) -> bool:
        return True

    @property
    def interval(self) -> float | None:
        return self.dt if self.ticks else None

    def merges(self, seconds: float) -> float:
        """How many merges a visit takes. What arrives with a merge belongs to it, as the schedule has it."""
        return max(1, math.ceil((seconds - 1e-9) / self.dt)) if self.ticks else seconds / self.dt

    def combine(self, replies: Iterable[Reply], context: MergeContext) -> Message:
        if not context.num_samples:
            raise BadReply("the sites have no training examples, so their replies weigh nothing")
        kind, sums = "", dict[str, Tree]()
        for reply in replies:
            weight = reply.num_samples / context.num_samples * self.merges(reply.seconds)
            parts = reply.message.parts
            if not sums:  # multiplying makes tensors of our own: the reply may be a view of a buffer that is reused
                kind, sums = (
                    reply.message.kind,
                    {p: {n: t * weight for n, t in tree.items()} for p, tree in parts.items()},
                )
            elif sums.keys() != parts.keys():
                raise BadReply(f"site {reply.site} sent parts {sorted(parts)}, others {sorted(sums)}")
            else:
                for part, tree in parts.items():
                    add_(sums[part], tree, alpha=weight)
        return Message(kind, sums)
