"""What runs in the actors of Flower's simulation engine: a ClientApp that answers for virtual sites.

Each process keeps one worker for all sites it serves. A site is built for each request from what it has kept, exactly
as after a restart of a real one: its state in the shared folder, and the version of its replica. Replicas of one
version have the same bits at every site, so each version is stored once.
"""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from atoll.core.errors import AtollError
from atoll.core.files import write_atomic
from atoll.core.message import NO_LIMITS, decode, detach, encode, seal, unseal
from atoll.core.message import Message as Ours
from atoll.core.tree import Parts
from atoll.federated.dispatch import failed
from atoll.federated.records import from_records, to_records
from atoll.federated.remote import RemoteSite
from atoll.federated.states import FileStates
from atoll.federated.visit import Setup
from atoll.federated.wire import VISIT, Delivery
from atoll.federated.worker import Worker

GRACE = 2.0  # seconds beyond the time limit before a process that does not stop by itself is ended


class SiteApp(ClientApp):
    """Flower sends it with every message, so all that it holds is where the rest can be found."""

    def __init__(self) -> None:
        super().__init__()
        self.setup: Any = None
        self.run, self.folder = "", Path()

    def serve(self, setup: Any, run: str, folder: Path) -> None:
        """Messages from now on belong to this run. ``setup`` refers to the :class:`Setup` in Ray's store."""
        self.setup, self.run, self.folder = setup, run, folder

    def __call__(self, message: Message, context: Context) -> Message:
        try:
            here, site = _here(self), int(context.node_config["partition-id"])
            said = here.answer(site, from_records(message.content, NO_LIMITS))
        except Exception as e:
            said = failed(str(e) if isinstance(e, AtollError) else f"{type(e).__name__}: {e}")
        return Message(to_records(said), reply_to=message)


_HERE: dict[str, Process] = {}
"""What this process keeps of the run that it serves. An actor forgets all but modules between two messages."""


def _here(app: SiteApp) -> Process:
    if app.run not in _HERE:
        _HERE.clear()
        _HERE[app.run] = Process(ray.get(app.setup), app.run, app.folder)
    return _HERE[app.run]


class Process:
    """The worker of one actor, and all that its sites share."""

    def __init__(self, setup: Setup, run: str, folder: Path) -> None:
        torch.set_num_threads(setup.threads)
        assert setup.state_folder is not None
        self.worker, self.run, self.folder = Worker(setup, FileStates(setup.state_folder)), run, folder
        self.initial = setup.method.share.initial(self.worker.site_model(None).model)
        self.latest: tuple[int, Parts] = -1, self.initial
        """The last replica that a site of this process had, and its version."""

    def answer(self, site: int, request: Ours) -> Ours:
        limit = self.worker.setup.timeout
        with _ended_after(limit + GRACE if limit and request.kind == VISIT else None):
            return VirtualSite(self, site).handle(request)


class VirtualSite(RemoteSite):
    """A site whose replica is stored by version: a pointer ``site3.7`` says that site 3 has version 7."""

    def __init__(self, process: Process, site: int) -> None:
        self._process = process
        super().__init__(process.worker, site, process.folder, process.run)

    def _receive(self, delivery: Delivery) -> None:
        """Broadcasts mean the same at every site: what another site of this process has worked out is taken over."""
        share, (version, replica) = self._process.worker.setup.method.share, self._process.latest
        new = delivery.round > self.version and (delivery.snapshot or delivery.after == self.version)
        if delivery.round == version and (new or not share.incremental):
            self._replica, self.version = replica, version
        else:
            super()._receive(delivery)
            self._process.latest = self.version, self._replica

    def _file(self, version: int) -> Path:
        return self._process.folder / f"replica.{version}.safetensors"

    def _pointers(self) -> dict[int, int]:
        """The version of every site's replica."""
        names = [p.name.removeprefix("site").split(".") for p in self._process.folder.glob("site*.*")]
        return {int(site): int(version) for site, version in names}

    def _store(self) -> None:
        """The pointer comes first: nobody removes a version that a site points to."""
        folder, old = self._process.folder, self._pointers().get(self.site)
        (folder / f"site{self.site}.{self.version}").touch()
        if old is not None and old != self.version:
            (folder / f"site{self.site}.{old}").unlink(missing_ok=True)
        if not self._file(self.version).exists():
            facts = {"run": self.run, "parts": list(self._replica)}
            write_atomic(self._file(self.version), encode(seal(Ours("replica", self._replica, facts))), durable=False)
        wanted = {self._file(v) for v in self._pointers().values()}
        for path in folder.glob("replica.*.safetensors"):
            if path not in wanted:
                path.unlink(missing_ok=True)

    def _stored(self) -> tuple[int, Parts]:
        version = self._pointers().get(self.site, -1) if self.worker.setup.method.share.incremental else -1
        if version == -1:
            return -1, self._process.initial
        if version == self._process.latest[0]:
            return self._process.latest
        try:
            kept = detach(unseal(decode(self._file(version).read_bytes(), NO_LIMITS)))
        except (OSError, AtollError):
            return -1, self._process.initial  # the server sends a snapshot when it hears that
        return version, {name: kept.parts.get(name, {}) for name in kept.facts["parts"]}


@contextlib.contextmanager
def _ended_after(seconds: float | None) -> Iterator[None]:
    """End this process if the block takes longer, even when it never comes back to Python; Ray starts it again."""
    if seconds is not None:
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        if seconds is not None:
            faulthandler.cancel_dump_traceback_later()
