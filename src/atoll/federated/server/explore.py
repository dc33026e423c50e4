"""A server that lets a few sites train alone once, and uses what they found from then on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le

from atoll.core.message import Message
from atoll.core.tree import Parts, Tree
from atoll.federated.method import Broadcast, MergeContext, ServerStep
from atoll.federated.server.apply import Apply
from atoll.federated.share.explored import EXPLORE, TRAIN, WARM_UP, phase, phase_of


@dataclass(frozen=True)
class Explore(ServerStep):
    """Plain merges; one round in which scouts explore; then merges by ``then`` again, with the findings at the sites.

    Subclasses say what is found in :meth:`found`.

    Args:
        scouts: fraction of all sites that explore; at least one does.
        warm_up: plain merges before, which make the base model.
        then: what is done with merged updates.
    """

    scouts: Annotated[float, Gt(0), Le(1)] = 0.1
    warm_up: Annotated[int, Ge(1)] = 1
    then: ServerStep = field(default_factory=Apply)
    accepts: ClassVar[tuple[str, ...]] = ("delta", "drift")

    def found(self, drift: Tree, replica: Parts, context: MergeContext) -> Parts:
        """What sites are told. ``drift``: mean squared drift of each parameter, without the model's buffers."""
        raise TypeError(f"{type(self).__name__} does not say what it finds")

    def init(self, replica: Parts) -> Parts:
        return self.then.init(replica)

    def step(self, replica: Parts, state: Parts, combined: Message, context: MergeContext) -> tuple[Broadcast, Parts]:
        now = phase_of(replica)
        if now == EXPLORE:
            drift = {n: t for n, t in combined.parts.get("drift", {}).items() if n not in context.buffers}
            return Broadcast(Message("found", {**self.found(drift, replica, context), **phase(TRAIN)})), state
        broadcast, state = self.then.step(replica, state, combined, context)
        if now == WARM_UP and context.round + 1 >= self.warm_up:
            parts = {**broadcast.common.parts, **phase(EXPLORE)}
            return Broadcast(Message(broadcast.common.kind, parts), asks=self._scouts(context)), state
        return broadcast, state

    def _scouts(self, context: MergeContext) -> tuple[int, ...]:
        count = max(1, round(self.scouts * context.num_sites))
        drawn = torch.randperm(context.num_sites, generator=context.stream("scouts"))[:count]
        return tuple(sorted(drawn.tolist()))
