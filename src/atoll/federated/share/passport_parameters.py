"""What FedAdOb shares: all weights, and neither passports nor statistics of what they made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from torch import nn

from atoll.data.dataset import Info
from atoll.federated.method import SiteInfo, Split
from atoll.federated.share.parameters import Parameters, floating_names
from atoll.models.checkpoint import Checkpoint
from atoll.models.model import ModelBuilder
from atoll.models.passported import (
    SECRET,
    STATISTICS,
    Passported,
    example_of,
    insert_passports,
    passports,
    without_passports,
)


@dataclass(frozen=True)
class PassportParameters(Parameters):
    """W, E and D travel and are averaged. Passports and the statistics of the norms after W stay at the site.

    A saved model of a site has its scales and shifts, in batch norms, and not its passports.

    Args:
        layers: how many of the first linear and convolutional layers have passports.
        count: passports of each kind in a layer.
    """

    layers: Annotated[int, Ge(1)] = 1
    count: Annotated[int, Ge(1)] = 64

    def prepare_for(self, model: nn.Module, site: SiteInfo | None, rows: Info) -> nn.Module:
        insert_passports(model, example_of(rows), self.layers, self.count)
        return model

    def split(self, model: nn.Module) -> Split:
        private = tuple(f"{name}.{kind}" for name, _ in passports(model) for kind in (*SECRET, *STATISTICS))
        return Split(shared=tuple(n for n in floating_names(model) if n not in private), private=private)

    def personal(self, model: nn.Module) -> nn.Module:
        return without_passports(model)

    def exported(self, network: ModelBuilder, model: nn.Module) -> ModelBuilder:
        return Passported(network.network if isinstance(network, Checkpoint) else network, self.layers)
