"""What a run is between two merges: all that a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from atoll.core.message import Message
from atoll.core.tree import Parts, moved
from atoll.federated.method import Broadcast
from atoll.federated.visit import Outcome


@dataclass(slots=True)
class Flight:
    """A visit that has started. ``finish`` is virtual time; a lower bound until the outcome is known."""

    site: int
    round: int
    repeat: int
    started: float
    finish: float
    down_bytes: int
    up_bytes: int = 0
    ticket: int = -1
    outcome: Outcome | None = None
    reply: Message | None = None  # decoded, when the flight outlived its buffer


@dataclass(slots=True)
class RunState:
    """All that a resumed run needs. ``round`` counts merges; the current broadcast has the same number."""

    round: int = 0
    now: float = 0.0
    starts: int = 0
    replica: Parts = field(default_factory=dict)
    site_replica: Parts = field(default_factory=dict)
    server: Parts = field(default_factory=dict)
    broadcast: Broadcast = field(default_factory=lambda: Broadcast(Message("none")))
    seen: dict[int, int] = field(default_factory=dict)
    """The last broadcast that each site received."""
    tags: dict[int, str] = field(default_factory=dict)
    """The committed state of each site."""
    visits: dict[int, tuple[int, int]] = field(default_factory=dict)
    """(round, repeats) of each site's last start: names its random streams."""
    history: list[tuple[int, int]] = field(default_factory=list)
    """(round, bytes) of broadcasts that a site that missed them would still need."""
    sent: int = 0
    """The round in which the current broadcast was made: names its codecs' random streams."""
    flights: dict[int, Flight] = field(default_factory=dict)
    cohorts: list[tuple[int, int, bool]] = field(default_factory=list)
    """Of each merge, for the privacy accountant: accepted replies, sites asked, drawn by ``select`` from all sites."""
    channels: dict[int, bytes] = field(default_factory=dict)
    """Long-term public keys of sites, for secure sums."""


def on_device(state: RunState, device: str) -> RunState:
    """A state that was read from a file, with its tensors where the workers compute."""
    if device != "cpu":
        state.replica, state.site_replica = moved(state.replica, device), moved(state.site_replica, device)
        state.server = moved(state.server, device)
        common = state.broadcast.common
        state.broadcast = replace(state.broadcast, common=replace(common, parts=moved(common.parts, device)))
    return state
