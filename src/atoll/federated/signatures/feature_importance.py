"""How much each feature matters to an ensemble of trees that a site grows on its own rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge

from atoll.core.errors import DataError
from atoll.core.streams import numpy_stream
from atoll.data.dataset import Dataset, Info
from atoll.federated.signatures.signature import Shares, Signature


@dataclass(frozen=True)
class FeatureImportance(Signature):
    """Impurity-based importance in a random forest (Breiman, 2001); of a window, summed over its times.

    Args:
        trees: of the forest.
        depth: of a tree, at most.
        rows: that a forest sees, at most; drawn at random.
    """

    trees: Annotated[int, Ge(1)] = 30
    depth: Annotated[int, Ge(1)] = 6
    rows: Annotated[int, Ge(1)] = 2000

    def size(self, info: Info) -> int:
        return info.shape[0] if info.kind == "series" else math.prod(info.shape)

    def measure(self, data: Dataset, seed: int) -> Shares:
        from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

        if data.info.kind not in ("table", "image", "series") or "y" not in data.columns:
            raise DataError(
                f"feature_importance needs features and a target, and `{data.info.name}` has none; use another "
                "`signature`."
            )
        drawn = numpy_stream(seed, "rows").permutation(len(data))[: self.rows]
        some = data.select(np.sort(drawn).tolist()).ready()
        x, y = some["x"].flatten(1).numpy(), some["y"].numpy()
        forest = RandomForestRegressor if some["y"].is_floating_point() else RandomForestClassifier
        grown = forest(self.trees, max_depth=self.depth, random_state=seed % 2**32).fit(x, y)
        found: Shares = grown.feature_importances_.reshape(self.size(data.info), -1).sum(1)
        return found
