"""Sites that see different ranges of one feature: small values here, large ones there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atoll.core.errors import DataError, did_you_mean
from atoll.data.dataset import Dataset
from atoll.data.partition import Partitioner, Rows


@dataclass(frozen=True)
class FeatureSorted(Partitioner):
    """Rows are sorted by a feature and cut into equal shares; equal values keep their order. Needs no label.

    Args:
        feature: its name, or the number of a number in a row where features have no names.
    """

    feature: str = "0"

    def assign(self, data: Dataset, sites: int, seed: int) -> list[Rows]:
        x, names = data.column("x").flatten(1), data.info.feature_names
        if data.info.kind not in ("table", "image"):
            raise DataError(
                f"`feature_sorted` sorts rows of tables and images; `{data.info.name}` is neither. Use `iid`."
            )
        if self.feature in names:
            at = names.index(self.feature)
        elif self.feature.isdecimal() and int(self.feature) < x.shape[1]:
            at = int(self.feature)
        else:
            hint = did_you_mean(self.feature, names) or f" Give a number below {x.shape[1]}."
            raise DataError(f"`{data.info.name}` has no feature `{self.feature}`." + hint)
        order = np.argsort(x[:, at].numpy(), kind="stable")
        return [np.sort(rows) for rows in np.array_split(order, sites)]
