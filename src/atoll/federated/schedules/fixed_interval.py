"""Merge whatever has arrived, at every tick of a clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from atoll.federated.method import Fleet, Reply, Schedule


@dataclass(frozen=True)
class FixedInterval(Schedule):
    """Idle sites start at each tick from the current version; the replies of an interval merge at its end.

    A tick before which nothing arrived passes: it merges nothing and makes no version, so staleness counts
    versions. An interval longer than the slowest visit is the synchronous round.

    Args:
        dt: virtual seconds between ticks.
    """

    dt: Annotated[float, Gt(0)] = 1.0
    synchronous: ClassVar[bool] = False

    @property
    def interval(self) -> float:
        return self.dt

    def collect(self, fleet: Fleet) -> Iterable[Reply]:
        fleet.start([site for site in fleet.select() if site not in fleet.in_flight])
        arrived = 0
        while fleet.in_flight and not arrived:
            tick = fleet.now + self.dt
            for reply in fleet.arrivals_until(tick):
                arrived += 1
                yield reply
            fleet.wait_until(tick)
