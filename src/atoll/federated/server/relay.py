"""A post office: letters go to the writers' neighbours, and nothing is merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from atoll.core.message import Message
from atoll.core.tree import Parts
from atoll.federated.method import Broadcast, MergeContext, ServerStep


@dataclass(frozen=True)
class Relay(ServerStep):
    """Each site gets the letters of the round that its neighbours wrote; there is no broadcast.

    Args:
        neighbours: (site, round, sites in all, seed) -> the sites whose letters it reads.
    """

    neighbours: Callable[[int, int, int, int], list[int]]
    accepts: ClassVar[tuple[str, ...]] = ("letters",)
    broadcasts: ClassVar[str] = "letters"

    def open(self, replica: Parts) -> Broadcast:
        return Broadcast(Message("none"))

    def step(self, replica: Parts, state: Parts, combined: Message, context: MergeContext) -> tuple[Broadcast, Parts]:
        letters, about = combined.parts, combined.facts["from"]
        per_site = {}
        for site in range(context.num_sites):
            near = self.neighbours(site, context.round, context.num_sites, context.seed)
            came = [str(i) for i in near if str(i) in letters]
            if came:
                per_site[site] = Message(
                    "letters", {i: letters[i] for i in came}, {"from": {i: about[i] for i in came}}
                )
        return Broadcast(Message("none"), per_site), state
