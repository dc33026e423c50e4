"""Flower's simulation engine, running in the background: virtual SuperNodes whose ClientApps live in Ray actors.

Flower's ``run_simulation`` owns the control flow: it blocks its caller and starts the server in a thread. Here it is
the other way round. The engine's own loop (``run_api``) runs in a thread, and whoever holds a :class:`SuperNodes`
exchanges messages with it through an ordinary ``InMemoryGrid``. Flower looks for requests ten times a second, through
all of them for each node, and a grid asks for replies as often; here both are told when there is something to fetch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from logging import CRITICAL
from typing import Any

import ray
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import RUN_ID_NUM_BYTES, SUPERLINK_NODE_ID, TASK_ID_NUM_BYTES
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend
from flwr.server.superlink.fleet.vce.metrics import VceMetrics
from flwr.server.superlink.fleet.vce.vce_api import _register_node_info_stores, _register_nodes, run_api
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState, RunRecord
from flwr.server.superlink.linkstate.utils import generate_rand_int_from_bytes
from flwr.simulation.ray_transport.ray_actor import BasicActorPool, ClientAppActor
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.date import now
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from atoll.core.errors import RunError


class _Link(InMemoryLinkState):
    """Flower's link in memory, which also tells what has been stored, so that nobody has to search it."""

    def __init__(self) -> None:
        super().__init__(NoOpFederationManager(), ObjectStoreFactory().store())
        self.sent = threading.Event()
        self.answered: queue.Queue[str] = queue.Queue()
        self._unread: dict[int, list[Message]] = {}

    def store_message_ins(self, message: Message) -> str | None:
        with self.lock:
            stored: str | None = super().store_message_ins(message)
            if stored:
                self._unread.setdefault(message.metadata.dst_node_id, []).append(message)
        self.sent.set()
        return stored

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        """All that is new for the node (``limit`` spares a network what a process need not be spared)."""
        with self.lock:
            messages = self._unread.pop(node_id, [])
        for message in messages:
            message.metadata.delivered_at = now().isoformat()
        return messages

    def store_message_res(self, message: Message) -> str | None:
        stored: str | None = super().store_message_res(message)
        self.answered.put(message.metadata.reply_to_message_id)
        return stored


class _Stop(threading.Event):
    """Flower waits on its stop event between two looks for requests; a request ends the wait."""

    def __init__(self, sent: threading.Event) -> None:
        super().__init__()
        self._sent = sent

    def set(self) -> None:
        super().set()
        self._sent.set()

    def wait(self, timeout: float | None = None) -> bool:
        self._sent.wait(timeout)
        self._sent.clear()
        return self.is_set()


class _Actors(RayBackend):
    """Flower's actors, as many as we want; a Ray that was there before stays.

    When an actor dies, Ray starts it again and gives it its message once more: Flower puts a dead actor back among the
    idle ones, so the next message would fail for nothing.
    """

    def __init__(self, workers: int, gpus: float) -> None:
        self.pool: BasicActorPool | None = None
        self.ours = not ray.is_initialized()
        if self.ours:
            with _python_path():
                ray.init(num_cpus=workers, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        lasting = {"max_restarts": -1, "max_task_retries": 1}
        try:
            super().__init__({"client_resources": {"num_cpus": 1, "num_gpus": gpus, **lasting}})
            self.pool = BasicActorPool(ClientAppActor, self.client_resources, actor_kwargs={})
        except BaseException:
            self.terminate()
            raise
        self.pool.add_actors_to_pool(min(workers, self.pool.actors_capacity))

    def build(self, app_fn: Callable[[], ClientApp]) -> None:
        """The actors are there already."""
        self.app_fn = app_fn

    def end(self) -> None:
        """End the actors, whatever they are doing."""
        actors: list[Any] = [*self.pool.pool, *self.pool._future_to_actor.values()] if self.pool else []
        for actor in actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)

    def terminate(self) -> None:
        """What Flower calls at the end."""
        self.end()
        if self.ours:
            ray.shutdown()


class SuperNodes:
    """A running engine. Nodes have the numbers 0 to ``count - 1``, which their ClientApp knows as ``partition-id``.

    Args:
        app: pickled with every message to an actor (Flower's way), so it should be small.
        gpus: for each worker.
    """

    def __init__(self, count: int, workers: int, app: ClientApp, gpus: float = 0.0) -> None:
        self.count = count
        self._log_level = logging.getLogger("flwr").level
        logging.getLogger("flwr").setLevel(CRITICAL)  # what goes wrong in a visit is the visit's outcome
        run = Run.create_empty(generate_rand_int_from_bytes(RUN_ID_NUM_BYTES))
        run.primary_task_id = generate_rand_int_from_bytes(TASK_ID_NUM_BYTES)
        run.federation_id = NOOP_FEDERATION_ID
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run.run_id, SUPERLINK_NODE_ID
        self.link = _Link()
        self.link.run_ids[run.run_id] = RunRecord(run=run)
        self.link.task_store[run.primary_task_id] = Task(task_id=run.primary_task_id, run_id=run.run_id)
        factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
        factory.state_instance = self.link
        self.grid = InMemoryGrid(factory)
        self.grid.set_run(run)
        self._stop = _Stop(self.link.sent)
        self.load = _Load(app)
        try:
            self._actors = _Actors(workers, gpus)
        except Exception as e:
            logging.getLogger("flwr").setLevel(self._log_level)
            raise RunError(f"Flower's simulation engine does not start: {e}") from e
        mapping = _register_nodes(count, factory)
        self._ids = {partition: node for node, partition in mapping.items()}
        stores = _register_node_info_stores(mapping, run)
        parts = (self.load, lambda: self._actors, mapping, factory, stores, self._stop, VceMetrics())
        self._thread = threading.Thread(target=_run, args=parts, name="flower-engine", daemon=True)
        self._thread.start()

    @property
    def app(self) -> ClientApp:
        return self.load.app

    def send(self, node: int, kind: str, content: RecordDict) -> str:
        """Put a request to a node (``kind``: train, evaluate or query); returns its name."""
        (name,) = self.grid.push_messages([Message(content, self._ids[node], kind)])
        return str(name)

    def receive(self) -> dict[str, Message]:
        """Wait for answers; what has come, by the names of the requests."""
        while True:
            try:
                names = [self.link.answered.get(timeout=1.0)]
                break
            except queue.Empty:
                if not self._thread.is_alive():
                    raise RunError("Flower's simulation engine has ended; start the run again.") from None
        with contextlib.suppress(queue.Empty):
            while True:
                names.append(self.link.answered.get_nowait())
        return {m.metadata.reply_to_message_id: m for m in self.grid.pull_messages(names)}

    def close(self) -> None:
        self._stop.set()
        self._actors.end()
        self._thread.join()
        logging.getLogger("flwr").setLevel(self._log_level)


def _run(*parts: Any) -> None:
    """The engine's life. What ends it is noticed where somebody waits for an answer."""
    with contextlib.suppress(Exception):
        run_api(*parts)


class _Load:
    """Gives the app. Flower pickles it with every message, with what the app holds at that moment."""

    def __init__(self, app: ClientApp) -> None:
        self.app = app

    def __call__(self) -> ClientApp:
        return self.app


@contextlib.contextmanager
def _python_path() -> Iterator[None]:
    """Actors import what this program can import. They take over the environment of the process that starts Ray."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path, before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
