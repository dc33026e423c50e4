"""The mean of each block over the sites that sent it (Chen et al., 2023, arXiv 2305.02776)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge

from atoll.core.errors import BadReply
from atoll.core.message import Message
from atoll.core.tree import numel, unflatten
from atoll.federated.method import Combine, MergeContext, Reply
from atoll.federated.share.gated_parameters import sent_blocks


@dataclass(frozen=True)
class BlockMean(Combine):
    """sum_k n_k u_kb / sum_k n_k, over the sites k that sent block b; zero for a block that nobody sent.

    The mean of whole updates, in which a block that was not sent counts as zero, would slow down rare blocks.

    Args:
        blocks: of each tensor; as the sites cut them.
    """

    blocks: Annotated[int, Ge(1)] = 5
    accepts: ClassVar[tuple[str, ...]] = ("blocks",)

    @property
    def weighted(self) -> bool:
        return True

    def combine(self, replies: Iterable[Reply], context: MergeContext) -> Message:
        weights = context.replica["weights"]
        device = next(iter(weights.values())).device if weights else torch.device("cpu")
        sums, total = torch.zeros(numel(weights), dtype=torch.float64, device=device), torch.zeros(0)
        for reply in replies:
            tree = reply.message.parts["blocks"]
            sent, sizes = sent_blocks(tree["sent"], weights, self.blocks)
            where = sent.repeat_interleave(sizes).to(device)
            sums[where] += reply.num_samples * tree["values"][: int(where.sum())].to(sums)
            total = (total if len(total) else torch.zeros(len(sizes), dtype=torch.float64)) + reply.num_samples * sent
        if not bool(total.any()):
            raise BadReply("the sites that replied have no training examples, so their replies weigh nothing")
        divisor = torch.where(total > 0, total, 1.0).repeat_interleave(sizes).to(device)
        mean = unflatten(sums / divisor, weights)
        return Message("delta", {"delta": {n: t.to(weights[n].dtype) for n, t in mean.items()}})
