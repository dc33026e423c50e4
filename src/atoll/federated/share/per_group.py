"""What groups of sites share: each group its own model, and all of them who is with whom."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from atoll.core.errors import BadReply
from atoll.core.message import Message
from atoll.core.tree import Parts
from atoll.federated.method import Share, SiteInfo, Split, expect_only
from atoll.federated.signatures.signature import UNIT
from atoll.federated.visit import SiteModel


@dataclass(frozen=True)
class PerGroup(Share):
    """The common replica is what all start from by agreement, and ``groups``: ``of`` [N], the group of each site or -1.

    A group's model comes to its sites alone. Between visits a site keeps it, so all tensors are private to the engine.

    Args:
        inner: the method's own share.
    """

    inner: Share

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        return self.inner.prepare(model, site)

    def prepare_key(self, site: SiteInfo | None) -> object:
        return self.inner.prepare_key(site)

    def split(self, model: nn.Module) -> Split:
        split = self.inner.split(model)
        return Split(private=(*split.shared, *split.private))

    def initial(self, model: nn.Module) -> Parts:
        return self.inner.initial(model)

    def receive(self, replica: Parts, message: Message) -> Parts:
        if message.kind == "groups":
            return {**replica, **message.parts}
        return self.inner.receive(replica, message)

    def install(self, at: SiteModel, replica: Parts) -> None:
        """Nothing: the site keeps its group's model."""

    def check(self, reply: Message, replica: Parts) -> None:
        if reply.kind != "signature":
            self.inner.check(reply, replica)
            return
        expect_only(reply, "signature")
        tree = reply.parts.get("signature", {})
        p = tree.get("p")
        if p is None or len(tree) > 1 or p.dtype != torch.int32 or p.dim() != 1 or not len(p):
            raise BadReply("a signature is one vector of whole numbers, `signature/p`")
        if int(p.min()) < 0 or not 0 < int(p.sum(dtype=torch.int64)) <= UNIT:
            raise BadReply("the shares of a signature are not negative and sum to one")

    def export(self, model: nn.Module, replica: Parts) -> nn.Module:
        """The model as it is: there is one for each group."""
        return model
