"""Flower's SuperNode as a process of ours, which asks for work at our pace.

A SuperNode that finds no message sleeps for three seconds, which no option changes; for small models that is most of
a round. Here its module sees a clock whose sleeps are cut short: between questions for work, and while it looks in its
own memory for an answer or fetches pieces that are still on their way. And it shows a sign of life three times as
often, so that a server knows of a lost site after 20 seconds and not after 60; and it tries a lost server every two
seconds. All else is Flower's own program.
Started as ``python -m atoll.deploy.supernode SECONDS`` followed by the options of ``flower-supernode``.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

LOOK = 0.01  # seconds between looks for an answer of our own site, in memory


def main() -> None:
    from importlib import import_module

    loop: Any = import_module("flwr.supernode.start_client_internal")
    program: Any = import_module("flwr.supernode.cli.flower_supernode")  # the package shadows its name
    places = "supernode.fleet_http_connection", "supercore.heartbeat", "supercore.corestate.in_memory_corestate"
    for (
        place
    ) in places:  # what it promises, what it keeps, and after twice how long a request nobody works on is given up
        module: Any = import_module(f"flwr.{place}")
        module.HEARTBEAT_DEFAULT_INTERVAL = 10  # seconds; the least that a SuperLink accepts
    retries: Any = import_module("flwr.supercore.retry.http_retry")
    retries.MAX_RETRY_DELAY = 2
    pace = float(sys.argv.pop(1))
    own = {name: getattr(time, name) for name in dir(time) if not name.startswith("_")}
    loop.time = SimpleNamespace(**{**own, "sleep": lambda seconds: time.sleep(pace if seconds > 1 else LOOK)})
    loop.pull_objects = partial(loop.pull_objects, initial_backoff=0.1, backoff_cap=1.0)
    program.warn_if_flwr_update_available = lambda **_: None  # no calls home
    program.flower_supernode()


if __name__ == "__main__":
    main()
