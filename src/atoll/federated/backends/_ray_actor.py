"""What runs in an actor of Ray, and how a setup gets there."""

from __future__ import annotations

import io
import pickle
import socket
import sys
import sysconfig
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atoll.core.errors import RunError
from atoll.core.message import NO_LIMITS, decode, detach, encode
from atoll.core.tree import moved
from atoll.data.dataset import Dataset, Info
from atoll.federated.backends.inline import answer
from atoll.federated.backends.process_pool import _evaluate
from atoll.federated.states import FileStates
from atoll.federated.visit import Job, Outcome, Setup
from atoll.federated.worker import Worker

SMALL = 4096  # bytes: smaller arrays travel within the pickle, where they cost less than an entry of their own


class Host:
    """What an actor does: it holds one worker, and hands it the replica that a call names."""

    def open(self, shared: list[Any], beacon: Path, token: str) -> tuple[bool, str]:
        """Take up a run. Returns whether this machine sees the folder of the states, and the machine's name."""
        setup: Setup = pickle.loads(shared[0], buffers=shared[1:])
        torch.set_num_threads(setup.threads)
        assert setup.state_folder is not None
        seen = beacon.exists() and beacon.read_text() == token
        self.worker, self.version = Worker(setup, FileStates(setup.state_folder)), -1
        return seen, socket.gethostname()

    def do(self, version: int, replica: list[Any], orders: list[tuple[Any, ...]]) -> tuple[float, list[Any]]:
        """Do each order with the replica that ``version`` names; returns seconds in all, and an answer for each."""
        self._receive(version, replica)
        started = time.perf_counter()
        answers = [getattr(self, what)(*about) for what, *about in orders]
        return time.perf_counter() - started, answers

    def _visit(self, job: Job, own: bytes | None) -> tuple[Outcome, Any]:
        """The outcome, and its message apart from it as wire bytes, or None."""
        if own is not None:
            job = replace(job, message=detach(decode(own, NO_LIMITS)))
        outcome = self.worker.run(job)
        wire = np.frombuffer(encode(outcome.message), np.uint8) if outcome.message is not None else None
        return replace(outcome, message=None), wire

    def _evaluate(self, site: int, tag: str | None, part: str) -> dict[str, float] | str:
        return _evaluate(self.worker, site, tag, part)

    def _ask(self, site: int, request: bytes) -> bytes | str:
        said = answer(self.worker, site, decode(request, NO_LIMITS))
        return said if isinstance(said, str) else bytes(encode(said))

    def _receive(self, version: int, replica: list[Any]) -> None:
        if version == self.version or not replica:
            return
        import ray

        whole = decode(ray.get(replica[0]), NO_LIMITS)  # copies: the store's memory is read-only
        parts = {name: whole.parts.get(name, {}) for name in whole.facts["parts"]}  # empty trees leave no tensor
        self.worker.publish(moved(parts, self.worker.setup.device))
        self.version = version


def share(setup: Setup) -> list[Any]:
    """The setup as a pickle and the arrays that it refers to. From the object store, :class:`Host` reads data sets
    in place; they are read-only. Code that is not installed as a package (a script, a notebook) travels too."""
    from ray import cloudpickle

    buffers: list[Any] = []
    arrays: dict[int, tuple[Tensor, Any]] = {}  # many data sets own one storage

    def apart(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes >= SMALL:
            buffers.append(np.frombuffer(raw, np.uint8))
        return raw.nbytes < SMALL

    def array(t: Tensor) -> Any:
        if id(t) not in arrays:
            plain = t.device.type == "cpu" and t.dtype != torch.bfloat16
            arrays[id(t)] = t, (t.detach().contiguous().numpy() if plain else t)
        return arrays[id(t)][1]

    class Pickler(cloudpickle.CloudPickler):
        def reducer_override(self, obj: Any) -> Any:
            if type(obj) is Dataset:
                columns = {name: array(t) for name, t in obj.columns.items()}
                return _dataset, (columns, obj.info, None if obj.rows is None else array(obj.rows))
            if isinstance(obj, type) or callable(obj):
                _by_value(getattr(obj, "__module__", None), registered)
            return super().reducer_override(obj)

    out, registered = io.BytesIO(), list[Any]()
    try:
        Pickler(out, protocol=5, buffer_callback=apart).dump(setup)
    except (pickle.PicklingError, TypeError, AttributeError) as e:
        raise RunError(f"The task, the method or the data cannot be sent to Ray's actors: {e}") from e
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)
    return [np.frombuffer(out.getbuffer(), np.uint8), *buffers]


def _dataset(columns: dict[str, Any], info: Info, rows: Any) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only: so are a federation's rows, by agreement
        tensors = {name: torch.as_tensor(a) for name, a in columns.items()}
        return Dataset(tensors, info, None if rows is None else torch.as_tensor(rows))


def _by_value(name: str | None, registered: list[Any]) -> None:
    """Let a module's code travel with what refers to it, unless every worker can import it by name."""
    from ray import cloudpickle

    module = sys.modules.get(name or "")
    origin = getattr(module, "__file__", None)
    if module is None or origin is None or name == "__main__" or module in registered:
        return  # built in, or the pickler sees to it
    ours = [str(Path(__file__).parents[2]), *sysconfig.get_paths().values()]
    if not any(Path(origin).is_relative_to(place) for place in ours):
        cloudpickle.register_pickle_by_value(module)
        registered.append(module)
