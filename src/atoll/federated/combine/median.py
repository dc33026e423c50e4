"""Coordinate-wise median (Yin et al., 2018, arXiv 1803.01498)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atoll.core.card import Card, Cite
from atoll.core.message import Message
from atoll.federated.combine._rows import rows_of
from atoll.federated.method import Combine, MergeContext, Reply

CARD = Card(
    name="median",
    area="combiner",
    summary="the median of every coordinate",
    cites=(
        Cite(
            authors="Dong Yin, Yudong Chen, Kannan Ramchandran, Peter Bartlett",
            year=2018,
            title="Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
            arxiv="1803.01498",
            venue="ICML",
        ),
    ),
    server_sees="each site's update",
    additive=False,
    threat_model="fewer than half of the sites of a merge are hostile and send anything",
    suits=("hostile sites",),
)


def median(x_ND: Tensor) -> Tensor:
    """[N, D] -> [D]; for even N the mean of the two middle values (torch.median takes the lower)."""
    ordered = x_ND.sort(dim=0).values
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


@dataclass(frozen=True)
class Median(Combine):
    """Every coordinate lies within the range of the honest sites when fewer than half are hostile.

    Ignores the number of samples, and is biased where sites differ (a label that a minority has is outvoted).
    Keeps all replies of a merge in memory.
    """

    additive: ClassVar[bool] = False
    coordinatewise: ClassVar[bool] = True

    def combine(self, replies: Iterable[Reply], context: MergeContext) -> Message:
        rows = rows_of(replies, 1, "Median", "Ask more sites.")
        return rows.message(torch.cat([median(x) for x in rows.chunks()]))
