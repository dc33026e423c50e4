"""Atoll's methods for people who have a Flower project: an ordinary Strategy and an ordinary ClientApp.

    strategy = atoll.flower.strategy(scaffold(), task, num_sites=10)     # server_app.py
    app = atoll.flower.client_app(task, scaffold(), data=load)           # client_app.py

See ``docs/flower.md``. The names are loaded when they are used, since Flower takes a while to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atoll.flower.client import client_app as client_app
    from atoll.flower.server import MethodStrategy as MethodStrategy
    from atoll.flower.server import strategy as strategy

_HOMES = {
    "MethodStrategy": "atoll.flower.server",
    "client_app": "atoll.flower.client",
    "strategy": "atoll.flower.server",
}

__all__ = ["MethodStrategy", "client_app", "strategy"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'atoll.flower' has no attribute {name!r}")
    import importlib

    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] != "flwr":
            raise
        from atoll.core.errors import AtollError

        raise AtollError("`atoll.flower` needs Flower: pip install 'atoll[flower]'.") from e
