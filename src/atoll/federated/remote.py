"""One site's end of the wire: it keeps its own replica and its own state, and answers requests.

The bits are those of every other backend: broadcasts go through the same ``share.receive``, visits through the same
:class:`~atoll.federated.worker.Worker`.
"""

from __future__ import annotations

from pathlib import Path

from atoll.core.errors import AtollError, BadReply, MessageError
from atoll.core.files import write_atomic
from atoll.core.message import NO_LIMITS, Message, decode, detach, encode, seal, unseal
from atoll.core.tree import Parts
from atoll.federated.states import FileStates
from atoll.federated.visit import decode_chain
from atoll.federated.wire import EVALUATE, LACKS, VISIT, Delivery, Request, hexed, pack_outcome, unpack
from atoll.federated.worker import Worker


class RemoteSite:
    """Answers for one site.

    Args:
        worker: with a federation in which only this site's rows need be real.
        folder: keeps the replica of an incremental share between processes.
        run: requests of other runs are refused.
    """

    def __init__(self, worker: Worker, site: int, folder: Path, run: str) -> None:
        self.worker, self.site, self.run = worker, site, run
        self._path = folder / "replica.safetensors"
        self.version, self._replica = self._stored()

    def handle(self, message: Message) -> Message:
        """The answer to a request.

        Raises:
            AtollError: a request that cannot be served, in a sentence that may go back to the server.
        """
        if message.kind not in (VISIT, EVALUATE):
            return self.worker.answer(self.site, message)
        request = unpack(message)
        if request.run != self.run or request.job.site != self.site:
            raise BadReply("the request is for another run or another site")
        if not self.receive(request):
            return Message(LACKS, {}, {"run": self.run, "site": self.site, "holds": self.version + 1})
        self._sweep(request.job.state_tag)
        if request.part is None:
            return pack_outcome(self.worker.run(request.job), request.job, self.run)
        metrics = self.worker.evaluate(self.site, request.job.state_tag, request.part)
        return Message("metrics", {}, {"run": self.run, "site": self.site, "metrics": hexed(metrics)})

    def receive(self, request: Request) -> bool:
        """Bring the replica up to date; whether that succeeded."""
        before = self.version
        for delivery in request.deliveries:
            self._receive(delivery)
        share = self.worker.setup.method.share
        if share.incremental and self.version != before:
            self._store()
        self.worker.publish(self._replica)
        instead = request.job.message is not None and not share.incremental
        return self.version == request.version or instead

    def _receive(self, delivery: Delivery) -> None:
        method = self.worker.setup.method
        if delivery.round <= self.version and method.share.incremental:
            return  # it came before
        if delivery.snapshot:
            message = delivery.message
        elif method.share.incremental and delivery.after != self.version:
            return  # it builds on one that never came here
        else:
            message = decode_chain(method.downlink, delivery.message)
        self._replica, self.version = method.share.receive(self._replica, detach(message)), delivery.round

    def _sweep(self, tag: str | None) -> None:
        """Only the committed state can be asked for again. A site that lost it cannot go on."""
        states = self.worker.states
        assert isinstance(states, FileStates)
        if tag is not None and not states.path(self.site, tag).exists():
            raise MessageError("this site no longer has the state that the server counts on; start the run again")
        keep = states.path(self.site, tag).name if tag is not None else ""
        for path in states.folder.glob(f"site{self.site}.*"):
            if path.name != keep:
                path.unlink(missing_ok=True)

    # ---------------------------------------------------------------- across processes

    def _store(self) -> None:
        facts = {"run": self.run, "version": self.version, "parts": list(self._replica)}
        write_atomic(self._path, encode(seal(Message("replica", self._replica, facts))))

    def _stored(self) -> tuple[int, Parts]:
        share = self.worker.setup.method.share
        initial = share.initial(self.worker.site_model(None).model)
        if not share.incremental or not self._path.exists():
            return -1, initial
        try:
            kept = detach(unseal(decode(self._path.read_bytes(), NO_LIMITS)))
        except AtollError:
            return -1, initial  # the server sends a snapshot when it hears that
        if kept.facts.get("run") != self.run:
            return -1, initial
        return int(kept.facts["version"]), {name: kept.parts.get(name, {}) for name in kept.facts["parts"]}
