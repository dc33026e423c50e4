"""Add up lists of (number, scalar) into one dense vector."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt

from atoll.core.errors import BadReply
from atoll.core.message import Message
from atoll.core.tree import Parts, scale_
from atoll.federated.method import Combine, MergeContext, Reply


@dataclass(frozen=True)
class ScatterSum(Combine):
    """G_j = sum_k p_k * (sum of site k's scalars for direction j), as long as the replica's G.

    Also counts, for whoever weighs directions: ``visits`` of each and the sum of scalar ``magnitude``, over
    all sites alike.

    Args:
        by: ``"samples"`` weights a site by its number of training examples, ``"uniform"`` all alike.
        clip: a magnitude counts as this at most.
    """

    by: Literal["samples", "uniform"] = "samples"
    clip: Annotated[float, Gt(0)] = 1000.0
    additive: ClassVar[bool] = True
    summable: ClassVar[bool] = True
    counted: ClassVar[tuple[str, ...]] = ("counts",)
    accepts: ClassVar[tuple[str, ...]] = ("seed_scalars",)

    @property
    def weighted(self) -> bool:
        return self.by == "samples"

    def combine(self, replies: Iterable[Reply], context: MergeContext) -> Message:
        sums, total = self._zeros(context.replica), 0.0
        for reply in replies:
            weight = float(reply.num_samples) if self.by == "samples" else 1.0
            self._add_(sums, reply.message, weight)
            total += weight
        return self.total(sums, total)

    def _zeros(self, replica: Parts) -> Message:
        size = len(replica["scalars"]["G"])
        g, magnitude, visits = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
        return Message("seed_scalars", {"scalars": {"G": g}, "counts": {"magnitude": magnitude, "visits": visits}})

    def _add_(self, sums: Message, message: Message, weight: float) -> None:
        seeds, scalars = message.parts["steps"]["seeds"].long(), message.parts["steps"]["scalars"].double()
        counts = sums.parts["counts"]
        sums.parts["scalars"]["G"].index_add_(0, seeds, scalars, alpha=weight)
        counts["magnitude"].index_add_(0, seeds, scalars.abs().clamp(max=self.clip))
        counts["visits"].index_add_(0, seeds, torch.ones_like(scalars))

    def term(self, message: Message, replica: Parts) -> Message:
        """One reply's scalars as dense vectors."""
        sums = self._zeros(replica)
        self._add_(sums, message, 1.0)
        return sums

    def total(self, sums: Message, weight: float) -> Message:
        if weight <= 0:
            raise BadReply("no site in this merge has an example")
        scale_(sums.parts["scalars"], 1.0 / weight)
        return Message("seed_scalars", {"scalars": {**sums.parts["scalars"], **sums.parts["counts"]}})
