"""Windows over time series: what a model sees, and what comes after it.

Windows are views of the series: a thousand of them take no more memory than the series. One that would reach from one
series into the next is no row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.core.errors import DataError
from atoll.data.dataset import Dataset, Info

Numbers = NDArray[np.int64]
NORMAL = ("normal", "anomalous")
"""Names of the classes 0 and 1 of windows (and rows) that are to be told apart."""


@dataclass(frozen=True, slots=True)
class OneSeries:
    """Values in the order of time.

    Attributes:
        values: ``[T, C]``; the first channel is what is forecast.
        ids: further columns of its windows, e.g. the number of the site.
        anomalous: ``[T]``, which times are known to be anomalous; None: nobody says.
    """

    values: NDArray[np.float32]
    ids: Mapping[str, int] = field(default_factory=dict)
    anomalous: NDArray[np.bool_] | None = None


def windows(
    series: Sequence[OneSeries], info: Info, *, window: int, horizon: int, test: float, stride: int = 1
) -> Dataset:
    """Rows ``x`` ``[C, window]``, and ``y`` ``[horizon]``: the next values of the first channel (one: a number).

    With ``horizon`` 0 there is nothing to forecast: ``y`` is 1 for a window with an anomalous time and 0 for others,
    and is absent where no series says what is anomalous.

    The last ``test`` of each series is held out: rows whose forecast (with horizon 0: whose window) lies in it are test
    rows, rows that reach into it are left out, and anomalous windows are test rows wherever they are. Column ``start``
    is the position of a window in its series.

    Raises:
        DataError: a series without a window to train on.
    """
    span, at = window + horizon, 0
    if (least := min(len(s.values) for s in series)) < span:
        raise _too_short(info, least, 0, window, horizon)
    values = torch.from_numpy(np.concatenate([s.values for s in series]))
    odd = torch.from_numpy(np.concatenate([_marks(s) for s in series])).unfold(0, window, 1).any(1).numpy()
    if horizon:
        odd = np.zeros_like(odd)
    rows, facts = [], dict[str, list[Numbers]]()
    for s in series:
        cut = len(s.values) - int(test * len(s.values))
        first = np.arange(0, len(s.values) - span + 1, stride)
        held = (first + (window if horizon else 0) >= cut) | odd[at + first]
        used = held | (first + span <= cut)
        if not (used & ~held).any():
            raise _too_short(info, len(s.values), len(s.values) - cut, window, horizon)
        own = {"held_out": held[used], "start": first[used]} | {n: np.full(used.sum(), i) for n, i in s.ids.items()}
        for name, column in own.items():
            facts.setdefault(name, []).append(column.astype(np.int64))
        rows.append(at + first[used])
        at += len(s.values)
    where, count = torch.from_numpy(np.concatenate(rows)), len(values) - span + 1
    columns = {"x": values.unfold(0, window, 1)[:count]}
    if horizon:
        ahead = values[window:, 0].unfold(0, horizon, 1)[:count]
        columns["y"] = ahead[:, 0] if horizon == 1 else ahead
    elif any(s.anomalous is not None for s in series):
        columns["y"] = torch.from_numpy(odd[:count]).long()
    for name, found in facts.items():
        columns[name] = torch.zeros(count, dtype=torch.int64).index_copy_(
            0, where, torch.from_numpy(np.concatenate(found))
        )
    return Dataset(columns, info, where)


def _too_short(info: Info, times: int, for_tests: int, window: int, horizon: int) -> DataError:
    ahead = f" and {horizon} to forecast" if horizon else ""
    return DataError(
        f"A series of `{info.name}` has {times:,} times, {for_tests:,} of them for tests, so there is no window of "
        f"{window} times{ahead} to train on; use a shorter `window`."
    )


def _marks(series: OneSeries) -> NDArray[np.bool_]:
    none = np.zeros(len(series.values), dtype=np.bool_)
    return none if series.anomalous is None else series.anomalous
