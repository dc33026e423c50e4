"""A question for work that found nothing is held until the server rings, and no message is claimed for nobody."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import Message
from flwr.proto.node_pb2 import Node

from atoll.deploy.doorbell import ASK, RING, Doorbell


class Flower:
    """An app that hands out each node's messages once, as Flower does."""

    def __init__(self) -> None:
        self.messages: dict[int, int] = {}
        self.asked = 0
        self.status = 200

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        question = PullMessagesRequest.FromString((await receive())["body"])
        self.asked += 1
        count = self.messages.pop(question.node.node_id, 0)
        body = PullMessagesResponse(messages_list=[Message()] * count).SerializeToString()
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": body})


async def call(app: Any, path: str, body: bytes, leave: asyncio.Event | None = None) -> tuple[int, bytes]:
    """One request; ``leave`` hangs up. Status 0: nothing was said."""
    parts: list[Any] = []
    told = False

    async def receive() -> Any:
        nonlocal told
        if told:
            await (leave or asyncio.Event()).wait()
            return {"type": "http.disconnect"}
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(part: Any) -> None:
        parts.append(part)

    headers = [(b"content-length", str(len(body)).encode())]
    await app({"type": "http", "path": path, "headers": headers}, receive, send)
    return (parts[0]["status"], parts[1]["body"]) if parts else (0, b"")


def ask(app: Any, node: int, leave: asyncio.Event | None = None) -> asyncio.Task[tuple[int, bytes]]:
    question = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()
    return asyncio.ensure_future(call(app, ASK, question, leave))


async def ring(app: Any, *nodes: int) -> None:
    assert (await call(app, RING, json.dumps(nodes).encode()))[0] == 204


def found(answer: tuple[int, bytes]) -> int:
    return len(PullMessagesResponse.FromString(answer[1]).messages_list)


def test_the_node_that_is_rung_for_hears_of_its_message_and_others_wait_on():
    async def scene() -> None:
        flower = Flower()
        bell = Doorbell(flower, hold=30.0)
        one, two = ask(bell, 1), ask(bell, 2)
        await asyncio.sleep(0.02)
        assert not one.done()
        assert not two.done()
        flower.messages = {1: 1, 2: 1}
        await ring(bell, 1)
        assert found(await asyncio.wait_for(one, 1)) == 1
        assert not two.done()
        assert flower.messages == {2: 1}
        await ring(bell, 2)
        assert found(await asyncio.wait_for(two, 1)) == 1
        assert not bell._waiting

    asyncio.run(scene())


def test_a_message_that_is_there_is_given_at_once_and_a_refusal_is_not_held():
    async def scene() -> None:
        flower = Flower()
        bell = Doorbell(flower, hold=30.0)
        flower.messages = {1: 1}
        assert found(await asyncio.wait_for(ask(bell, 1), 1)) == 1
        flower.status = 401
        assert (await asyncio.wait_for(ask(bell, 1), 1))[0] == 401
        assert not bell._waiting

    asyncio.run(scene())


def test_a_node_that_hung_up_claims_nothing():
    async def scene() -> None:
        flower, leave = Flower(), asyncio.Event()
        bell = Doorbell(flower, hold=30.0)
        gone = ask(bell, 1, leave)
        await asyncio.sleep(0.02)
        leave.set()
        assert await asyncio.wait_for(gone, 1) == (0, b"")
        flower.messages = {1: 1}
        await ring(bell, 1)
        assert flower.messages == {1: 1}
        assert flower.asked == 1

    asyncio.run(scene())


def test_a_ring_while_flower_looks_is_not_missed():
    async def scene() -> None:
        flower = Flower()
        bell: Any = None

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await flower(scope, receive, send)  # it has looked, and found nothing
            if flower.asked == 1:
                flower.messages = {1: 1}
                await ring(bell, 1)

        bell = Doorbell(slow, hold=30.0)
        assert found(await asyncio.wait_for(ask(bell, 1), 1)) == 1

    asyncio.run(scene())


def test_nobody_is_held_for_longer_than_agreed_nor_when_the_server_leaves():
    async def scene() -> None:
        bell = Doorbell(Flower(), hold=0.05)
        began = time.monotonic()
        assert found(await asyncio.wait_for(ask(bell, 1), 1)) == 0
        assert time.monotonic() - began >= 0.05
        bell = Doorbell(Flower(), hold=30.0)
        held = ask(bell, 1)
        await asyncio.sleep(0.02)
        await ring(bell)
        assert found(await asyncio.wait_for(held, 1)) == 0
        assert found(await asyncio.wait_for(ask(bell, 1), 1)) == 0

    asyncio.run(scene())


@pytest.mark.parametrize("body", [b"", b"\xff\xff\xff", b"not a question"])
def test_what_is_no_question_is_left_to_flower(body: bytes):
    async def scene() -> None:
        async def flower(scope: Any, receive: Any, send: Any) -> None:
            assert (await receive())["body"] == body
            await send({"type": "http.response.start", "status": 400, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        assert (await asyncio.wait_for(call(Doorbell(flower, hold=30.0), ASK, body), 1))[0] == 400

    asyncio.run(scene())
