"""One matrix travels, whose columns span a subspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from atoll.core.errors import RecipeError
from atoll.federated.method import SiteInfo
from atoll.federated.share.parameters import Parameters
from atoll.models.subspace import orthonormal


@dataclass(frozen=True)
class SubspaceBasis(Parameters):
    """For models whose only trainable parameter is a matrix ``[d, k]``, d > k. It starts with orthonormal columns."""

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        """Raises :class:`RecipeError` for any other model."""
        trains = [p for p in model.parameters() if p.requires_grad]
        if len(trains) != 1 or trains[0].dim() != 2 or trains[0].shape[0] <= trains[0].shape[1]:
            problem = (
                "a subspace is one matrix of d x k numbers, and the model trains something else; use `model: subspace` "
                "with `task: anomaly_detection`, or a module of your own with such a matrix"
            )
            raise RecipeError([problem])
        with torch.no_grad():
            trains[0].copy_(orthonormal(trains[0]))
        return model
