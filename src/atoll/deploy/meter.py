"""The book of what has left a site today, and whether its rules (``policy.py``) let more leave.

Days are UTC. Budgets are per day and start anew: a promise over several days is the sum of them.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from atoll.core.errors import AtollError, RunError
from atoll.deploy.policy import Policy
from atoll.privacy.accounting import Event, Sampling, epsilon


@dataclass(frozen=True, slots=True)
class Day:
    """What has been booked on a day."""

    bytes: int = 0
    events: tuple[Event, ...] = ()


@dataclass
class Meter:
    """What has left the site, by UTC day: an append-only file of JSON lines in the site's folder.

    A booking is on the disk before what it stands for leaves. So whatever is killed when, the book may say more than
    has left, never less. Several processes may share a book.

    Args:
        path: of the file.
        now: seconds since 1970.
    """

    path: Path
    now: Callable[[], float] = time.time
    _days: dict[str, Day] = field(default_factory=dict, init=False, repr=False)
    _read: int = field(default=0, init=False, repr=False)

    def today(self) -> Day:
        """What has been booked today.

        Raises:
            RunError: the book cannot be read; then nothing may leave.
        """
        with self._open() as file:
            return self._catch_up(file).get(self._day(), Day())

    def book(self, policy: Policy, size: int, event: Event | None = None, about: str = "") -> str | None:
        """Book something that is about to leave; a refusal means that it must not, and that nothing was booked.

        Args:
            size: bytes on the wire.
            event: of :func:`~atoll.deploy.policy.participation`; None for what is no reply to a visit, or was sent
                before.
            about: for people who read the book.

        Raises:
            RunError: the book cannot be read or written.
        """
        with self._open() as file:
            day = self._day()
            before = self._catch_up(file).get(day, Day())
            refused = _over(policy, before, size, event)
            if refused is None:
                entry = {"day": day, "bytes": size, "event": asdict(event) if event else None, "about": about[:200]}
                _append(file, json.dumps(entry, allow_nan=False).encode() + b"\n", self.path)
            return refused

    def refusal(self, policy: Policy, size: int, event: Event | None = None) -> str | None:
        """What :meth:`book` would answer today; nothing is booked."""
        return _over(policy, self.today(), size, event)

    def _day(self) -> str:
        return datetime.fromtimestamp(self.now(), UTC).date().isoformat()

    @contextmanager
    def _open(self) -> Iterator[int]:
        """The file, locked for this process alone."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as e:
            raise RunError(f"{self.path}, the book of what leaves this site, cannot be opened ({e.strerror}).") from e
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)

    def _catch_up(self, file: int) -> dict[str, Day]:
        """Read what was added since the last look. A last line that was cut off was never acted upon: it goes."""
        size = os.fstat(file).st_size
        if size < self._read:  # somebody else's file by now
            self._days, self._read = {}, 0
        raw = os.pread(file, size - self._read, self._read) if size > self._read else b""
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            os.ftruncate(file, self._read + whole)
        for line in raw[:whole].splitlines():
            day, bytes_, event = self._entry(line)
            d = self._days.get(day, Day())
            self._days[day] = Day(d.bytes + bytes_, _with(d.events, event))
        self._read += whole
        return self._days

    def _entry(self, line: bytes) -> tuple[str, int, Event | None]:
        try:
            e = json.loads(line)
            event, size = e["event"], e["bytes"]
            if event is not None:
                renyi = tuple(float(d) for d in event["renyi"])
                event = Event(float(event["multiplier"]), Sampling(**event["sampling"]), _count(event["count"]), renyi)
                if not 0 <= event.multiplier < math.inf:
                    raise ValueError("multiplier")
            return date.fromisoformat(e["day"]).isoformat(), _count(size), event
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise RunError(
                f"{self.path}, the book of what leaves this site, is damaged. Nothing leaves until it is mended."
            ) from error


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("count")
    return value


def _append(file: int, line: bytes, path: Path) -> None:
    """The whole line on the disk, or an error: then what it stands for does not leave."""
    try:
        if os.write(file, line) != len(line):
            raise OSError(None, "the disk is full")
        os.fsync(file)
    except OSError as e:
        raise RunError(f"{path}, the book of what leaves this site, cannot be written ({e.strerror}).") from e


def _with(events: tuple[Event, ...], new: Event | None) -> tuple[Event, ...]:
    """Equal events become one with a count."""
    if new is None:
        return events
    for i, e in enumerate(events):
        if replace(e, count=new.count) == new:
            return (*events[:i], replace(e, count=e.count + new.count), *events[i + 1 :])
    return (*events, new)


def _over(policy: Policy, day: Day, size: int, event: Event | None) -> str | None:
    """Whether a day's limits would be exceeded."""
    if policy.bytes_per_day is not None and day.bytes + size > policy.bytes_per_day:
        return (
            f"This site sends at most {policy.bytes_per_day:,} bytes a day; today it has sent {day.bytes:,}, and "
            f"{size:,} more are too many."
        )
    if policy.epsilon_per_day is None or event is None:
        return None
    if event.bare:
        return (
            "The method adds no noise that this site can count on, and the site has an epsilon budget. Add `clip` and "
            "`gaussian_noise` to `uplink`."
        )
    if any(e.bare for e in day.events):
        return "Something left this site without noise today, so its epsilon budget for the day is spent."
    try:
        spent = epsilon(_with(day.events, event), policy.delta)
    except AtollError as e:
        return f"What this reply would cost cannot be added to what left today. {str(e).split('. ')[0].rstrip('.')}."
    if spent > policy.epsilon_per_day:
        before = epsilon(day.events, policy.delta)
        return (
            f"This site spends at most epsilon {policy.epsilon_per_day:g} a day (at delta {policy.delta:g}); today it "
            f"has spent {before:.3g}, and with this reply it would be {spent:.3g}."
        )
    return None
