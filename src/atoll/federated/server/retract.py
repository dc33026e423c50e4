"""Add the combined update, then go back to matrices with orthonormal columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

from atoll.core.message import Message
from atoll.core.tree import Parts
from atoll.federated.method import Broadcast, MergeContext
from atoll.federated.server.apply import Apply
from atoll.models.subspace import orthonormal


@dataclass(frozen=True)
class Retract(Apply):
    """A mean of orthonormal matrices is not one; the Q of its QR decomposition, with diag(R) > 0, is."""

    @property
    def adds(self) -> bool:
        return False

    def step(self, replica: Parts, state: Parts, combined: Message, context: MergeContext) -> tuple[Broadcast, Parts]:
        broadcast, state = super().step(replica, state, combined, context)
        weights = {n: orthonormal(w) for n, w in broadcast.common.parts["weights"].items()}
        return replace(broadcast, common=Message("weights", {"weights": weights})), state
