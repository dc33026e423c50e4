"""All replies of a merge beside each other: for servers that treat each by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from atoll.core.message import Message
from atoll.core.tree import clone
from atoll.federated.method import Combine, MergeContext, Reply


@dataclass(frozen=True)
class KeepApart(Combine):
    """Part ``i`` holds the tensors of site ``i``, whose reply has one part; fact ``from`` what each said and its number
    of examples. Keeps as many models in memory as there are replies."""

    accepts: ClassVar[tuple[str, ...]] = ("letter", "delta")
    again: ClassVar[bool] = False

    def combine(self, replies: Iterable[Reply], context: MergeContext) -> Message:
        parts, about = {}, {}
        for reply in replies:
            tree = next(iter(reply.message.parts.values()), {})  # a part without tensors does not cross the wire
            parts[str(reply.site)] = clone(tree)
            about[str(reply.site)] = {**reply.message.facts, "num_samples": reply.num_samples}
        return Message("letters", parts, {"from": about})
