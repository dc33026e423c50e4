"""Which values of a column a site has, and how often: labels, or a known group such as a region."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atoll.core.errors import DataError
from atoll.data.dataset import Dataset, Info
from atoll.federated.signatures.signature import Shares, Signature


@dataclass(frozen=True)
class Histogram(Signature):
    """Shares of a site's rows.

    Args:
        column: of classes (``y``), or of codes that have names.
    """

    column: str = "y"

    def size(self, info: Info) -> int:
        names = info.names.get(self.column, ())
        count = info.num_classes if self.column == "y" and info.kind != "text" else len(names)
        if not count:
            raise DataError(
                f"histogram needs a column of classes or named codes; `{self.column}` of `{info.name}` is none."
            )
        return count

    def measure(self, data: Dataset, seed: int) -> Shares:
        values, size = data.column(self.column).numpy(), self.size(data.info)
        if values.ndim != 1 or (len(values) and not 0 <= values.min() <= values.max() < size):
            raise DataError(f"Column `{self.column}` of `{data.info.name}` holds other values than its {size} names.")
        return np.bincount(values, minlength=size).astype(np.float64)
