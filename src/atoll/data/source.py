"""Where data comes from: a source loads a training part and, where the data set has one, a test part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.core.errors import DataError
from atoll.data.dataset import Dataset, Info
from atoll.data.tokenizers import Tokenizer

CHUNK = 4096
Numbers = NDArray[np.float64]
Moments = tuple[int, Numbers]
"""Values per feature, and their sums ``[F]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a source gives.

    Attributes:
        train: rows to share among sites; further columns may hold natural ids (a hospital, a writer, a file).
        test: rows that everybody reports on, or None when the data set has no such part.
        fit: mean and scale in ``info`` are not constants of the data set: they follow the training rows, and
            whoever takes rows out of ``train`` calls :func:`fitted` again, so held-out rows leave no trace.
        tokenizer: of text.
    """

    train: Dataset
    test: Dataset | None = None
    fit: bool = False
    tokenizer: Tokenizer | None = None


class Source(Protocol):
    """A frozen dataclass whose fields say what to read. File ``sources/<name>.py``.

    Must   same     two loads of the same files give the same rows in the same order
           compact  bytes stay bytes; normalisation is in ``info``
           tell     unusable input is a :class:`DataError` that says where and what to do; rows left out are
                    counted in ``info.skipped``
    """

    package: ClassVar[str] = "atoll.data.sources"

    def load(self) -> Loaded: ...


def fitted(info: Info, rows: Iterable[Dataset]) -> Info:
    """``info`` with mean and scale (and those of a regression target) of the given training rows.

    Tables are standardised feature by feature, images and series channel by channel. All that is needed from each data
    set is a count, a sum and a sum of squares, which are added in the order of the data sets: sites that send theirs to
    each other (``agreement.py``) come to the same bits without showing a row. A constant feature gets scale 1. Rows
    without a target tell about the inputs alone.
    """
    rows = list(rows)
    names = measured(rows[0]) if rows else ("x",)
    having = {n: [data for data in rows if n in data.columns] for n in names}
    mean = {n: average([moments(data, n) for data in having[n]]) for n in names}
    return with_moments(info, mean, {n: average([moments(data, n, mean[n]) for data in having[n]]) for n in names})


def standardised(train: Dataset, test: Dataset | None = None) -> Loaded:
    """Both parts with the mean and scale of the training part."""
    info = fitted(train.info, [train])
    return Loaded(train=train.about(info), test=test.about(info) if test is not None else None, fit=True)


def measured(data: Dataset) -> tuple[str, ...]:
    """The columns that mean and scale are taken of: inputs, and a regression target."""
    return ("x", "y") if data.info.num_classes is None and "y" in data.columns else ("x",)


def moments(data: Dataset, name: str, centre: Numbers | None = None) -> Moments:
    """How many values there are per feature (channel), and float64 sums of them; with ``centre``, of the squared
    differences from it. Two passes, so nothing cancels for far-off means.

    NumPy adds in one fixed order, whatever the number of threads.
    """
    shape = data.columns[name].shape[1:]
    groups, each = (shape[0] if shape else 1), math.prod(shape[1:])
    total, unit = np.zeros(groups), data.info.unit if name == "x" else 1.0
    for at in range(0, len(data), CHUNK):
        some = data.select(range(at, min(at + CHUNK, len(data)))).column(name)
        v = some.to(torch.float64).numpy().reshape(len(some), groups, each) * unit
        total += (v if centre is None else np.square(v - centre[:, None])).sum((0, 2))
    return len(data) * each, total


def average(parts: Iterable[Moments]) -> Numbers:
    """The mean over all parts, which are added in the given order."""
    count, total = 0, np.zeros(())
    for n, part in parts:
        count, total = count + n, total + part
    return total / max(count, 1)


def with_moments(info: Info, mean: Mapping[str, Numbers], variance: Mapping[str, Numbers]) -> Info:
    """``info`` with mean and scale (float32) from those of the columns :func:`measured`; several targets have one."""
    pairs = {}
    for name, m in mean.items():
        v = variance[name]
        if name == "y":
            m, v = m.mean(keepdims=True), v.mean(keepdims=True)
        scale = np.sqrt(v)
        scale = np.where(scale > 1e-12 * np.abs(m), scale, 1.0)
        pairs[name] = torch.from_numpy(m).float(), torch.from_numpy(scale).float()
    shape = {"table": (-1,), "graph": (-1,), "series": (-1, 1)}.get(info.kind, (-1, 1, 1))
    info = replace(info, mean=pairs["x"][0].view(shape), scale=pairs["x"][1].view(shape))
    if "y" in pairs:
        info = replace(info, target_mean=float(pairs["y"][0]), target_scale=float(pairs["y"][1]))
    return info


def stored(name: str, columns: Mapping[str, Tensor], info: Info) -> Dataset:
    """A data set after a last look: there are rows, and float columns hold no NaN or infinity."""
    data = Dataset(columns, info)
    if not len(data):
        left = ", ".join(f"{n:,} {why}" for why, n in info.skipped.items())
        raise DataError(f"`{name}` has no usable row{f' (left out: {left})' if left else ''}.")
    for column, values in columns.items():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise DataError(f"Column `{column}` of `{name}` holds NaN or infinite numbers; clean or drop those rows.")
    return data
