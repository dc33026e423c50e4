"""Coordinate-wise trimmed mean (Yin et al., 2018, arXiv 1803.01498)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from atoll.core.card import Card, Cite
from atoll.core.message import Message
from atoll.federated.combine._rows import rows_of
from atoll.federated.method import Combine, MergeContext, Reply

CARD = Card(
    name="trimmed_mean",
    area="combiner",
    summary="the mean of every coordinate without its largest and smallest values",
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
    threat_model="at most a fraction `trim` of the sites of a merge is hostile and sends anything",
    suits=("hostile sites",),
)


def trimmed_mean(x_ND: Tensor, b: int) -> Tensor:
    """[N, D] -> [D]: the mean of each column without its b largest and b smallest values; needs N > 2 b."""
    ordered = x_ND.sort(dim=0).values
    return ordered[b : len(ordered) - b].mean(dim=0)


@dataclass(frozen=True)
class TrimmedMean(Combine):
    """Drop floor(trim * N) values at each end of every coordinate; trim = 0 is the unweighted mean.

    Ignores the number of samples. Keeps all replies of a merge in memory.

    Args:
        trim: fraction of values dropped at each end, in [0, 0.5); at least the fraction of hostile sites.
    """

    trim: Annotated[float, Ge(0), Lt(0.5)] = 0.2
    additive: ClassVar[bool] = False
    coordinatewise: ClassVar[bool] = True

    @property
    def least(self) -> int:
        return math.ceil(1 / self.trim - 1e-9) if self.trim else 1  # with fewer, nothing would be trimmed

    def combine(self, replies: Iterable[Reply], context: MergeContext) -> Message:
        mend = "With fewer, no value would be dropped: ask more sites, or use Median."
        rows = rows_of(replies, self.least, f"TrimmedMean(trim={self.trim:g})", mend)
        b = math.floor(self.trim * len(rows) + 1e-9)  # 0.29 * 100 is a little less than 29 in floating point
        return rows.message(torch.cat([trimmed_mean(x, b) for x in rows.chunks()]))
