"""Which items do most people have?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from atoll.core.errors import DataError
from atoll.data.dataset import Dataset, Info
from atoll.models.model import ModelBuilder, build_model
from atoll.models.top_items import ItemList, TopItems
from atoll.tasks.task import Batch, Task, network_at


@dataclass(frozen=True)
class HeavyHitters(Task):
    """Find the k most frequent values of a column of whole numbers.

    Args:
        info: of the data.
        network: ``top_items``, whose length is k.
        site_networks: the same for all sites.
        column: the item of each row.
    """

    info: Info
    network: ModelBuilder = TopItems()
    site_networks: tuple[ModelBuilder, ...] = ()
    column: str = "item"
    headline: ClassVar[str] = "f1"
    higher_is_better: ClassVar[bool] = True

    @property
    def outputs(self) -> int:
        return 1

    def model(self, seed: int, site: int | None = None) -> nn.Module:
        model = build_model(self.model_key(site), self.info, self.outputs, seed)
        if not isinstance(model, ItemList):
            raise DataError(f"heavy_hitters fills a list, not a {type(model).__name__}; use `model: top_items`.")
        return model

    def model_key(self, site: int | None = None) -> ModelBuilder:
        return network_at(site, self.network, self.site_networks)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Estimated counts of the rows' items ``[B]``."""
        out: Tensor = model(batch[self.column])
        return out

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """1 for a row whose item is not on the list."""
        return (self.predict(model, batch) == 0).float()

    def evaluate(self, model: nn.Module, data: Dataset) -> dict[str, float]:
        """``f1`` of the list against the k most frequent items of ``data``, and ``ncr``: the same with the most
        frequent item worth k points, the next k - 1, and so on."""
        assert isinstance(model, ItemList)
        k = len(model.items)
        best, found = top(data.column(self.column), k), set(model.items.tolist()) - {-1}
        hits = [item in found for item in best]
        worth = [k - i for i in range(len(best))]
        f1 = 2 * sum(hits) / max(1, len(best) + len(found))
        return {"f1": f1, "ncr": sum(w for w, hit in zip(worth, hits, strict=True) if hit) / max(1, sum(worth))}


def top(items: Tensor, k: int) -> list[int]:
    """The k most frequent values, most frequent first; of equal ones the smaller first."""
    values, counts = torch.unique(items, return_counts=True)
    return [int(v) for v in values[counts.argsort(descending=True, stable=True)[:k]]]
