"""AutoFLIP's server: what scouts hardly moved is pruned, once, from the model that all share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor

from atoll.core.message import Message
from atoll.core.tree import Parts, Tree, pick
from atoll.federated.knowledge.guidance import guidance
from atoll.federated.method import Broadcast, MergeContext
from atoll.federated.server.explore import Explore
from atoll.federated.share.pruned import gather, scatter
from atoll.models.masks import keep_highest, pack_bits
from atoll.models.narrow import Units, units_of

Score = Literal["exploration", "magnitude", "random"]


@dataclass(frozen=True)
class Prune(Explore):
    """Make the mask from what was explored; afterwards merge kept entries alone.

    A plan knows how many entries will be kept, or the most when whole units go beyond ``sparsity``, but not where.

    Args:
        sparsity: fraction of all trainable entries that go.
        unit_share: a unit of which a smaller share would be kept goes as a whole.
        unit_quantile: fraction of each layer's units that go as a whole, those with the lowest mean score.
        score: what an entry is judged by: its guidance; its size at that time; or chance. The last two are baselines.
    """

    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.3
    unit_share: Annotated[float, Ge(0), Le(1)] = 0.1
    unit_quantile: Annotated[float, Ge(0), Lt(1)] = 0.0
    score: Score = "exploration"

    def found(self, drift: Tree, replica: Parts, context: MergeContext) -> Parts:
        weights = replica["weights"]
        scores = {n: self._score(n, drift[n], weights[n], context) for n in drift}
        units = units_of(context.task.model(context.seed)) if self.unit_share or self.unit_quantile else []
        mask = make_mask(scores, self.sparsity, units, 0.0 if context.dry else self.unit_share, self.unit_quantile)
        everything = {n: mask.get(n, torch.ones(t.shape, dtype=torch.bool)) for n, t in weights.items()}
        return {"mask": {"bits": pack_bits(everything).to(next(iter(weights.values())).device)}}

    def _score(self, name: str, drift: Tensor, weight: Tensor, context: MergeContext) -> Tensor:
        if self.score == "magnitude":
            return weight.abs()
        if self.score == "exploration" and not context.dry:
            return guidance(drift)
        return torch.rand(drift.shape, generator=context.stream("prune", name))

    def step(self, replica: Parts, state: Parts, combined: Message, context: MergeContext) -> tuple[Broadcast, Parts]:
        mask = replica.get("mask")
        if mask is None:
            return super().step(replica, state, combined, context)
        dense = {"delta": scatter(combined.parts["delta"], mask)}
        broadcast, state = self.then.step(replica, state, Message("delta", dense), context)
        weights = gather(broadcast.common.parts["weights"], mask)
        return Broadcast(Message("weights", {"weights": weights})), state


def make_mask(scores: Tree, sparsity: float, units: Sequence[Units], share: float, quantile: float) -> Tree:
    """Masks (True: kept) for tensors with ``scores``, of which ``floor(sparsity * D)`` entries go.

    First as if there were no units. Then units are chosen, and their entries, here and in the layers that read them,
    count among those that go; when they alone are more, more go. Each layer keeps its best unit.
    """
    mask, out = keep_highest(scores, sparsity), {n: torch.zeros(t.shape, dtype=torch.bool) for n, t in scores.items()}
    for u in units:
        if not u.within(scores):
            continue
        own = [f"{u.layer}.{p}" for p in ("weight", "bias") if f"{u.layer}.{p}" in scores]
        mean, kept = _mean(pick(scores, own)), _mean(pick(mask, own))
        goes = kept < share
        goes[mean.argsort(stable=True)[: int(quantile * len(mean))]] = True
        goes[mean.argmax()] = False
        u.set_(out, goes, True)
    return keep_highest(scores, sparsity, out)


def _mean(tree: Tree) -> Tensor:
    """Of all entries of each row, on the CPU: [units]."""
    rows = [t.cpu().double().reshape(len(t), -1) for t in tree.values()]
    return torch.cat(rows, dim=1).mean(1)
