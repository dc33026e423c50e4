"""What the federated spectral graph transformer shares: any network as encoder of nodes, and what follows it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from atoll.core.errors import AtollError
from atoll.federated.method import SiteInfo
from atoll.federated.share.parameters import Parameters
from atoll.models.checkpoint import Checkpoint
from atoll.models.model import ModelBuilder
from atoll.models.spectral_transformer import Spectral, SpectralNet, SpectralTransformer


@dataclass(frozen=True)
class SpectralParameters(Parameters):
    """All parameters travel, and nothing of a graph: neither its spectrum nor its size can be read from a message.

    Args:
        spectral: the transformer over eigenvalues. A model that is a ``spectral_transformer`` keeps its own.
    """

    spectral: Spectral = Spectral()

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        if isinstance(model, SpectralNet):
            return model
        weights = [p for p in model.parameters() if p.dim() > 1]
        if not weights:
            raise AtollError(
                "fed_gnodeformer puts spectral layers behind a network that ends with a linear layer, and this model "
                "has none. Use `model: {name: spectral_transformer, network: ...}`, or another model."
            )
        return SpectralNet(model, len(weights[-1]), self.spectral)

    def exported(self, network: ModelBuilder, model: nn.Module) -> ModelBuilder:
        network = network.network if isinstance(network, Checkpoint) else network
        return network if isinstance(network, SpectralTransformer) else SpectralTransformer(network, self.spectral)
