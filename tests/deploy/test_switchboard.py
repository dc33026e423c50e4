"""Calls to many sites at once: each is sent once, and what is held while an earlier answer is awaited is bounded."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import pytest

pytest.importorskip("flwr")

import torch

from atoll.core.message import Message
from atoll.deploy import workers
from atoll.deploy.link import SIDE, LinkLost, Lost, NodeState
from atoll.deploy.workers import Switchboard

SITES = 30


class FakeLink:
    """Answers each request with its own number of bytes when asked for it, as a SuperLink that has all of them."""

    def __init__(self, size: int = 8, breaks: int = -1) -> None:
        self.size, self.breaks = size, breaks
        self.sent: list[int] = []
        self.taken: list[int] = []
        self.mended = self.asked = self.most = 0
        self._lock, self._busy = threading.Lock(), 0
        self._waiting: dict[str, int] = {}

    def nodes(self) -> Mapping[int, NodeState]:
        return {i: NodeState(i + 100, True, "now") for i in range(SITES)}

    def send(self, site: int, message: Message, ttl: float) -> str:
        with self._lock:
            self._busy += 1
            self.most = max(self.most, self._busy)
            if len(self.sent) == self.breaks:
                self.breaks = -1
                self._busy -= 1
                raise LinkLost("gone")
            self.sent.append(site)
            number = f"{site}-{len(self.sent)}"
            self._waiting[number] = site
        time.sleep(0.005)
        with self._lock:
            self._busy -= 1
        return number

    def take(self, numbers: Sequence[str]) -> Iterator[tuple[str, Message | Lost]]:
        self.asked += 1
        for number in numbers:
            if number in self._waiting:
                site = self._waiting.pop(number)
                self.taken.append(site)
                yield number, Message("said", {"x": {"t": torch.zeros(self.size, dtype=torch.uint8)}}, {"site": site})

    def beat(self) -> None:
        """It is always there."""

    def mend(self) -> None:
        self.mended += 1
        self._waiting.clear()

    def close(self) -> None:
        """Nothing to close."""


def ask_all(board: Switchboard) -> list[int]:
    return board.call([(i, lambda _: Message("ask")) for i in range(SITES)])


def test_all_requests_are_sent_once_and_side_by_side_and_answers_taken_together():
    link = FakeLink()
    board = Switchboard(link, 60.0)
    tickets = ask_all(board)
    assert sorted(link.sent) == list(range(SITES))
    assert 1 < link.most <= SIDE
    answers = [board.wait(t) for t in tickets]
    assert [a.facts["site"] for a in answers if isinstance(a, Message)] == list(range(SITES))
    assert len(link.sent) == SITES
    assert link.asked < 10  # not once for each request


def test_large_answers_wait_at_the_superlink_until_there_is_room_and_the_awaited_one_always_comes(monkeypatch):
    monkeypatch.setattr(workers, "HELD", 10_000)
    link = FakeLink(size=1000)  # ten of them
    board = Switchboard(link, 60.0)
    tickets = ask_all(board)
    worst = reversed(list(enumerate(tickets)))  # none of those that came first is wanted
    for claimed, (site, ticket) in enumerate(worst):
        assert len(link.taken) - claimed <= 11
        answer = board.wait(ticket)
        assert isinstance(answer, Message)
        assert answer.facts["site"] == site
    assert sorted(link.taken) == list(range(SITES))


def test_a_link_that_breaks_while_requests_are_sent_loses_none():
    link = FakeLink(breaks=7)
    board = Switchboard(link, 60.0)
    answers = [board.wait(t) for t in ask_all(board)]
    assert [a.facts["site"] for a in answers if isinstance(a, Message)] == list(range(SITES))
    assert link.mended == board.counts["links lost"] == 1


class Leaving(FakeLink):
    """The node of site 0 dies with a request; what it is sent afterwards is lost, until it has been started anew."""

    def __init__(self) -> None:
        super().__init__()
        self.died = 0.0

    def back(self) -> bool:
        return time.monotonic() - self.died > 0.5

    def nodes(self) -> Mapping[int, NodeState]:
        found = dict(super().nodes())
        if self.died:
            found[0] = NodeState(100, self.back(), "anew")
        return found

    def take(self, numbers: Sequence[str]) -> Iterator[tuple[str, Message | Lost]]:
        lost = [n for n in numbers if n.startswith("0-") and not (self.died and self.back())]
        for number in lost:
            self.died = self.died or time.monotonic()
            yield number, Lost("its node is gone", again=True)
        yield from super().take([n for n in numbers if n not in lost])


def test_a_node_that_dies_with_a_request_is_waited_for_and_not_blamed(monkeypatch):
    monkeypatch.setattr(workers, "NODES", 0.4)
    link = Leaving()
    board = Switchboard(link, 60.0)
    answers = [board.wait(t) for t in ask_all(board)]
    assert [a.facts["site"] for a in answers if isinstance(a, Message)] == list(range(SITES))
    assert link.sent.count(0) == 2


def test_a_request_that_vanished_in_silence_is_sent_again(monkeypatch):
    class Silent(FakeLink):
        """The first request is claimed by a node on a connection that breaks before the node hears of it."""

        def send(self, site: int, message: Message, ttl: float) -> str:
            number = super().send(site, message, ttl)
            if len(self.sent) == 1:
                self._waiting.pop(number)
            return number

    monkeypatch.setattr(workers, "REPEAT", 0.2)
    link = Silent()
    board = Switchboard(link, patience=60.0)
    (ticket,) = board.call([(3, lambda _: Message("do"))], limit=20.0)
    assert isinstance(board.wait(ticket), Message)
    assert link.sent == [3, 3]
    assert board.counts["requests sent again"] == 1
