"""Local work around other local work, which says of itself all that the inner one says."""

from __future__ import annotations

from dataclasses import dataclass, replace

from atoll.federated.method import LocalWork


@dataclass(frozen=True)
class Around(LocalWork):
    """``inner`` with something before or after it; whoever changes what is declared says so in a property of its own.

    Args:
        inner: what a site does in a visit.
    """

    inner: LocalWork

    def over(self, rounds: int) -> LocalWork:
        return replace(self, inner=self.inner.over(rounds))

    @property
    def produces(self) -> str:  # type: ignore[override]
        return self.inner.produces

    @property
    def synchronous_only(self) -> bool:  # type: ignore[override]
        return self.inner.synchronous_only

    @property
    def tells(self) -> bool:  # type: ignore[override]
        return self.inner.tells

    @property
    def alternates(self) -> bool:  # type: ignore[override]
        return self.inner.alternates

    @property
    def data_dependent_size(self) -> bool:
        return self.inner.data_dependent_size

    @property
    def epsilon(self) -> float | None:
        return self.inner.epsilon

    @property
    def epsilon_of(self) -> str:
        return self.inner.epsilon_of
