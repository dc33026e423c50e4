"""Columns of tensors, and who owns which rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from atoll.core.errors import DataError, did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """What a data set is about.

    Attributes:
        kind: ``"image"``, ``"table"``, ``"text"``, ``"graph"`` (rows are nodes; see ``graph.py``) or ``"series"`` (rows
            are windows; see ``windows.py``).
        shape: of one input row as the model sees it, e.g. ``(1, 28, 28)``, ``(30,)``, ``(64,)`` tokens, ``(4, 28)`` for
            four channels at 28 times.
        num_classes: for classification, else None. For text: the size of the vocabulary.
        class_names: what the classes of ``y`` are called, by number (of labelled text too).
        categories: of text columns of a table that became one feature per value: those values. The features are
            called ``column=value``.
        names: for further columns that hold codes: what each code stands for, ``{"site": ("Lyon", "Oslo")}``.
        mean, scale: a uint8 or raw input ``v`` becomes ``(v * unit - mean) / scale``; tensors or floats that
            broadcast against a row.
        unit: 1/255 for byte images, else 1.
        target_mean, target_scale: of a regression target in the training rows, in its own unit. ``y`` is
            stored as it is; a task that wants unit variance applies them.
        targets: numbers to predict per row: of a series, how many steps ahead.
        skipped: rows that could not be read, by reason.
    """

    name: str
    kind: str = "table"
    shape: tuple[int, ...] = ()
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    feature_names: tuple[str, ...] = ()
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mean: Tensor | float = 0.0
    scale: Tensor | float = 1.0
    unit: float = 1.0
    target_mean: float = 0.0
    target_scale: float = 1.0
    targets: int = 1
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Rows say little without each other, as the nodes of a graph: a batch holds all of them, in their order."""
        return self.kind == "graph"


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows of equal length columns. Storage may be compact (uint8); :meth:`ready` gives what a model takes.

    ``columns["x"]`` is the input and ``columns["y"]`` the target (int64 classes or float32 values; absent for
    unlabelled data and for text, whose input is its own target). Further columns (ids, domains) are allowed;
    where there is one named ``held_out``, rows that have 1 there are for tests alone.
    ``rows`` picks rows of the shared columns, so that many sites own one storage.
    """

    columns: Mapping[str, Tensor]
    info: Info
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if len({len(c) for c in self.columns.values()}) > 1:
            sizes = ", ".join(f"{name}: {len(c)}" for name, c in self.columns.items())
            raise DataError(f"The columns of `{self.info.name}` differ in length ({sizes}).")

    def __len__(self) -> int:
        return len(self.rows) if self.rows is not None else len(next(iter(self.columns.values())))

    def select(self, rows: Tensor | Sequence[int]) -> Dataset:
        """The given rows (positions within this data set), sharing storage."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        return replace(self, rows=self.rows[rows] if self.rows is not None else rows)

    def column(self, name: str) -> Tensor:
        """One column as stored, in row order."""
        if name not in self.columns:
            raise DataError(f"`{self.info.name}` has no column `{name}`." + did_you_mean(name, self.columns))
        return _pick(self.columns[name], self.rows)

    def with_column(self, name: str, values: Tensor) -> Dataset:
        """The same rows with one more column, e.g. embeddings ``[N, D]`` to partition by."""
        if len(values) != len(self):
            raise DataError(f"Column `{name}` has {len(values):,} rows; `{self.info.name}` has {len(self):,}.")
        columns = {n: _pick(c, self.rows) for n, c in self.columns.items()}
        return replace(self, columns={**columns, name: values}, rows=None)

    def without_column(self, name: str) -> Dataset:
        """The same rows, sharing storage, as if the column had never been there."""
        return replace(self, columns={n: c for n, c in self.columns.items() if n != name})

    def about(self, info: Info) -> Dataset:
        """The same rows described by ``info``, e.g. with another mean and scale."""
        return replace(self, info=info)

    def ready(self, order: Tensor | None = None, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """All columns, rows in ``order`` (positions; default: all), inputs normalised, on ``device``."""
        rows = self.rows
        if order is not None:
            rows = order if rows is None else rows[order]
        out = {}
        for name, c in self.columns.items():
            t = _pick(c, rows).to(device)
            out[name] = self._normalise(t, fresh=t is not c) if name == "x" else t
        return out

    def batches(self, batch_size: int, device: torch.device | str = "cpu") -> Iterator[dict[str, Tensor]]:
        """Batches in row order, for evaluation; memory stays at one batch. Rows that belong together are one batch."""
        if self.info.whole:
            yield self.ready(device=device)
            return
        for at in range(0, len(self), batch_size):
            yield self.ready(torch.arange(at, min(at + batch_size, len(self))), device)

    def _normalise(self, x: Tensor, fresh: bool) -> Tensor:
        """``(x * unit - mean) / scale`` as one product and one sum; in place when ``x`` is a copy."""
        if self.info.kind == "text":
            return x.long()
        i = self.info
        fresh = fresh or x.dtype != torch.float32  # .float() makes a copy
        x = x.float()
        mean = i.mean.to(x.device) if isinstance(i.mean, Tensor) else i.mean
        scale = i.scale.to(x.device) if isinstance(i.scale, Tensor) else i.scale
        factor, offset = i.unit / scale, -mean / scale
        if isinstance(factor, float) and isinstance(offset, float) and factor == 1.0 and offset == 0.0:
            return x
        return x.mul_(factor).add_(offset) if fresh else x * factor + offset


def _pick(column: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of a column. ``index_select`` is several times faster than ``column[rows]`` on byte images."""
    return column if rows is None else column.index_select(0, rows)


@dataclass(frozen=True, slots=True)
class SiteData:
    """One site's rows, in disjoint parts.

    Attributes:
        unlabelled: training rows without a column ``y``, for work that learns from inputs alone; all other work sees
            ``train`` and nothing else. None: every training row has its label.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    unlabelled: Dataset | None = None


@dataclass(frozen=True, slots=True)
class Federation:
    """All that a simulation knows. Site i sees ``sites[i]``; the server ``public`` and, to report, ``test``.

    Attributes:
        labels: facts for the report (partitioner, heterogeneity); JSON-able.
        tokenizer: of text, an ``atoll.data.tokenizers.Tokenizer``; part of what makes a model usable.
    """

    sites: tuple[SiteData, ...]
    test: Dataset
    public: Dataset | None = None
    info: Info = field(default_factory=lambda: Info(name="empty"))
    labels: Mapping[str, object] = field(default_factory=dict)
    tokenizer: object | None = None
