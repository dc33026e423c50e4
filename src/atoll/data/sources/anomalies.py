"""Another source's rows, of which only the normal ones are trained on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Lt, MinLen

from atoll.core.errors import DataError, did_you_mean
from atoll.core.streams import numpy_stream
from atoll.data.dataset import Dataset
from atoll.data.source import Loaded, Source, fitted
from atoll.data.sources.sklearn_table import SklearnTable
from atoll.data.windows import NORMAL


@dataclass(frozen=True)
class Anomalies(Source):
    """Classes become ``normal`` and ``anomalous``; anomalous rows, and some normal ones, are held out for tests.

    All rows come from the source's training and test parts together.

    Args:
        source: of labelled rows.
        anomalous: the classes that are anomalous, by name (by number where they have none).
        test: fraction of the normal rows that are held out, drawn at random.
        seed: of the draw.
    """

    source: Source = field(default_factory=SklearnTable)
    anomalous: Annotated[tuple[str, ...], MinLen(1)] = ("malignant",)
    test: Annotated[float, Ge(0), Lt(1)] = 0.2
    seed: int = 0

    def load(self) -> Loaded:
        loaded = self.source.load()
        rows = loaded.train if loaded.test is None else _together(loaded.train, loaded.test)
        info = rows.info
        if info.kind == "text" or not info.num_classes or "y" not in rows.columns:
            raise DataError(f"`anomalies` needs classes, and `{info.name}` has none; use a labelled table or images.")
        names = info.class_names or tuple(map(str, range(info.num_classes)))
        for name in self.anomalous:
            if name not in names:
                raise DataError(f"`{info.name}` has no class `{name}`." + did_you_mean(name, names))
        y = torch.isin(rows.column("y"), torch.tensor([names.index(n) for n in self.anomalous]))
        normal = np.flatnonzero(~y.numpy())
        if not len(normal):
            raise DataError(
                f"Every row of `{info.name}` is anomalous, so there is nothing to learn; name fewer classes."
            )
        drawn = numpy_stream(self.seed, "anomalies").permutation(normal)[: round(self.test * len(normal))]
        held = y.clone()
        held[torch.from_numpy(drawn)] = True
        rows = rows.with_column("y", y.long()).with_column("held_out", held.long())
        rows = rows.about(replace(info, num_classes=2, class_names=NORMAL))
        if loaded.fit:
            rows = rows.about(fitted(rows.info, [rows.select((~held).nonzero().flatten())]))
        return Loaded(train=rows, fit=loaded.fit)


def _together(a: Dataset, b: Dataset) -> Dataset:
    """The rows of both, of the columns that both have."""
    columns = {n: torch.cat([a.column(n), b.column(n)]) for n in a.columns if n in b.columns}
    return Dataset(columns, a.info)
