"""A group of a site's people reports prefixes of their items, each under local differential privacy, once."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Gt, Le
from torch import Tensor

from atoll.core.errors import AtollError, DataError
from atoll.core.message import Message
from atoll.core.streams import key, stream
from atoll.core.tree import Tree
from atoll.federated.method import LocalWork
from atoll.federated.share.prefix_trie import Plan, best, empty, frequent
from atoll.federated.visit import Result, Visit
from atoll.privacy.local_reports import Oracle


@dataclass(frozen=True)
class PrefixReports(LocalWork):
    """Round r asks group r of the site's rows, which no other round asks: so a row spends epsilon once in a run.

    While the trie is shared, the reply is the sum of the group's reports. Later the site goes on alone, from its own
    sums, and sends its list in the last round; one that missed a round then has none. Candidates are those of the trie
    and "none of them".

    Random bits are Philox numbers under a fresh 128-bit key from the operating system for every visit.

    Args:
        plan: the same as the share's.
        privacy: epsilon of each row.
        column: holds the items.
        test_seed: INSECURE. Reports from a seed that can be known, for tests; the ledger counts epsilon as infinite.
        allow_insecure_test_seed: must be True for ``test_seed``.
    """

    plan: Plan = Plan()
    privacy: Annotated[float, Gt(0), Le(16)] = 4.0
    column: str = "item"
    test_seed: int | None = None
    allow_insecure_test_seed: bool = False
    produces: ClassVar[str] = "counts"
    synchronous_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.test_seed is not None and not self.allow_insecure_test_seed:
            raise AtollError(
                "test_seed makes reports from which anybody can read the items. Remove it; a test that needs it sets "
                "allow_insecure_test_seed=True as well."
            )

    @property
    def epsilon(self) -> float:
        return self.privacy if self.test_seed is None else math.inf

    @property
    def data_dependent_size(self) -> bool:
        return True

    def run(self, visit: Visit) -> Result:
        plan, trie = self.plan, visit.replica["trie"]
        alone = int(trie["level"]) >= plan.shared
        own = visit.state.get("trie", trie) if alone else trie
        level = int(own["level"])
        if visit.round >= plan.levels or level >= plan.levels:
            return Result(Message("counts"), visit.state)
        candidates = plan.children(own)
        oracle = Oracle(len(candidates) + 1, self.privacy)
        values = self._values(visit, candidates, plan.bits - plan.length(level + 1))
        support = torch.from_numpy(oracle.support(values.numpy(), self._generator(visit)))
        if not alone:
            counts = {"support": support, "reports": torch.tensor(len(values))}
            return Result(Message("counts", {"counts": counts}))
        if visit.dry:
            last = plan.levels in (level + 1, visit.round + 1)  # a plan keeps no state
            return Result(Message("counts", {"top": empty(plan.k)} if last else {}), {"trie": own})
        return self._alone(visit, oracle, candidates, support, len(values), level + 1)

    def _alone(
        self, visit: Visit, oracle: Oracle, candidates: Tensor, support: Tensor, reports: int, level: int
    ) -> Result:
        scale = len(visit.data.train) / max(1, reports)
        estimates = torch.from_numpy(oracle.estimate(support.numpy(), reports))[:-1] * scale
        kept = frequent(estimates, scale * math.sqrt(oracle.variance(reports)), self.plan.k)
        trie: Tree = {"prefixes": candidates[kept], "level": torch.tensor(level)}
        parts = {"top": best(candidates, estimates, self.plan.k)} if level == self.plan.levels else {}
        return Result(Message("counts", parts), {"trie": trie})

    def _values(self, visit: Visit, candidates: Tensor, cut: int) -> Tensor:
        """The number of each person's candidate, the last for none, ``[n]``."""
        data, bits = visit.data.train, self.plan.bits
        if visit.dry:
            return torch.zeros(0, dtype=torch.int64)
        items = data.select(self.group(visit)).column(self.column)
        if items.dim() != 1 or items.is_floating_point() or (len(items) and not _fits(items, bits)):
            raise DataError(
                f"column `{self.column}` of `{data.info.name}` must hold whole numbers below 2^{bits}; give "
                "another `column`, or more `bits`"
            )
        prefix = items.long() >> cut
        sorted_, where = candidates.sort()
        at = torch.searchsorted(sorted_, prefix).clamp(max=len(candidates) - 1)
        return torch.where(sorted_[at] == prefix, where[at], len(candidates))

    def group(self, visit: Visit) -> Tensor:
        """The rows that report in this round; every row is in the group of one round."""
        order = torch.randperm(len(visit.data.train), generator=stream(visit.seed, "groups", visit.site.site))
        return order[visit.round : len(order) if visit.round < self.plan.levels else 0 : self.plan.levels]

    def _generator(self, visit: Visit) -> np.random.Generator:
        if self.test_seed is None:
            return np.random.Generator(np.random.Philox(key=secrets.randbits(128)))
        number = key(self.test_seed, "reports", visit.round, visit.site.site)
        return np.random.Generator(np.random.Philox(key=number))


def _fits(items: Tensor, bits: int) -> bool:
    return int(items.min()) >= 0 and int(items.max()) < 1 << bits
