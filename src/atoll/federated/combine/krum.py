"""Krum and Multi-Krum: keep the updates closest to the others (Blanchard et al., 2017, arXiv 1703.02757).

Assumes  N >= 2 f + 3 updates of equal length, at most f of them hostile.
Sees     every single update, so it cannot run above secure summation.
Departs  equal scores go to the lower site number; the paper leaves ties open.
Shapes   N updates, D numbers each (all tensors of all parts of a reply, as one vector).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from atoll.core.card import Card, Cite
from atoll.core.message import Message
from atoll.federated.combine._rows import Rows, rows_of
from atoll.federated.method import Combine, MergeContext, Reply

CARD = Card(
    name="krum",
    area="combiner",
    summary="the update (or the mean of a few) with the closest neighbours",
    cites=(
        Cite(
            authors="Peva Blanchard, El Mahdi El Mhamdi, Rachid Guerraoui, Julien Stainer",
            year=2017,
            title="Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
            arxiv="1703.02757",
            venue="NeurIPS",
        ),
    ),
    server_sees="each site's update",
    additive=False,
    threat_model="at most f sites of a merge are hostile and send anything; honest sites are alike",
    suits=("hostile sites",),
)


def squared_distances(rows: Rows) -> Tensor:
    """Squared L2 distances between all rows, over all coordinates: float64 ``[N, N]``."""
    d_NN = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for x in rows.chunks(torch.float64):
        # Without matrix products: |a|^2 + |b|^2 - 2 a.b loses the small distances beside a huge hostile row.
        d_NN += torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    return d_NN


def krum_scores(d_NN: Tensor, f: int) -> Tensor:
    """Sum of squared distances from each row to its N - f - 2 nearest other rows."""
    d_NN = d_NN.clone().fill_diagonal_(float("inf"))  # a row is not its own neighbour
    return d_NN.sort(dim=1).values[:, : len(d_NN) - f - 2].sum(dim=1)


@dataclass(frozen=True)
class Krum(Combine):
    """Unweighted mean of the ``keep`` updates with the lowest score.

    Honest sites whose data differs from the rest are dropped too: look at each site's accuracy. Distances are
        led by the largest layers. Keeps all replies of a merge in memory.

    Args:
        f: how many hostile sites to withstand.
        keep: 1 is Krum, more is Multi-Krum (up to N - f in the paper).
    """

    f: Annotated[int, Ge(0)] = 1
    keep: Annotated[int, Ge(1)] = 1
    additive: ClassVar[bool] = False

    @property
    def least(self) -> int:
        return max(2 * self.f + 3, self.keep)

    def combine(self, replies: Iterable[Reply], context: MergeContext) -> Message:
        who = f"Krum(f={self.f}, keep={self.keep})"
        rows = rows_of(replies, self.least, who, "Ask more sites, or lower `f` or `keep`.")
        best = krum_scores(squared_distances(rows), self.f).sort(stable=True).indices[: self.keep].tolist()
        return rows.message(rows.mean([1 / self.keep if i in best else 0.0 for i in range(len(rows))]))
