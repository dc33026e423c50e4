"""Keys of a pool move towards the queries that choose them, beside the task's own loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from atoll.core.errors import RecipeError
from atoll.core.tree import Tree
from atoll.federated.local.local_sgd import Finish
from atoll.federated.visit import Visit
from atoll.models.keyed_pool import KeyedPool


@dataclass(frozen=True)
class PullKeys:
    """(1 - weight) loss + weight (1 - sum of the chosen keys' cosines), the mean over the batch.

    The choice has no gradient, so keys follow the second term alone and everything else the first.

    Args:
        weight: of the second term.
    """

    weight: Annotated[float, Ge(0), Le(1)] = 0.1

    def start(self, visit: Visit, params: Tree) -> tuple[KeyedPool, int]:
        """The pool, and the place of its keys among the parameters."""
        for name, module in visit.model.named_modules():
            if isinstance(module, KeyedPool):
                return module, list(params).index(f"{name}.keys")
        raise RecipeError(["the model has no keyed pool whose keys could be pulled; use the share of `fedins`."])

    def correct_(self, work: tuple[KeyedPool, int], grads: list[Tensor], params: list[Tensor]) -> None:
        pool, at = work
        torch._foreach_mul_(grads, 1 - self.weight)
        (pulled,) = torch.autograd.grad(pool.pull().mean(), pool.keys)
        grads[at].add_(pulled, alpha=self.weight)

    def finish(self, work: tuple[KeyedPool, int], delta: Tree, steps: int, lr: float) -> Finish:
        return Finish(delta)
