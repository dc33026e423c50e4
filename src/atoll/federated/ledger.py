"""What a merge has cost, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from atoll.core.errors import one_line
from atoll.federated.visit import Outcome


@dataclass(slots=True)
class Row:
    """One merge in the ledger.

    Attributes:
        time: virtual seconds at its end.
        seconds: real seconds it took.
        down_bytes, up_bytes: encoded bytes by site.
        relayed_bytes: between aggregators, where the topology has any.
        flops, site_seconds: by site; real seconds of the visit on this machine.
        refused: reason by site, for replies that were not merged.
        notes: warnings.
        metrics: of the global model after the merge, when it was evaluated.
    """

    round: int
    time: float = 0.0
    seconds: float = 0.0
    replies: int = 0
    down_bytes: dict[int, int] = field(default_factory=dict)
    up_bytes: dict[int, int] = field(default_factory=dict)
    relayed_bytes: int = 0
    flops: dict[int, float] = field(default_factory=dict)
    site_seconds: dict[int, float] = field(default_factory=dict)
    site_metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    metrics: Mapping[str, float] = field(default_factory=dict)
    engine: Any = field(default=None, repr=False, compare=False)

    def down(self, site: int, size: int) -> None:
        self.down_bytes[site] = self.down_bytes.get(site, 0) + size

    def up(self, site: int, size: int) -> None:
        self.up_bytes[site] = self.up_bytes.get(site, 0) + size

    def visit(self, site: int, outcome: Outcome) -> None:
        self.flops[site] = self.flops.get(site, 0.0) + outcome.flops
        self.site_seconds[site] = self.site_seconds.get(site, 0.0) + outcome.seconds
        if outcome.metrics:
            self.site_metrics[site] = dict(outcome.metrics)

    def refuse(self, site: int, reason: str) -> None:
        self.refused[site] = one_line(reason)  # it may be the site's own words

    def note(self, text: str) -> None:
        self.notes.append(one_line(text))

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, without the engine."""
        out = {name: getattr(self, name) for name in self.__slots__ if name != "engine"}
        return {k: ({str(i): v for i, v in x.items()} if isinstance(x, dict) else x) for k, x in out.items()}
