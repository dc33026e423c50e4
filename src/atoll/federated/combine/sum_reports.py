"""Add up what sites have counted under local differential privacy, without bias."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt, Le
from torch import Tensor

from atoll.core.message import Message
from atoll.federated.method import Combine, MergeContext, Reply
from atoll.privacy.local_reports import Oracle


@dataclass(frozen=True)
class SumReports(Combine):
    """Estimated counts of the sites' candidates, scaled from each site's group to all its people; or lists, by item.

    Args:
        privacy: epsilon of a report, as at the sites.
    """

    privacy: Annotated[float, Gt(0), Le(16)] = 4.0
    additive: ClassVar[bool] = True
    accepts: ClassVar[tuple[str, ...]] = ("counts",)

    @property
    def weighted(self) -> bool:
        return True

    def combine(self, replies: Iterable[Reply], context: MergeContext) -> Message:
        estimates: Tensor | None = None
        variance, lists = 0.0, dict[int, int]()
        for reply in replies:
            parts = reply.message.parts
            if "counts" in parts:
                support, reports = parts["counts"]["support"].numpy(), int(parts["counts"]["reports"])
                oracle, scale = Oracle(len(support), self.privacy), reply.num_samples / max(1, reports)
                one = torch.from_numpy(oracle.estimate(support, reports))[:-1] * scale
                estimates = one if estimates is None else estimates + one
                variance += oracle.variance(reports) * scale**2
            if "top" in parts:
                top = parts["top"]
                for item, count in zip(top["items"].tolist(), top["counts"].tolist(), strict=True):
                    if item >= 0:
                        lists[item] = lists.get(item, 0) + count
        if estimates is not None:
            return Message("estimates", {"estimates": {"counts": estimates, "variance": torch.tensor(variance)}})
        if lists:
            items, counts = torch.tensor(sorted(lists)), torch.tensor([lists[i] for i in sorted(lists)])
            return Message("estimates", {"lists": {"items": items, "counts": counts}})
        return Message("estimates")
