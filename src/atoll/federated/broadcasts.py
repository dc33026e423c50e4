"""What the server sends out: where the replicas are, and what brings a site to the present one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from atoll.core.message import encoded_size
from atoll.core.tree import contiguous
from atoll.federated.method import Broadcast, CodecContext
from atoll.federated.run_state import RunState
from atoll.federated.visit import Publication, Setup, decode_chain, encode_chain


class Broadcasts:
    """Moves the replicas of a :class:`RunState`, and hands each broadcast to the workers.

    Attributes:
        common: the present broadcast as it arrives.
        bytes: of it, as it is encoded.
    """

    def __init__(self, setup: Setup, workers: Any, state: RunState) -> None:
        self.setup, self.method, self.workers, self.state = setup, setup.method, workers, state
        self.bytes = 0

    def move(self, broadcast: Broadcast, later: int = 0) -> None:
        """Move the replicas to a new broadcast and hand it to the workers; ``later`` sets it apart from the one that
        they may hold already since the last merge."""
        s, share = self.state, self.method.share
        common = replace(broadcast.common, parts=contiguous(broadcast.common.parts))
        broadcast = replace(broadcast, common=common)
        s.broadcast, s.sent, s.server = broadcast, s.round + later, contiguous(s.server)
        s.replica = share.receive(s.replica, broadcast.common)
        self._encode()
        s.site_replica = share.receive(s.site_replica, self.common) if self.method.downlink else s.replica
        if share.incremental:
            self._remember(self.bytes)
        self._hand_over()

    def again(self) -> None:
        """After a resume: the same hand-over, without moving the replicas again."""
        self._encode()
        self._hand_over()

    def stay(self) -> None:
        """A merge that changed nothing."""
        if self.method.share.incremental:
            self.state.history.append((self.state.round, 0))

    def download(self, site: int) -> tuple[int, tuple[int, ...] | None]:
        """Exact bytes that a site must receive to be at the current broadcast, and which broadcasts these are (None:
        a snapshot)."""
        s = self.state
        own = s.broadcast.per_site.get(site)
        extra = encoded_size(own) if own is not None else 0
        if not self.method.share.incremental:
            return (self.bytes, (s.sent,)) if own is None else (extra, ())
        seen = s.seen.get(site, -1)
        if s.history and s.history[0][0] <= seen + 1:
            missing = [(r, b) for r, b in s.history if r > seen and b]
            return extra + sum(b for _, b in missing), tuple(r for r, _ in missing)
        return extra + encoded_size(self.method.share.snapshot(s.site_replica)), None

    def _hand_over(self) -> None:
        self.workers.publish(Publication(self.state.sent, self.state.site_replica, self._encoded))

    def _encode(self) -> None:
        """What the current broadcast is on arrival, and its size."""
        s, codecs = self.state, self.method.downlink
        self.common = self._encoded = s.broadcast.common
        if codecs:
            context = CodecContext(self.setup.seed, s.sent, -1)
            self._encoded, _ = encode_chain(codecs, self.common, [{} for _ in codecs], context)
            self.common = decode_chain(codecs, self._encoded)
        self.bytes = encoded_size(self._encoded)

    def _remember(self, size: int) -> None:
        """Keep the sizes of broadcasts that a late site would need, as long as replaying them is the cheaper way."""
        s = self.state
        s.history.append((s.round, size))
        whole = encoded_size(self.method.share.snapshot(s.site_replica))
        while len(s.history) > 1 and sum(b for _, b in s.history) > whole:
            s.history.pop(0)
