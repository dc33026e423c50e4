"""Local SGD on the kept entries of a network."""

from __future__ import annotations

from dataclasses import dataclass, replace

from atoll.core.message import Message
from atoll.federated.local.scaled_sgd import ScaledSGD
from atoll.federated.share.pruned import gather
from atoll.federated.visit import Result, Visit


@dataclass(frozen=True)
class PrunedSGD(ScaledSGD):
    """What is pruned has no gradient, so it stays exactly zero; the reply holds the kept entries alone.

    The arithmetic is dense: pruning saves traffic here, and work only where units are taken out of the exported model.
    """

    scale: str = "mask"

    def run(self, visit: Visit) -> Result:
        result = super().run(visit)
        delta = gather(result.message.parts["delta"], visit.replica["mask"])
        return replace(result, message=Message("delta", {"delta": delta}))
