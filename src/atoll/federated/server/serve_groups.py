"""Group sites by what they reveal, then let each group have a server of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge

from atoll.core.errors import AtollError
from atoll.core.message import Message
from atoll.core.tree import Parts, Tree
from atoll.federated.combine.by_site import replies_in
from atoll.federated.grouping import Ground, group
from atoll.federated.method import Broadcast, Combine, MergeContext, Reply, ServerStep, Share
from atoll.federated.signatures.signature import UNIT


@dataclass(frozen=True)
class ServeGroups(ServerStep):
    """The first merge asks everyone for a signature; each later one is, for each group by itself, ``inner`` of
    ``combine``.

    When a site reveals itself late, all sites are grouped anew, and a new group goes on from the model that most of its
    sites had: models are handed on, and never mixed across groups. A site whose signature has another length than most
    is a group by itself. State: ``signatures`` by site, and for each group, named by its least site, the parts of the
    message that its sites hold and of its server's state.

    Args:
        inner: the method's own server.
        combine: the method's own combiner; a group with fewer replies than it needs waits.
        share: the method's own share.
        ground, most: as in :func:`~atoll.federated.grouping.group`.
    """

    inner: ServerStep
    combine: Combine
    share: Share
    ground: Ground = "zero_one"
    most: Annotated[int, Ge(2)] | None = None
    accepts: ClassVar[tuple[str, ...]] = ("replies",)
    broadcasts: ClassVar[str] = "groups"

    @property
    def needs_public_data(self) -> bool:  # type: ignore[override]
        return self.inner.needs_public_data or self.combine.needs_public_data

    def open(self, replica: Parts) -> Broadcast:
        return Broadcast(Message("groups"), everyone=True)

    def step(self, replica: Parts, state: Parts, combined: Message, context: MergeContext) -> tuple[Broadcast, Parts]:
        replies = replies_in(combined)
        signatures = dict(state.get("signatures", {}))
        of = {int(s): int(g) for s, g in enumerate(replica["groups"]["of"]) if g >= 0} if "groups" in replica else {}
        groups = {
            g: _Group(_under(state, f"{g}.message."), _under(state, f"{g}.state.")) for g in sorted(set(of.values()))
        }
        notes: list[str] = []
        for g, one in groups.items():
            theirs = [r for r in replies if of.get(r.site) == g and r.message.kind != "signature"]
            try:
                groups[g] = self._merged(one, theirs, context)
            except AtollError as e:
                notes.append(f"the group of site {g} keeps its model: {e}")
        late = {str(r.site): r.message.parts["signature"]["p"] for r in replies if r.message.kind == "signature"}
        if new := {s: p for s, p in late.items() if s not in signatures}:
            signatures |= new
            fresh = _Group(self.inner.open(replica).common.parts, self.inner.init(replica))
            before, of = of, self._groups(signatures)
            groups = {g: groups.get(_from(g, of, before), fresh) for g in sorted(set(of.values()))}
            notes.append(_said(of))
        kept = {
            f"{g}.{name}.{p}": t for g, one in groups.items() for name, parts in one.named() for p, t in parts.items()
        }
        where = torch.tensor([of.get(s, -1) for s in range(context.num_sites)])
        own = {s: Message(self.inner.broadcasts, groups[g].message) for s, g in sorted(of.items())}
        broadcast = Broadcast(Message("groups", {"groups": {"of": where}}), own, notes=tuple(notes))
        return broadcast, {"signatures": signatures, **kept}

    def _merged(self, one: _Group, replies: list[Reply], context: MergeContext) -> _Group:
        """A group after a merge of its own."""
        if len(replies) < max(1, self.combine.least):
            return one
        replica = self.share.receive({}, Message(self.inner.broadcasts, one.message))
        context = replace(context, replica=replica)
        combined = self.combine.combine(replies, context)
        broadcast, state = self.inner.step(replica, one.state, combined, replace(context, replies=len(replies)))
        return _Group(broadcast.common.parts, state)

    def _groups(self, signatures: Tree) -> dict[int, int]:
        length = Counter(len(p) for p in signatures.values()).most_common(1)[0][0]
        alike = {int(s): p.double().numpy() / UNIT for s, p in signatures.items() if len(p) == length}
        return {int(s): int(s) for s in signatures} | group(alike, self.ground, self.most)


@dataclass(frozen=True)
class _Group:
    """The parts of what its sites hold, and its server's state."""

    message: Parts
    state: Parts

    def named(self) -> Iterable[tuple[str, Parts]]:
        return ("message", self.message), ("state", self.state)


def _under(state: Parts, prefix: str) -> Parts:
    return {name[len(prefix) :]: tree for name, tree in state.items() if name.startswith(prefix)}


def _from(g: int, of: Mapping[int, int], before: Mapping[int, int]) -> int:
    """The old group that most sites of a new one were in, of equally many the least; -1: all are new."""
    came = Counter(before[s] for s in sorted(of) if of[s] == g and s in before)
    return min(came, key=lambda old: (-came[old], old)) if came else -1


def _said(of: Mapping[int, int]) -> str:
    members = {g: [s for s in sorted(of) if of[s] == g] for g in sorted(set(of.values()))}
    text = " | ".join(" ".join(map(str, sites)) for sites in members.values())
    alone = [str(g) for g, sites in members.items() if len(sites) == 1]
    flag = (
        f"; alone, so unlike the others, hostile or just unlucky: {', '.join(alone)}" if alone and len(of) > 1 else ""
    )
    return f"groups of sites: {text}{flag}"
