"""An autoencoder for each site, made at the server; what predicts on its code stays at the site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from torch import nn

from atoll.core.message import Message
from atoll.core.tree import Parts, clone, named_tensors
from atoll.data.dataset import Info
from atoll.federated.method import Share, SiteInfo, Split, expect_like, expect_only
from atoll.federated.visit import SiteModel
from atoll.models.coded import Coded, CodedNet, coded
from atoll.models.model import ModelBuilder


@dataclass(frozen=True)
class GeneratedAutoencoder(Share):
    """The replica is the autoencoder that all start from, by agreement; later ones come for each site alone.

    A site's model is its own: autoencoder, heads and the weights that mix them are private. What comes down are
    ``autoencoder`` and, after the first visit, ``heads`` and ``errors`` (of each head's rows); what goes up is the
    ``delta`` of the autoencoder.

    Args:
        heads: how many the server trains.
    """

    heads: Annotated[int, Ge(1)] = 4

    def prepare_for(self, model: nn.Module, site: SiteInfo | None, rows: Info) -> nn.Module:
        return coded(model, rows, self.heads)

    def split(self, model: nn.Module) -> Split:
        return Split(private=tuple(named_tensors(model)))

    def initial(self, model: nn.Module) -> Parts:
        assert isinstance(model, CodedNet)
        return {"autoencoder": clone(named_tensors(model.autoencoder))}

    def install(self, at: SiteModel, replica: Parts) -> None:
        """Nothing to do: what a site predicts with is its own, and what it trains goes another way."""

    def check(self, reply: Message, replica: Parts) -> None:
        expect_only(reply, "delta")
        expect_like(reply, "delta", replica["autoencoder"])

    def receive(self, replica: Parts, message: Message) -> Parts:
        return message.parts or replica

    def export(self, model: nn.Module, replica: Parts) -> nn.Module:
        """The model as it is: there is no global one."""
        return model

    def exported(self, network: ModelBuilder, model: nn.Module) -> ModelBuilder:
        return Coded(network, self.heads)
