"""Local work that also tells which classes the site has rows of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from atoll.core.message import Message
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.method import LocalWork
from atoll.federated.visit import Result, Visit


@dataclass(frozen=True)
class SayingClasses(LocalWork):
    """The inner work's reply with the fact ``classes``: numbers of the classes among the site's training rows, rising.

    Args:
        inner: what the site does; it replies with ``delta``.
    """

    inner: LocalWork = LocalSGD()
    produces: ClassVar[str] = "delta"

    def run(self, visit: Visit) -> Result:
        result = self.inner.run(visit)
        y = visit.data.train.column("y")
        m = result.message
        return replace(result, message=Message(m.kind, m.parts, {**m.facts, "classes": y.unique().tolist()}))
