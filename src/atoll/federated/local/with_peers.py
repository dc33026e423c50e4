"""A visit in gossip: mix the own model with what peers wrote, work, and write to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from atoll.core.message import Message
from atoll.core.streams import key
from atoll.core.tree import Tree, add, add_, clone, pick, sub, zeros_like
from atoll.federated.local._around import Around
from atoll.federated.method import Combine, MergeContext, Reply, Share
from atoll.federated.visit import Result, Visit


@dataclass(frozen=True)
class WithPeers(Around):
    """own += combine(letters - own, with a zero for the own model); then ``inner`` from there.

    The letter holds the mixed model plus the update that ``inner`` would have sent to a server, and its facts.

    Args:
        inner: what a site does in a visit.
        combine: how it merges; with fewer letters than it needs, the site goes on alone.
        share: what the method shares.
    """

    combine: Combine
    share: Share
    produces: ClassVar[str] = "letter"
    synchronous_only: ClassVar[bool] = True

    def run(self, visit: Visit) -> Result:
        split = self.share.split(visit.model)
        own = pick(visit.at.tensors, split.shared)
        if visit.message is not None:
            self._mix_(own, visit.message, visit)
        start = clone(own)
        inside = replace(visit, at=replace(visit.at, split=split), replica={"weights": start}, message=None)
        result = self.inner.run(inside)
        letter = add(start, result.message.parts.get("delta", {}))
        return replace(result, message=Message("letter", {"weights": letter}, result.message.facts))

    def _mix_(self, own: Tree, letters: Message, visit: Visit) -> None:
        me, about = visit.site.site, letters.facts["from"]
        facts = {int(peer): f for peer, f in about.items()}
        facts[me] = {"num_samples": len(visit.data.train)}
        if len(facts) < self.combine.least:
            return

        def reply(peer: int) -> Reply:
            delta = zeros_like(own) if peer == me else sub(letters.parts.get(str(peer), {}), own)
            return Reply(peer, Message("delta", {"delta": delta}, facts[peer]), int(facts[peer]["num_samples"]))

        combined = self.combine.combine((reply(peer) for peer in sorted(facts)), self._context(own, visit))
        add_(own, combined.parts.get("delta", {}))

    def _context(self, own: Tree, visit: Visit) -> MergeContext:
        rows: Any = visit.data.validation if len(visit.data.validation) else visit.data.train
        return MergeContext(
            visit.round, {"weights": own}, 1, key(visit.seed, "peer", visit.site.site), visit.task, rows, dry=visit.dry,
            buffers=visit.at.buffers, num_samples=len(visit.data.train), model=visit.model, site=visit.site.site,
        )  # fmt: skip
