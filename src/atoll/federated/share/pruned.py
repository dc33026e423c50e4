"""Weights of which only some are used, and travel: what AutoFLIP shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atoll.core.message import Message
from atoll.core.tree import Parts, Tree
from atoll.federated.method import expect_like, expect_only
from atoll.federated.share.explored import Explored
from atoll.models.masks import pack_bits, unpack_bits
from atoll.models.model import ModelBuilder
from atoll.models.narrow import narrowed, remove_units, units_of


@dataclass(frozen=True)
class Pruned(Explored):
    """As :class:`Explored`. Once there is a mask, weights and updates travel as the kept entries alone, in a row.

    The mask travels once, at a bit an entry (part ``mask``, tensor ``bits``), and its arrival sets what it drops to
    zero. In the replica it has the shapes of the weights; buffers are kept whole. The exported model has lost the units
    that have no entry left; what is pruned within the others stays as zeros.
    """

    def receive(self, replica: Parts, message: Message) -> Parts:
        parts, dense = {**replica, **message.parts}, replica["weights"]
        if "mask" in message.parts:
            parts["mask"] = unpack_bits(message.parts["mask"]["bits"], dense)
        mask = parts.get("mask")
        if mask is not None:
            sent = message.parts.get("weights")
            kept = sent if sent is not None else gather(dense, mask)
            parts["weights"] = scatter(kept, mask)
        return parts

    def snapshot(self, replica: Parts) -> Message:
        mask = replica.get("mask")
        if mask is None:
            return Message("snapshot", replica)
        weights = gather(replica["weights"], mask)
        return Message("snapshot", {**replica, "weights": weights, "mask": {"bits": pack_bits(mask)}})

    def check(self, reply: Message, replica: Parts) -> None:
        mask = replica.get("mask")
        if mask is None:
            super().check(reply, replica)
        else:
            expect_only(reply, "delta")
            expect_like(reply, "delta", gather(replica["weights"], mask))

    def export(self, model: nn.Module, replica: Parts) -> nn.Module:
        model, mask = super().export(model, replica), replica.get("mask", {})
        for units, keep in [(u, u.entries(mask).any(1)) for u in units_of(model) if u.within(mask)]:
            remove_units(model, units, keep)
        return model

    def exported(self, network: ModelBuilder, model: nn.Module) -> ModelBuilder:
        return narrowed(network, model)


def gather(tree: Tree, mask: Tree) -> Tree:
    """The kept entries of each tensor, in a row."""
    return {n: t[mask[n]] for n, t in tree.items()}


def scatter(rows: Tree, mask: Tree) -> Tree:
    """The inverse, with zeros where nothing was kept."""
    return {n: _placed(rows[n], m) for n, m in mask.items()}


def _placed(row: Tensor, mask: Tensor) -> Tensor:
    out = torch.zeros(mask.shape, dtype=row.dtype, device=row.device)
    out[mask] = row
    return out
