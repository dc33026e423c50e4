"""Weights, and what the sites found out about them when some trained alone first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from atoll.core.message import Message
from atoll.core.tree import Parts, Tree
from atoll.federated.method import expect_like, expect_only
from atoll.federated.share.parameters import Parameters

WARM_UP, EXPLORE, TRAIN = range(3)
"""What the next round is for. The server says it in a broadcast, so that it is the same to everybody."""


def phase(number: int) -> dict[str, Tree]:
    """The part of a broadcast that says so."""
    return {"phase": {"phase": torch.tensor([number], dtype=torch.uint8)}}


def phase_of(replica: Parts) -> int:
    return int(replica["phase"]["phase"])


@dataclass(frozen=True)
class Explored(Parameters):
    """As :class:`Parameters`; a part of the replica stays until a broadcast has another of its name.

    So what came out of the exploration is sent once. A site that sat out a round gets a snapshot with all parts.
    Replies hold ``drift`` in the exploring round, else ``delta``; both look like the weights.
    """

    incremental: ClassVar[bool] = True

    def initial(self, model: nn.Module) -> Parts:
        return {**super().initial(model), **phase(WARM_UP)}

    def receive(self, replica: Parts, message: Message) -> Parts:
        return {**replica, **message.parts}

    def check(self, reply: Message, replica: Parts) -> None:
        part = "drift" if phase_of(replica) == EXPLORE else "delta"
        expect_only(reply, part)
        expect_like(reply, part, replica["weights"])
