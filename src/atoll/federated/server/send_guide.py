"""FedLEx's server: scouts' drift becomes a factor for every later gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atoll.core.tree import Parts, Tree
from atoll.federated.knowledge.guidance import Scale, guidance
from atoll.federated.method import MergeContext
from atoll.federated.server.explore import Explore


@dataclass(frozen=True)
class SendGuide(Explore):
    """The part ``guide``, in 16 bits: 0 and 1 are exact.

    Args:
        scale: how drift is rescaled; see :func:`~atoll.federated.knowledge.guidance.guidance`.
    """

    scale: Scale = "min_max"

    def found(self, drift: Tree, replica: Parts, context: MergeContext) -> Parts:
        return {"guide": {n: guidance(v, self.scale).to(torch.float16) for n, v in drift.items()}}
