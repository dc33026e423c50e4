"""What FedWon shares: a network without norms, whose convolutions standardise their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt
from torch import nn

from atoll.core.tree import Parts
from atoll.federated.method import SiteInfo
from atoll.federated.share.parameters import Parameters
from atoll.models.model import ModelBuilder
from atoll.models.norm_free import RELU_GAIN, NormFree, bake_convolutions, standardise_convolutions, strip_norms


@dataclass(frozen=True)
class NormFreeParameters(Parameters):
    """Raw weights, gains and biases travel and are averaged; what the network uses is standardised from them.

    The exported model has the standardised weights in ordinary convolutions.

    Args:
        gamma: length of a standardised row at gain 1.
    """

    gamma: Annotated[float, Gt(0)] = RELU_GAIN

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        strip_norms(model)
        standardise_convolutions(model, self.gamma)
        return model

    def export(self, model: nn.Module, replica: Parts) -> nn.Module:
        model = super().export(model, replica)
        if bake_convolutions(model) and hasattr(model, "save_pretrained"):
            model.save_pretrained = None  # type: ignore[assignment]  # its class would load with fresh norms
        return model

    def exported(self, network: ModelBuilder, model: nn.Module) -> ModelBuilder:
        return NormFree(network.architecture)
