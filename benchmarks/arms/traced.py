"""Runs one of Atoll's deployment programs and writes down when each request passes where.

    python traced.py FILE server|join|superlink|supernode ARGUMENTS...

Each line of FILE is ``{"t": seconds, "mark": ..., "pid": ..., ...}``; all processes of a machine share one clock. The
programs themselves know nothing of this.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

FILE, PROGRAM = sys.argv[1], sys.argv[2]


def mark(what: str, **about: Any) -> None:
    with open(FILE, "a") as f:
        f.write(json.dumps({"t": time.time(), "mark": what, "pid": os.getpid(), **about}) + "\n")


def around(owner: Any, name: str, before: Callable[..., None], after: Callable[..., None]) -> None:
    """Call ``before`` with the arguments of a function, and ``after`` with its result and them."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        result = inner(*args, **kwargs)
        after(result, *args, **kwargs)
        return result

    setattr(owner, name, outer)


def nothing(*_: Any, **__: Any) -> None:
    """No mark here."""


def _children_too(module: Any) -> None:
    """Flower's programs, which ours starts, are traced as well."""
    launch = module.launch

    def traced(command: list[Any], *more: Any) -> Any:
        at = command.index("-m")
        program = command[at + 1].rsplit(".", 1)[1]
        return launch([*command[:at], __file__, FILE, program, *command[at + 2 :]], *more)

    module.launch = traced


def server() -> None:
    from atoll.deploy import server, workers

    mark("server")
    _children_too(server)
    supervisor, board, deployed = server.Supervisor, workers.Switchboard, workers.DeployedWorkers
    around(supervisor, "_connect", nothing, lambda _, self: mark("nodes", nodes=self._node))
    around(deployed, "publish", lambda _, publication: mark("publish", round=publication.round), nothing)
    around(supervisor, "send", _sending, lambda _, __, site, *___: mark("sent", site=site))
    around(board, "_take", lambda _, call, found: mark("taken", site=call.site), nothing)
    _atoll("server")


def _sending(_: Any, site: int, message: Any, ttl: float) -> None:
    mark("send", site=site, kind=message.kind)


def join() -> None:
    from atoll.deploy import join, link
    from atoll.deploy.site import SiteProgram

    mark("join")
    _children_too(join)
    around(link.Taken, "_read", lambda self, *_: mark("claimed", node=self.node), lambda *_: mark("read"))
    around(SiteProgram, "answer", nothing, lambda *_: mark("worked"))
    around(link.Taken, "answer", nothing, lambda *_: mark("handed"))
    _atoll("join")


def superlink() -> None:
    from atoll.deploy.superlink import main

    mark("superlink")
    _rest()
    main()


def supernode() -> None:
    from importlib import import_module

    from atoll.deploy.supernode import main

    loop: Any = import_module("flwr.supernode.start_client_internal")
    mark("supernode")
    pull = loop._pull_and_store_message

    def pulled(*args: Any, receive: Any, **kwargs: Any) -> Any:
        def received() -> Any:
            if (got := receive()) is not None:
                mark("pull", node=got[0].metadata.dst_node_id)
            return got

        run = pull(*args, receive=received, **kwargs)
        if run is not None:
            mark("pulled")
        return run

    loop._pull_and_store_message = pulled
    around(loop, "_push_messages", nothing, lambda *_, **__: mark("pushed"))
    _rest()
    main()


def _rest() -> None:
    sys.argv = [sys.argv[0], *sys.argv[3:]]


def _atoll(command: str) -> None:
    from atoll.cli import main

    sys.argv = ["atoll", command, *sys.argv[3:]]
    main()


if __name__ == "__main__":
    {"server": server, "join": join, "superlink": superlink, "supernode": supernode}[PROGRAM]()
