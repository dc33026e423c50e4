"""Local SGD whose steps are multiplied, parameter by parameter, by something that the site has received."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.core.tree import Tree
from atoll.federated.local.local_sgd import Correction, Finish, LocalSGD
from atoll.federated.visit import Visit


@dataclass(frozen=True)
class ScaledSGD(LocalSGD):
    """The part ``scale`` of the replica times each gradient, before clipping.

    Adam divides a gradient by its own size, which would undo a scale that never changes; so with Adam the step is
    multiplied instead. Where the scale is 0, a parameter keeps its bits (but for the weight decay of SGD).

    Args:
        scale: the part; like the trainable parameters, of any floating-point type or bool.
    """

    scale: str = "guide"

    def _step(self, visit: Visit, params: list[Tensor], lr: float, work: Any) -> Callable[[Any], None]:
        named = visit.replica[self.scale]
        scale = [named[n].to(p.dtype) for n, p in visit.trainable().items()]
        if self.training.optimizer == "sgd":
            return LocalSGD(self.training, self.gradient, _Times(scale, self.correction))._step(visit, params, lr, work)
        step, values = super()._step(visit, params, lr, work), [p.detach() for p in params]

        def scaled(batch: Any) -> None:
            before = [v.clone() for v in values]
            step(batch)
            torch._foreach_copy_(values, torch._foreach_lerp(before, values, scale))

        return scaled


@dataclass(frozen=True)
class _Times:
    """A correction, or none, and then a factor for each gradient."""

    scale: list[Tensor]
    first: Correction | None

    def start(self, visit: Visit, params: Tree) -> Any:
        return self.first.start(visit, params) if self.first else None

    def correct_(self, work: Any, grads: list[Tensor], params: list[Tensor]) -> None:
        if self.first:
            self.first.correct_(work, grads, params)
        torch._foreach_mul_(grads, self.scale)

    def finish(self, work: Any, delta: Tree, steps: int, lr: float) -> Finish:
        return self.first.finish(work, delta, steps, lr) if self.first else Finish(delta)
