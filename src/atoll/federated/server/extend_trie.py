"""Keep the frequent prefixes and ask for longer ones; in the end, the list."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from atoll.core.message import Message
from atoll.core.tree import Parts
from atoll.federated.method import Broadcast, MergeContext, ServerStep
from atoll.federated.share.prefix_trie import Plan, best, empty, frequent


@dataclass(frozen=True)
class ExtendTrie(ServerStep):
    """One level a merge while the trie is shared; the list from the last level, or from the sites' lists.

    Args:
        plan: the same as the share's.
    """

    plan: Plan = Plan()
    accepts: ClassVar[tuple[str, ...]] = ("estimates",)
    broadcasts: ClassVar[str] = "trie"

    def open(self, replica: Parts) -> Broadcast:
        return Broadcast(Message("trie", {"trie": self.plan.root(), "top": empty(self.plan.k)}))

    def step(self, replica: Parts, state: Parts, combined: Message, context: MergeContext) -> tuple[Broadcast, Parts]:
        plan, trie, top = self.plan, replica["trie"], replica["top"]
        if "estimates" in combined.parts:
            found, candidates = combined.parts["estimates"], plan.children(trie)
            level = int(trie["level"]) + 1
            kept = frequent(found["counts"], math.sqrt(float(found["variance"])), plan.k)
            if context.dry:  # the most that may be kept
                kept = torch.arange(min(3 * plan.k, len(candidates)))
            trie = {"prefixes": candidates[kept], "level": torch.tensor(level)}
            if level == plan.levels:
                top = best(candidates, found["counts"], plan.k)
        elif "lists" in combined.parts:
            top = best(combined.parts["lists"]["items"], combined.parts["lists"]["counts"], plan.k)
        return Broadcast(Message("trie", {"trie": trie, "top": top})), state
