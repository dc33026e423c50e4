"""The cluster and its actors: started or joined, brought to their size, ended."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import shutil
import signal
import socket
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.core.errors import RunError, first_line
from atoll.federated.backends._ray_actor import Host
from atoll.federated.backends.process_pool import PREFIX, _sweep
from atoll.federated.visit import Setup

if TYPE_CHECKING:
    from atoll.federated.backends.ray import Ray, RayWorkers


@dataclass(slots=True, eq=False)
class Seat:
    """An actor. ``calls``: the tickets of each, the current one first; ``since``: when that began, or the actor got
    ready; ``ready``: it has taken up the run; ``sees``: its machine sees the folder of the states."""

    handle: Any
    calls: dict[Any, list[int]] = field(default_factory=dict)
    since: float = 0.0
    ready: bool = False
    sees: bool = True
    machine: str = ""


class Crew:
    """Actors that may outlive a run, so that many runs pay once for their start.

    Example:
        >>> with Crew(Ray(workers=4)) as crew:
        ...     for seed in range(10):
        ...         rows = list(federate(task, federation, fedavg(), rounds=20, seed=seed, backend=crew))
    """

    def __init__(self, about: Ray) -> None:
        try:
            import ray
        except ImportError as e:
            raise RunError("The backend `ray` needs Ray: `pip install atoll[ray]`.") from e
        self.ray: Any = ray
        self.about, self.seats, self.folder = about, list[Seat](), Path()
        self._ours = False
        self._actor: Any = None

    def open(self, setup: Setup) -> RayWorkers:
        from atoll.federated.backends.ray import RayWorkers

        return RayWorkers(setup, self, lasting=True)

    def muster(self, setup: Setup) -> None:
        """Connect, and bring the crew to its size; does nothing when both are so."""
        if self._actor is None:
            self._connect(setup)
        while len(self.seats) < self.size:
            self.seats.append(Seat(self._actor.remote()))

    def _connect(self, setup: Setup) -> None:
        _sweep(Path(tempfile.gettempdir()))
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        about = self.about
        if not self.ray.is_initialized():  # else the program that we are part of has chosen one
            self._ours = True
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            options: dict[str, Any] = {"address": about.address}
            if about.address is None:
                workers = about.workers or os.cpu_count() or 1
                options = {"address": "local", "num_cpus": workers * setup.threads, "include_dashboard": False}
                if len(str(self.folder)) < 40:  # it holds sockets, whose paths must stay under 107 characters
                    options["_temp_dir"] = str(self.folder)
            try:
                if about.address not in (None, "auto"):
                    host, _, port = str(about.address).rpartition(":")
                    socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would try for minutes
                with _quietly():
                    self.ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, RuntimeError, ValueError, OSError) as e:
                what = "No Ray cluster could be started" if about.address is None else f"Cannot join {about.address!r}"
                raise RunError(f"{what}: {first_line(e)}") from e
        has = self.ray.cluster_resources()
        self.size = about.workers or max(1, int(has.get("CPU", 1)) // setup.threads)
        gpus = 0.0
        if setup.device.startswith("cuda"):
            if not has.get("GPU"):
                raise RunError("`device: cuda` needs GPUs, and the Ray cluster has none; use `device: cpu`.")
            gpus = about.gpus or min(1.0, math.floor(has["GPU"] / self.size * 1e4) / 1e4)
        remote = self.ray.remote(num_cpus=setup.threads, num_gpus=gpus, max_restarts=0, max_task_retries=0)
        self._actor = remote(Host)

    def dismiss(self, seat: Seat) -> None:
        self.ray.kill(seat.handle)
        self.seats.remove(seat)

    def close(self) -> None:
        for seat in list(self.seats):
            with contextlib.suppress(Exception):  # the cluster itself may be gone
                self.ray.kill(seat.handle)
        self.seats.clear()
        if self._ours:
            with _quietly():
                self.ray.shutdown()
        self._ours, self._actor = False, None
        if self.folder.name:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings of Ray's own code, and with the program's own answer to SIGTERM afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = signal.getsignal(signal.SIGTERM)
        try:
            yield
        finally:
            gc.collect()  # files that Ray forgot to close warn when they are collected: now
            with contextlib.suppress(ValueError, TypeError):  # not in the main thread; not set from Python
                signal.signal(signal.SIGTERM, before)
