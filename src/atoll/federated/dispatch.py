"""The server's end of visits that travel as messages: what to send to a site, and what its answer means.

The other end is :mod:`atoll.federated.remote`. A site that the server believes to be up to date gets the broadcasts
that it has not received, and nothing else; one that says it lacks some gets a snapshot.
"""

from __future__ import annotations

from atoll.core.errors import AtollError, MessageError, SiteFailed, one_line
from atoll.core.message import Message, encoded_size
from atoll.federated.method import Share
from atoll.federated.visit import Job, Outcome, Publication
from atoll.federated.wire import LACKS, Delivery, pack, unpack_outcome

FAILED = "failed"
"""The kind of an answer that says in a sentence why there is no other."""


def failed(error: str) -> Message:
    return Message(FAILED, {}, {"error": error})


class Dispatch:
    """Keeps the broadcasts that sites may still need, as long as replaying them is the cheaper way.

    Args:
        run: names the run in every request.
    """

    def __init__(self, share: Share, run: str) -> None:
        self.share, self.run = share, run
        self.version = -1
        self._book: dict[int, Delivery] = {}
        self._current: Publication | None = None
        self._held: dict[int, int] = {}
        """By site, the broadcast up to which it has surely come."""

    def publish(self, publication: Publication) -> None:
        """A new broadcast; every request from now on brings sites to it."""
        if not self.share.incremental:
            self._book.clear()
        if not self.share.incremental or self.version >= 0 or publication.round == 0:
            # after a resume nobody knows which broadcast came before this one: only snapshots lead to it
            self._book[publication.round] = Delivery(publication.round, publication.encoded, self.version)
        self.version, self._current = publication.round, publication
        if self.share.incremental:
            whole = encoded_size(self._snapshot().message)
            sizes = {r: encoded_size(d.message) for r, d in self._book.items()}
            while len(self._book) > 1 and sum(sizes.values()) > whole:
                del sizes[(first := next(iter(self._book)))], self._book[first]

    def request(self, job: Job, part: str | None = None, lacking: bool = False) -> Message:
        """What a site needs to do ``job``, or, with ``part``, to evaluate its model on that part of its rows.

        Args:
            lacking: it has answered that it lacks broadcasts.
        """
        return pack(job, self._deliveries(job, part is not None, lacking), self.version, self.run, part)

    def _deliveries(self, job: Job, evaluate: bool, lacking: bool) -> list[Delivery]:
        if not self.share.incremental:
            return [self._book[self.version]] if job.message is None or lacking else []
        missing = self._since(job.site) if evaluate else job.missing
        if missing is None or lacking or not all(r in self._book for r in missing):
            return [self._snapshot()]
        return [self._book[r] for r in missing]

    def _since(self, site: int) -> tuple[int, ...] | None:
        held = self._held.get(site, -1)
        later = tuple(r for r in self._book if r > held)
        unbroken = self._book[later[0]].after <= held if later else held == self.version
        return later if unbroken else None

    def _snapshot(self) -> Delivery:
        assert self._current is not None
        return Delivery(self.version, self.share.snapshot(self._current.replica), snapshot=True)

    def lacks(self, answer: Message) -> bool:
        """Whether the site wants the request again, with all that it may lack."""
        return answer.kind == LACKS

    def outcome(self, answer: Message | str, job: Job) -> Outcome:
        """What came of a visit; an answer that is none, or a sentence instead of one, is a failed visit."""
        if isinstance(answer, Message):
            try:
                outcome = unpack_outcome(answer, job, self.run)
            except AtollError as e:
                answer = str(e)
            else:
                self._held[job.site] = self.version
                return outcome
        return Outcome(job.site, None, error=answer or "no answer")

    def metrics(self, answer: Message | str, job: Job) -> dict[str, float]:
        """What a site's model scored; raises :class:`SiteFailed` when the answer does not say."""
        if isinstance(answer, Message):
            try:
                found = unpack_metrics(answer, job.site, self.run)
            except AtollError as e:
                answer = str(e)
            else:
                self._held[job.site] = self.version
                return found
        raise SiteFailed(f"The model of site {job.site} could not be evaluated: {answer or 'no answer'}")


def unpack_metrics(answer: Message, site: int, run: str) -> dict[str, float]:
    """The numbers that a site answers when it is asked to evaluate; raises :class:`MessageError`."""
    facts, found = answer.facts, answer.facts.get("metrics")
    if answer.kind != "metrics" or facts.get("run") != run or facts.get("site") != site or not isinstance(found, dict):
        raise MessageError(f"expected the site's metrics; got `{answer.kind[:40]}`")
    try:
        return {one_line(name, 200): float.fromhex(value) for name, value in found.items()}
    except (TypeError, ValueError, OverflowError) as e:
        raise MessageError("a metric is not a number") from e
