"""Norm bounding: no update is longer than a bound (Sun et al., 2019, arXiv 1911.07963)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor

from atoll.core.card import Card, Cite
from atoll.core.message import Message
from atoll.federated.combine._rows import rows_of
from atoll.federated.method import Combine, MergeContext, Reply

CARD = Card(
    name="norm_clip",
    area="combiner",
    summary="scale long updates down to a bound or to the median length, then take the mean",
    cites=(
        Cite(
            authors="Ziteng Sun, Peter Kairouz, Ananda Theertha Suresh, H. Brendan McMahan",
            year=2019,
            title="Can You Really Backdoor Federated Learning?",
            arxiv="1911.07963",
        ),
    ),
    server_sees="each site's update",
    additive=False,
    threat_model="hostile sites scale their updates up; it does not stop one that stays within the bound",
    suits=("hostile sites",),
)


def clip_factors(norms_N: Tensor, bound: float) -> Tensor:
    """min(1, bound / norm) for each row; 1 for a row of zeros."""
    return torch.where(norms_N > bound, bound / norms_N, torch.ones_like(norms_N))


@dataclass(frozen=True)
class NormClip(Combine):
    """Unweighted mean of x_i * min(1, bound / ||x_i||): no site moves it by more than bound / N.

    The paper fixes the bound; the median of this merge's norms adapts it and is not in the paper. Keeps all
    replies of a merge in memory.

    Args:
        bound: L2 norm over all tensors of a reply; None takes the median norm of the merge.
    """

    bound: Annotated[float, Gt(0)] | None = None
    additive: ClassVar[bool] = False

    def combine(self, replies: Iterable[Reply], context: MergeContext) -> Message:
        rows = rows_of(replies, 1, "NormClip", "Ask more sites.")
        norms = rows.norms()
        bound = self.bound if self.bound is not None else float(norms.quantile(0.5))
        return rows.message(rows.mean((clip_factors(norms, bound) / len(rows)).tolist()))
