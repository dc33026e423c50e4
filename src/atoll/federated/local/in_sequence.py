"""Any local work on a stream of tasks: a visit sees the rows of its round alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from atoll.data.class_stream import ClassStream
from atoll.federated.local._around import Around
from atoll.federated.visit import Result, Visit
from atoll.tasks.classification import expect_classes, num_classes


@dataclass(frozen=True)
class InSequence(Around):
    """``inner`` on the rows that the stream shows in the visit's round.

    What the server hears of a site's size is that of all its rows.

    Args:
        inner: what a site does in a visit.
        stream: which classes it sees when.
    """

    stream: ClassStream = ClassStream()

    def run(self, visit: Visit) -> Result:
        expect_classes(visit.data.train, num_classes(visit.data.train.info), "a stream of classes")
        rows = self.stream.at(visit.data, visit.site.site, visit.seed, visit.round)
        return self.inner.run(replace(visit, data=rows))
