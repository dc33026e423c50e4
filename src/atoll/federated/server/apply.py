"""Add the combined update to the weights: FedAvg's server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from atoll.core.message import Message
from atoll.core.tree import Parts, add
from atoll.federated.method import Broadcast, MergeContext, ServerStep


@dataclass(frozen=True)
class Apply(ServerStep):
    """weights += lr * delta, and the new weights are the next broadcast.

    Args:
        lr: the server's step size; 1 takes the mean of the sites' models as it is.
    """

    lr: Annotated[float, Gt(0)] = 1.0

    @property
    def adds(self) -> bool:
        return self.lr == 1.0

    def step(self, replica: Parts, state: Parts, combined: Message, context: MergeContext) -> tuple[Broadcast, Parts]:
        delta = combined.parts.get("delta", {})  # a part without tensors does not cross the wire
        weights = add(replica["weights"], delta, alpha=self.lr)
        return Broadcast(Message("weights", {"weights": weights})), state
