"""Adaptive gradient clipping: no row moves by more than a share of its own length.

Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021,
arXiv 2102.06171.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from atoll.core.tree import Tree
from atoll.federated.local.local_sgd import Finish
from atoll.federated.visit import Visit


@dataclass(frozen=True)
class AdaptiveClip:
    """grad_o *= min(1, ratio max(||W_o||, 1e-3) / ||grad_o||), o a row of a weight; vectors count as one row.

    The classifier, the last layer with a weight, is left alone.

    Args:
        ratio: the largest length of a row's gradient over that of the row; the papers use 0.01 to 1.28.
    """

    ratio: Annotated[float, Gt(0)] = 0.32

    def start(self, visit: Visit, params: Tree) -> list[int]:
        """Which of the parameters are clipped."""
        last = classifier(visit.model)
        return [i for i, name in enumerate(params) if name.rpartition(".")[0] != last]

    def correct_(self, work: list[int], grads: list[Tensor], params: list[Tensor]) -> None:
        with torch.no_grad():
            for i in work:
                most = self.ratio * row_norms(params[i]).clamp(min=1e-3)
                grads[i].mul_((most / row_norms(grads[i]).clamp(min=1e-12)).clamp(max=1.0))

    def finish(self, work: list[int], delta: Tree, steps: int, lr: float) -> Finish:
        return Finish(delta)


def row_norms(t: Tensor) -> Tensor:
    """L2 norm of each ``t[o]``, ``[O, 1, ...]``; of all of ``t`` when it is a vector."""
    norms: Tensor = torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())) or None, keepdim=True)
    return norms


def classifier(model: nn.Module) -> str:
    """Name of the last layer, in the model's order, that holds a parameter of two or more dimensions."""
    names = [n.rpartition(".")[0] for n, p in model.named_parameters() if p.dim() > 1]
    return names[-1] if names else ""
