"""A pool of entries with keys: an input finds its entries by the cosine of its query.

Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022, arXiv 2112.08654. What an entry *is* (scales and
shifts, a head, a prompt) is the owner's business: the pool answers with weights over its entries.

Shapes: B queries, M entries, D numbers a query.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyedPool(nn.Module):
    """Keys ``[M, D]``, trained by a pull towards the queries that chose them.

    Args:
        size: entries.
        dim: numbers per query.
        usage_penalty: while training, what an entry that every query has chosen so far loses of its cosine, so that the
            others are tried too; an entry that half of the queries chose loses half of it. 0: off.
    """

    uses: Tensor

    def __init__(self, size: int, dim: int, usage_penalty: float = 0.0) -> None:
        super().__init__()
        self.usage_penalty = usage_penalty
        self.keys = nn.Parameter(torch.randn(size, dim))
        self.register_buffer("uses", torch.zeros(size, dtype=torch.int64))
        """How often each entry was chosen in this visit: an integer, so it is neither sent nor averaged."""
        self.asked = torch.zeros(0, dim), torch.zeros(0, 1, dtype=torch.int64)
        """Queries of the last training pass, and what they chose."""

    def forward(self, query_BD: Tensor, k: int, allowed_M: Tensor | None = None) -> Tensor:
        """The best ``k`` entries for each query by itself: weights ``[B, M]``, 1/k at each of them, 0 elsewhere.

        ``allowed_M``: which entries there are to choose from, if not all. Nothing has a gradient: :meth:`pull` is what
        trains keys.
        """
        query_BD = query_BD.detach()
        score_BM = cosines(query_BD, self.keys.detach())
        if self.training and self.usage_penalty:
            score_BM = score_BM - self.usage_penalty * self.uses * k / self.uses.sum().clamp(min=1)
        if allowed_M is not None:
            score_BM = score_BM.masked_fill(~allowed_M, -torch.inf)
        chosen_Bk = score_BM.topk(k, dim=1).indices
        if self.training:
            self.uses += torch.bincount(chosen_Bk.flatten(), minlength=len(self.uses))
            self.asked = query_BD, chosen_Bk
        return torch.zeros_like(score_BM).scatter_(1, chosen_Bk, 1.0 / k)

    def pull(self) -> Tensor:
        """1 - the sum of the chosen keys' cosines, one value for each query of the last training pass ``[B]``: what
        brings keys to the queries that choose them."""
        query_BD, chosen_Bk = self.asked
        return 1 - cosines(query_BD, self.keys).gather(1, chosen_Bk).sum(1)


def cosines(query_BD: Tensor, keys_MD: Tensor) -> Tensor:
    """Cosine of every query with every key, ``[B, M]``."""
    return F.normalize(query_BD, dim=1) @ F.normalize(keys_MD, dim=1).T
