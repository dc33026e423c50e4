"""A SuperNode that asks for work hears of it at once.

Flower's SuperNodes ask again and again, and sleep when there was nothing for them; a hundred that ask twice a second
keep a SuperLink busy, and each request still waits for the next question. Here the SuperLink holds a question that
found nothing until the server rings for that node, which it does when all pieces of a request are there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

ASK, RING = "/v1/fleet/pull-messages", "/atoll/ring"
HOLD = 10.0  # seconds; a SuperNode waits 30 for an answer, and networks forget silent connections after a minute or so
LONGEST = 4096  # bytes of a question


class Doorbell:
    """ASGI middleware. ``RING`` is closed to all but the server by :class:`~atoll.deploy.superlink.Door`."""

    def __init__(self, app: Any, hold: float = HOLD) -> None:
        self.app, self.hold, self.leaving = app, hold, False
        self._waiting: dict[int, set[asyncio.Event]] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        if path == RING:
            self._ring(json.loads(await _body(receive)))
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        elif path == ASK and not self.leaving and _length(scope) <= LONGEST:
            await self._asked(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _ring(self, nodes: Iterable[int]) -> None:
        """For these nodes; for none means that the server leaves: nobody is held until it rings again."""
        nodes = list(nodes)
        self.leaving = not nodes
        for node in nodes or list(self._waiting):
            for bell in self._waiting.get(node, ()):
                bell.set()

    async def _asked(self, scope: Any, receive: Any, send: Any) -> None:
        body, bell = await _body(receive), asyncio.Event()
        node = _node(body)
        self._waiting.setdefault(node, set()).add(bell)  # before we look, or a ring could be missed
        try:
            answer = await self._answer(scope, body, receive)
            if _nothing(answer):
                rung, gone = await self._wait(bell, receive)
                if gone:
                    return  # nothing may be claimed for a node that does not hear it
                if rung:
                    answer = await self._answer(scope, body, receive)
        finally:
            self._waiting[node].discard(bell)
            if not self._waiting[node]:
                del self._waiting[node]
        for part in answer:
            await send(part)

    async def _answer(self, scope: Any, body: bytes, receive: Any) -> list[Any]:
        """What Flower says to the question."""
        said: list[Any] = []
        told = False

        async def again() -> Any:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def keep(part: Any) -> None:
            said.append(part)

        await self.app({**scope, "state": dict(scope.get("state", {}))}, again, keep)
        return said

    async def _wait(self, bell: asyncio.Event, receive: Any) -> tuple[bool, bool]:
        """Until the bell rings, the node hangs up, or the time is over: whether it rang, whether the node is gone."""
        tasks = [asyncio.ensure_future(bell.wait()), asyncio.ensure_future(receive())]
        try:
            await asyncio.wait(tasks, timeout=self.hold, return_when=asyncio.FIRST_COMPLETED)
            return tasks[0].done(), tasks[1].done()
        finally:
            for task in tasks:
                task.cancel()


def _length(scope: Any) -> int:
    return next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0)


async def _body(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        part = await receive()
        body += part.get("body", b"")
        more = part.get("more_body", False)
    return body


def _node(question: bytes) -> int:
    from flwr.proto.fleet_pb2 import PullMessagesRequest
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return int(PullMessagesRequest.FromString(question).node.node_id)
    except DecodeError:
        return 0


def _nothing(answer: list[Any]) -> bool:
    """Whether Flower accepted the question and had no message."""
    from flwr.proto.fleet_pb2 import PullMessagesResponse

    status = next((part["status"] for part in answer if part["type"] == "http.response.start"), 0)
    body = b"".join(part.get("body", b"") for part in answer if part["type"] == "http.response.body")
    return status == 200 and not PullMessagesResponse.FromString(body).messages_list
