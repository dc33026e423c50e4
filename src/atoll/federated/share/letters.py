"""What a peer keeps in gossip: everything. What it tells others: the tensors that a method would send to a server."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from atoll.core.message import Message
from atoll.core.tree import Parts
from atoll.data.dataset import Info
from atoll.federated.method import Share, SiteInfo, Split, expect_like, expect_only
from atoll.federated.visit import SiteModel
from atoll.models.model import ModelBuilder


@dataclass(frozen=True)
class Letters(Share):
    """Every site has a model of its own; letters hold the tensors that ``of`` shares.

    The replica is what all sites start from by agreement and never moves: it says what a letter must look like.

    Args:
        of: the method's own share.
    """

    of: Share

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        return self.of.prepare(model, site)

    def prepare_for(self, model: nn.Module, site: SiteInfo | None, rows: Info) -> nn.Module:
        return self.of.prepare_for(model, site, rows)

    def prepare_key(self, site: SiteInfo | None) -> object:
        return self.of.prepare_key(site)

    def split(self, model: nn.Module) -> Split:
        split = self.of.split(model)
        return Split(private=(*split.shared, *split.private))

    def initial(self, model: nn.Module) -> Parts:
        return self.of.initial(model)

    def receive(self, replica: Parts, message: Message) -> Parts:
        return replica

    def install(self, at: SiteModel, replica: Parts) -> None:
        """Nothing: the site's own tensors are the model."""

    def personal(self, model: nn.Module) -> nn.Module:
        return self.of.personal(model)

    def exported(self, network: ModelBuilder, model: nn.Module) -> ModelBuilder:
        return self.of.exported(network, model)

    def check(self, reply: Message, replica: Parts) -> None:
        expect_only(reply, "weights")
        expect_like(reply, "weights", replica.get("weights", {}))
