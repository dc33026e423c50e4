"""Time series in a table: a row is a time at a site, a window of rows is an example."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Lt
from numpy.typing import NDArray

from atoll.core.errors import DataError, did_you_mean
from atoll.data.columns import Columns, apply, learn
from atoll.data.dataset import Dataset
from atoll.data.source import Loaded, Source, standardised
from atoll.data.sources.table import read_columns
from atoll.data.windows import NORMAL, OneSeries, windows


@dataclass(frozen=True)
class Series(Source):
    """Windows of ``window`` times, each with the next ``horizon`` values of the target.

    The channels of a window are the target and the features. Rows are put in the order of time; they are taken to be
    equally far apart. The last part of every series is for tests.

    Args:
        path: a file as for ``table``: CSV, TSV, Parquet or JSON Lines.
        time: the column that orders rows: numbers, or dates such as 2024-05-31 or 2024-05-31T12:00.
        target: the column to forecast, numbers.
        site: a column that names each row's natural owner; kept as column ``site``.
        series: a column that tells apart several series of a site (products of a shop).
        features: further channels; default: every numeric column that has no other role.
        label: for anomaly detection (``horizon: 0``), a column with 1 where a time is known to be anomalous, else 0.
        window: times that a model sees.
        horizon: times to forecast; 0: none.
        stride: times between the beginnings of windows.
        test: fraction of each series, its end, that is for tests.
        categorical: text in a named feature: one channel per value, or an error.
    """

    path: str
    time: str
    target: str
    site: str | None = None
    series: str | None = None
    features: tuple[str, ...] | None = None
    label: str | None = None
    window: Annotated[int, Ge(1)] = 28
    horizon: Annotated[int, Ge(0)] = 1
    stride: Annotated[int, Ge(1)] = 1
    test: Annotated[float, Ge(0), Lt(1)] = 0.2
    categorical: Literal["one_hot", "refuse"] = "refuse"

    def load(self) -> Loaded:
        columns, name = read_columns(self.path), Path(self.path).name
        if self.label is not None and self.horizon:
            raise DataError("`label` says what is anomalous and goes with `horizon: 0`; leave one of them out.")
        roles = [c for c in (self.time, self.series, self.label) if c is not None]
        for role in roles:
            if role not in columns:
                raise DataError(f"`{name}` has no column `{role}`." + did_you_mean(role, columns))
        rows = self._values({c: v for c, v in columns.items() if c not in roles}, name)
        names = (self.target, *rows.info.feature_names)
        values = np.concatenate([rows.column("y").numpy()[:, None], rows.column("x").numpy()], 1)
        times = np.array([_time(v, self.time, name) for v in columns[self.time]])
        marks = self._marks(columns[self.label], name) if self.label else None
        owner = rows.column("site").numpy() if self.site else np.zeros(len(values), dtype=np.int64)
        _, which = np.unique([str(v) for v in columns[self.series]] if self.series else owner, return_inverse=True)
        found = []
        for site, one in np.unique(np.stack([owner, which], 1), axis=0):
            at = np.flatnonzero((owner == site) & (which == one))
            at = at[np.argsort(times[at], kind="stable")]
            if (twice := np.flatnonzero(np.diff(times[at]) == 0)).size:
                raise DataError(
                    f"Rows {at[twice[0]] + 1} and {at[twice[0] + 1] + 1} of {name} are of the same time and series; "
                    "name the columns that tell series apart in `site` and `series`."
                )
            ids = {"site": int(site)} if self.site else {}
            found.append(OneSeries(values[at], ids, marks[at] if marks is not None else None))
        info = replace(
            rows.info, kind="series", shape=(len(names), self.window), feature_names=names,
            targets=max(1, self.horizon), num_classes=2 if self.label else None,
            class_names=NORMAL if self.label else (),
        )  # fmt: skip
        cut = {"window": self.window, "horizon": self.horizon, "stride": self.stride}
        return standardised(windows(found, info, test=self.test, **cut))

    def _values(self, columns: Columns, name: str) -> Dataset:
        """Target, features and site of each row, in the order of the file."""
        alone = all(c in (self.target, self.site) for c in columns)
        schema = learn(
            columns, name=Path(self.path).stem, target=self.target,
            features=() if self.features is None and alone else self.features, site=self.site, task="regression",
            categorical=self.categorical, missing="refuse",
        )  # fmt: skip
        return apply(schema, columns, name)

    def _marks(self, column: Any, name: str) -> NDArray[np.bool_]:
        said = [str(v).strip().removesuffix(".0") for v in column]
        odd = next((i for i, v in enumerate(said) if v not in ("0", "1")), None)
        if odd is not None:
            raise DataError(f"Column `{self.label}` of {name} has {said[odd]!r} in row {odd + 1}; it says 0 or 1.")
        return np.array([v == "1" for v in said])


def _time(value: Any, column: str, name: str) -> float:
    """Numbers as they are; dates as seconds, those without a time zone in one that has no daylight saving."""
    with contextlib.suppress(TypeError, ValueError):
        if math.isfinite(number := float(value)):
            return number
    with contextlib.suppress(ValueError):
        when = datetime.fromisoformat(str(value).strip())
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    raise DataError(
        f"Column `{column}` of {name} has {str(value)[:40]!r}, neither a number nor a date such as 2024-05-31."
    )
