"""Train one's own model on one's own rows, and write it down in a letter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from atoll.core.errors import DataError
from atoll.core.message import Message
from atoll.core.tree import clone, pick
from atoll.federated.local.local_sgd import train
from atoll.federated.local.training import Training
from atoll.federated.method import LocalWork
from atoll.federated.visit import Cost, Result, Visit


@dataclass(frozen=True)
class LearnExpert(LocalWork):
    """The site's model goes on from where it was at its last visit; nothing that others know reaches it.

    The letter holds its tensors, and how many rows of each class they come from: a generator can only be asked for what
    it has seen.

    Args:
        training: in a visit.
    """

    training: Training = Training()
    produces: ClassVar[str] = "letter"
    tells: ClassVar[bool] = True

    def run(self, visit: Visit) -> Result:
        t, rows = self.training, visit.data.train
        if "cond" in rows.columns:
            raise DataError(f"`{rows.info.name}` has conditions in a column `cond`; this method works with classes.")
        train(visit.task, visit.model, visit.batches(t.batch_size, t.epochs), t, t.lr_at(visit.round))
        y = rows.column("y") if rows.info.num_classes and "y" in rows.columns else torch.zeros(len(rows)).long()
        counts = y.bincount(minlength=visit.task.outputs).tolist()
        passes = float(len(rows) * t.epochs)
        weights = clone(pick(visit.at.tensors, visit.at.split.private))
        return Result(Message("letter", {"weights": weights}, {"counts": counts}), cost=Cost(passes, passes))
