"""Replies of a merge beside each other, whole, for a server that merges some of them by themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from atoll.core.message import Message
from atoll.core.tree import Tree, clone
from atoll.federated.method import Combine, MergeContext, Reply


@dataclass(frozen=True)
class BySite(Combine):
    """Part ``site/part`` holds a part of a reply; fact ``replies`` what is known of each. :func:`replies_in` reads it.

    Keeps as many models in memory as there are replies.

    Args:
        inner: the combiner that will merge some of them.
    """

    inner: Combine
    accepts: ClassVar[tuple[str, ...]] = ("*",)

    @property
    def weighted(self) -> bool:
        return self.inner.weighted

    def combine(self, replies: Iterable[Reply], context: MergeContext) -> Message:
        parts, about = dict[str, Tree](), {}
        for r in replies:
            parts |= {f"{r.site}/{part}": clone(tree) for part, tree in r.message.parts.items()}
            about[r.site] = (r.message.kind, dict(r.message.facts), r.num_samples, r.staleness, r.seconds)
        return Message("replies", parts, {"replies": about})


def replies_in(message: Message) -> list[Reply]:
    """The replies that :class:`BySite` put together, in their order."""
    trees = {site: dict[str, Tree]() for site in message.facts["replies"]}
    for name, tree in message.parts.items():
        site, _, part = name.partition("/")
        trees[int(site)][part] = tree
    return [
        Reply(site, Message(kind, trees[site], facts), *numbers)
        for site, (kind, facts, *numbers) in message.facts["replies"].items()
    ]
