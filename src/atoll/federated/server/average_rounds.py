"""FedAvg's server, which also keeps a running average of the rounds and gives that in the end.

Averages of the iterates forget the noise of the last ones (Polyak and Juditsky, 1992; Izmailov et al., 2018, arXiv
1803.05407); generators that play against a critic circle about what they look for, and need it most (Yazici et al.,
2018, arXiv 1806.04498). Sites go on from the present weights, and send and receive no byte more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Lt

from atoll.core.message import Message
from atoll.core.tree import Parts, add, add_, clone, scale_
from atoll.federated.method import Broadcast, MergeContext, ServerStep


@dataclass(frozen=True)
class AverageRounds(ServerStep):
    """weights += lr * delta; average += (1 - d) * (weights - average), and the run ends with the average.

    Args:
        decay: d, of a round. In round t it is t / (t + 3) if that is less. The average begins with the first merge: the
            weights that the run began with have no share.
        lr: the server's step size; 1 takes the mean of the sites' models as it is.
    """

    decay: Annotated[float, Gt(0), Lt(1)] = 0.9
    lr: Annotated[float, Gt(0)] = 1.0

    def step(self, replica: Parts, state: Parts, combined: Message, context: MergeContext) -> tuple[Broadcast, Parts]:
        weights = add(replica["weights"], combined.parts.get("delta", {}), alpha=self.lr)
        decay = min(self.decay, context.round / (context.round + 3))
        average = clone(state["average"] if state else weights)
        scale_(average, decay)
        add_(average, weights, alpha=1 - decay)
        return Broadcast(Message("weights", {"weights": weights})), {"average": average}

    def result(self, replica: Parts, state: Parts) -> Parts:
        return {**replica, "weights": state["average"]} if state else replica
