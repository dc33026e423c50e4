"""Loss exploration: a site trains alone until its loss stalls, and tells how far each parameter went.

Interno, Olhofer, Jin, Hammer, "Federated Loss Exploration for Improved Convergence on Non-IID Data", IJCNN 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from atoll.core.message import Message
from atoll.core.tree import sub
from atoll.federated.local.local_sgd import LocalSGD, gradients
from atoll.federated.local.optimizer import clip_, make_optimizer
from atoll.federated.local.scaled_sgd import ScaledSGD
from atoll.federated.local.training import Training
from atoll.federated.method import LocalWork
from atoll.federated.share.explored import EXPLORE, WARM_UP, phase_of
from atoll.federated.visit import Cost, Result, Visit


@dataclass(frozen=True, kw_only=True)
class Scouting:
    """How long a scout trains alone.

    Args:
        epochs: at most.
        patience: epochs without a lower training loss than ever before, after which it stops.
    """

    epochs: Annotated[int, Ge(1)] = 150
    patience: Annotated[int, Ge(1)] = 40


@dataclass(frozen=True)
class LossExploration(LocalWork):
    """Plain rounds at first; then the exploring one, whose reply is ``drift``; from then on ``then``.

    A plan counts ``scouting.epochs`` for each scout, which may be more than it takes.

    Args:
        training: of the plain rounds; also the steps of a scout, but for its epochs.
        scouting: how long a scout trains alone.
        then: what sites do with what was found.
    """

    training: Training = Training()
    scouting: Scouting = Scouting()
    then: LocalWork = field(default_factory=ScaledSGD)
    produces: ClassVar[str] = "delta"
    synchronous_only: ClassVar[bool] = True

    def run(self, visit: Visit) -> Result:
        now = phase_of(visit.replica)
        if now == WARM_UP:
            return LocalSGD(self.training).run(visit)
        return explore(visit, self.training, self.scouting) if now == EXPLORE else self.then.run(visit)


def explore(visit: Visit, training: Training, scouting: Scouting) -> Result:
    """Train alone; reply with (w_s - w_0)^2. A sum of these tells the server no more than a mean drift."""
    t, n = replace(training, epochs=scouting.epochs), len(visit.data.train)
    params: list[Tensor] = list(visit.trainable().values())
    optimizer = make_optimizer(t, params, t.lr_at(visit.round))
    a_pass = math.ceil(n / t.batch_size)
    best, stalled, epochs, total = math.inf, 0, 0, 0.0
    for i, batch in enumerate(visit.batches(t.batch_size, t.epochs), 1):
        loss = visit.task.mean_loss(visit.model, batch)
        grads = gradients(loss, params)
        if t.clip_norm:
            clip_(grads, t.clip_norm)
        optimizer.step(grads)
        total += float(loss.detach()) * len(next(iter(batch.values())))
        if i % a_pass == 0:
            best, stalled = (total, 0) if total < best else (best, stalled + 1)
            epochs, total = epochs + 1, 0.0
            if stalled >= scouting.patience:
                break
    drift = sub(visit.shared(), visit.replica["weights"])
    torch._foreach_mul_(list(drift.values()), list(drift.values()))
    passes = float(n * (t.epochs if visit.dry else epochs))
    return Result(Message("drift", {"drift": drift}), cost=Cost(passes, passes), metrics={"epochs": float(epochs)})
