"""Flower's SuperLink as a process of ours, with its doors shut.

All of a SuperLink's interfaces share one port: the fleet's (for sites, each request signed with a registered key), and
the control and runtime interfaces, which in the open distribution anybody who reaches the port may use. Here these two
answer only to the program that started the SuperLink, which shows a secret; and no request may be longer than a limit.
Sites hear of their work at once (``doorbell.py``).
Started as ``python -m atoll.deploy.superlink`` with the options of ``flower-superlink``.
"""

from __future__ import annotations

import hmac
import os
import sys
from typing import Any

TOKEN_HEADER = "x-atoll-token"
TOKEN_VARIABLE = "ATOLL_SUPERLINK_TOKEN"
LONGEST = 64 << 20
"""Bytes of one request. Flower sends arrays in chunks of 5 MiB."""


class Door:
    """ASGI middleware: who may ask what, and how much."""

    def __init__(self, app: Any, token: bytes, longest: int = LONGEST) -> None:
        self.app, self.token, self.longest = app, token, longest

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        shown = headers.get(TOKEN_HEADER.encode(), b"")
        if not scope["path"].startswith("/v1/fleet/") and not hmac.compare_digest(shown, self.token):
            await _answer(send, 403, b"this interface is closed")
            return
        length = headers.get(b"content-length", b"0")
        told = length.isdigit() and len(length) < 20 and int(length) <= self.longest
        if b"transfer-encoding" in headers or not told:
            await _answer(send, 413, b"the request is too long, or does not say its length")
            return
        await self.app(scope, receive, send)


async def _answer(send: Any, status: int, text: bytes) -> None:
    headers = [
        (b"content-type", b"text/plain"),
        (b"content-length", str(len(text)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def main() -> None:
    from importlib import import_module

    from flwr.superlink import extensions
    from starlette.middleware import Middleware

    from atoll.deploy.doorbell import Doorbell

    token = os.environ.pop(TOKEN_VARIABLE, "")
    if not token:
        sys.exit(f"{TOKEN_VARIABLE} must hold the secret of the program that starts this SuperLink")
    program: Any = import_module("flwr.superlink.cli.flower_superlink")  # the package shadows its name
    program.warn_if_flwr_update_available = lambda **_: None  # no calls home
    extensions.get_middleware = lambda: (Middleware(Door, token=token.encode()), Middleware(Doorbell))
    program.flower_superlink()


if __name__ == "__main__":
    main()
