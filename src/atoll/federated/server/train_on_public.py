"""Go on training at the server: what its own labelled rows are worth, with or without the sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from atoll.core.errors import AtollError
from atoll.core.message import Message
from atoll.core.tree import Parts, add, clone, copy_, named_tensors, pick
from atoll.federated.local.training import Training
from atoll.federated.method import Broadcast, MergeContext, ServerStep
from atoll.federated.public import train_on_public


@dataclass(frozen=True)
class TrainOnPublic(ServerStep):
    """weights += lr * delta, then some epochs on the server's own rows.

    A baseline for methods that need public data: with ``lr: 0`` the sites' updates are dropped, and what is left is a
    model that the server could have had alone.

    Args:
        training: on the public rows, in each merge.
        lr: the server's step size along the sites' update.
    """

    training: Training = Training()
    lr: Annotated[float, Ge(0)] = 1.0
    needs_public_data: ClassVar[bool] = True

    def step(self, replica: Parts, state: Parts, combined: Message, context: MergeContext) -> tuple[Broadcast, Parts]:
        weights = add(replica["weights"], combined.parts.get("delta", {}), alpha=self.lr)
        model = context.task.model(context.seed)
        tensors = named_tensors(model)
        if odd := sorted(weights.keys() - tensors.keys()):
            raise AtollError(f"TrainOnPublic trains a plain network, and this method adds `{odd[0]}` to it; use Apply.")
        device = next(iter(weights.values())).device
        copy_(tensors, weights)
        train_on_public(model, self.training, context, "train on public")
        trained = {n: t.to(device) for n, t in clone(pick(tensors, weights)).items()}
        return Broadcast(Message("weights", {"weights": trained})), state
