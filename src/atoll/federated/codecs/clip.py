"""Bound what one message can change: the first half of client-level privacy (McMahan et al., 2018)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor

from atoll.core.card import Card, Cite
from atoll.core.message import Message
from atoll.core.tree import Parts
from atoll.federated.codecs._flat import split_floats
from atoll.federated.method import Codec, CodecContext

CARD = Card(
    name="clip",
    area="codec",
    summary="scale a message down to a given L2 norm",
    cites=(
        Cite(
            authors="H. Brendan McMahan, Daniel Ramage, Kunal Talwar, Li Zhang",
            year=2018,
            title="Learning Differentially Private Recurrent Language Models",
            arxiv="1710.06963",
            venue="ICLR",
        ),
    ),
    suits=("hostile sites",),
)


@dataclass(frozen=True)
class Clip(Codec):
    """x * min(1, norm / ||x||), with the L2 norm over all floating-point tensors of the message jointly.

    A message that is not finite becomes zeros: a diverged site must not have more influence than any other.

    Args:
        norm: the largest L2 norm that leaves the site.
    """

    norm: Annotated[float, Gt(0)]
    order: ClassVar[int] = 0

    @property
    def bound(self) -> float:
        return self.norm

    def encode(self, message: Message, state: Parts, context: CodecContext) -> tuple[Message, Parts]:
        floats, _ = split_floats(message)
        total = l2([t for tree in floats.values() for t in tree.values()])
        if total <= self.norm:
            return message, {}
        finite = math.isfinite(total)
        # A little less than the ratio, so that rounding of the products cannot exceed the bound.
        factor = self.norm / total * (1 - 1e-6) if finite else 0.0
        parts = {part: dict(tree) for part, tree in message.parts.items()}
        for part, tree in floats.items():
            for name, t in tree.items():
                parts[part][name] = t * factor if finite else torch.zeros_like(t)
        return Message(message.kind, parts, message.facts), {}

    def decode(self, message: Message) -> Message:
        return message


def l2(tensors: list[Tensor]) -> float:
    """L2 norm of all entries as one vector, summed in float64."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors))
