"""Steps of a distillation on one's own rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from atoll.core.errors import AtollError
from atoll.core.message import Message
from atoll.core.tree import clone, sub
from atoll.diffusion.distillation import Distillation
from atoll.diffusion.distiller import Conditions, Images, Work
from atoll.diffusion.trainer import Trainer
from atoll.federated.method import LocalWork
from atoll.federated.visit import Cost, Result, Visit


@dataclass(frozen=True, kw_only=True)
class DistilSteps(LocalWork):
    """Each network takes its turns as in a training in one place. Samples are asked for as often of each class as the
    site has rows of it: of a class that it has never seen, a discriminator here would learn that it is false.

    Args:
        steps: of a visit; each is one round of the method's turns.
        batch: rows and samples per loss.
        rounds: what the method schedules over a training is spread over so many; None: over those of the run.
        cooldown: share of them, at the end, over which all step sizes fall to nothing.
        precision: ``bf16`` computes the networks in bfloat16.
        moments: what Adam has learned of the gradients' sizes is ``kept`` at the site from visit to visit, or starts
            ``fresh``; twenty steps say little about them.
    """

    steps: Annotated[int, Ge(1)] = 20
    batch: Annotated[int, Ge(1)] = 128
    rounds: Annotated[int, Ge(1)] | None = None
    cooldown: Annotated[float, Ge(0), Le(1)] = 0.3
    precision: Literal["float32", "bf16"] = "float32"
    moments: Literal["kept", "fresh"] = "kept"
    produces: ClassVar[str] = "delta"
    alternates: ClassVar[bool] = True

    def over(self, rounds: int) -> LocalWork:
        return self if self.rounds else replace(self, rounds=rounds)

    def run(self, visit: Visit) -> Result:
        made: Distillation = visit.model  # type: ignore[assignment]
        rows, state = visit.data.train, dict(visit.state)
        if len(rows) and not visit.dry:
            y = rows.column("y") if rows.info.num_classes and "y" in rows.columns else torch.zeros(1).long()
            work = Work(
                rows.info.shape, Conditions(y), Images(rows, made.teacher.sigma_data),
                visit.stream("distil").initial_seed(), self.batch, visit.device,
            )  # fmt: skip
            if self.rounds is None:
                raise AtollError("Nobody said how long this run is; give `rounds` to distil_at_sites.")
            whole = self.steps * self.rounds
            trainer = Trainer(
                made.method, made.teacher, work, whole, precision=self.precision, cooldown=self.cooldown,
                roles=made.roles, step=min(visit.round * self.steps, whole - self.steps),
            )  # fmt: skip
            trainer.restore_moments(state)
            for _ in range(self.steps):
                trainer.once()
            if self.moments == "kept":
                state = {name: clone(tree) for name, tree in trainer.moments().items()}
        delta: dict[str, Tensor] = sub(visit.shared(), visit.replica.get("weights", {}))
        passes = float(self.steps * self.batch) if len(rows) else 0.0
        return Result(Message("delta", {"delta": delta}), state, Cost(passes, passes))
