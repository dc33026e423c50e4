"""Raw columns of a table (lists of whatever a file held) to tensors, with errors that name column and row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from atoll.core.errors import DataError, did_you_mean
from atoll.data.dataset import Dataset, Info
from atoll.data.source import Loaded, standardised, stored

Columns = Mapping[str, Sequence[Any]]
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
MAX_CATEGORIES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """How columns become features, target and owner. Learned from training rows, applied to test rows.

    Attributes:
        features: column names; for one that holds categories, its values in ``categories``.
        classes: names of the target's classes, or None for regression.
    """

    name: str
    target: str
    features: tuple[str, ...]
    categories: Mapping[str, tuple[str, ...]]
    classes: tuple[str, ...] | None
    site: str | None
    owners: tuple[str, ...]
    missing: Literal["drop", "refuse"]


def learn(
    columns: Columns, *, name: str, target: str, features: tuple[str, ...] | None, site: str | None,
    task: Literal["classification", "regression"], categorical: Literal["one_hot", "refuse"],
    missing: Literal["drop", "refuse"],
) -> Schema:  # fmt: skip
    """The schema of a table; ``features`` None means every numeric column but target and site."""
    for wanted in (target, *(features or ()), *([site] if site else [])):
        if wanted not in columns:
            raise DataError(f"`{name}` has no column `{wanted}`." + did_you_mean(wanted, columns))
    if target in (features or ()):
        raise DataError(f"`{target}` is the target of `{name}` and cannot be a feature too.")
    bad = {c: _first_text(columns[c]) for c in (features or columns) if c not in (target, site)}
    if features is None:
        features = tuple(c for c, text in bad.items() if text is None and not all(map(_missing, columns[c])))
        if not features:
            raise DataError(f"`{name}` has no numeric column besides `{target}`; name the `features`.")
    categories: dict[str, tuple[str, ...]] = {}
    for c in features:
        text = bad.get(c)
        if text is None:
            continue
        if categorical == "refuse":
            raise DataError(
                f"Column `{c}` of `{name}` holds text ({text[1]!r} in row {text[0] + 1}). Leave it out of "
                "`features`, or set `categorical: one_hot`."
            )
        values = _values(columns[c])
        if len(values) > MAX_CATEGORIES:
            raise DataError(f"Column `{c}` of `{name}` has {len(values):,} different values, too many for one-hot.")
        categories[c] = values
    classes = _values(columns[target]) if task == "classification" else None
    if classes is not None:
        check_classes(classes, f"Target `{target}` of `{name}`", least=1)
    owners = _values(columns[site]) if site else ()
    return Schema(
        name=name, target=target, features=features, categories=categories, classes=classes, site=site,
        owners=owners, missing=missing,
    )  # fmt: skip


def apply(schema: Schema, columns: Columns, where: str) -> Dataset:
    """Rows as a data set, not yet standardised. A category not seen in training is all zeros."""
    s = schema
    used = [*s.features, s.target, *([s.site] if s.site else [])]
    for wanted in used:
        if wanted not in columns:
            raise DataError(f"{where} has no column `{wanted}`." + did_you_mean(wanted, columns))
    total = len(columns[s.target])
    gaps = {c: {i for i, v in enumerate(columns[c]) if _missing(v)} for c in used}
    drop = set().union(*gaps.values())
    if drop and s.missing == "refuse":
        c = next(c for c in used if gaps[c])
        raise DataError(
            f"Column `{c}` of {where} has no value in row {min(gaps[c]) + 1}; fill it or set `missing: drop`."
        )
    keep = [i for i in range(total) if i not in drop]
    names: list[str] = []
    blocks: list[Tensor] = []
    for c in s.features:
        values = [columns[c][i] for i in keep]
        if c in s.categories:
            kinds = s.categories[c]
            names += [f"{c}={k}" for k in kinds]
            blocks.append(torch.tensor([[float(_name(v) == k) for k in kinds] for v in values]).view(-1, len(kinds)))
        else:
            names.append(c)
            blocks.append(_numbers(values, c, where)[:, None])
    out = {"x": torch.cat(blocks, 1) if blocks else torch.zeros(len(keep), 0)}
    target = [columns[s.target][i] for i in keep]
    if s.classes is None:
        out["y"] = _numbers(target, s.target, where)
    else:
        out["y"] = _codes(target, s.classes, s.target, where)
    if s.site:
        out["site"] = _codes([columns[s.site][i] for i in keep], s.owners, s.site, where)
    info = Info(
        name=s.name, kind="table", shape=(len(names),), feature_names=tuple(names), categories=s.categories,
        num_classes=len(s.classes) if s.classes is not None else None, class_names=s.classes or (),
        names={"site": s.owners} if s.site else {}, skipped={"missing value": len(drop)} if drop else {},
    )  # fmt: skip
    return stored(where, out, info)


class TableSource(Protocol):
    """The fields that every source of a table has; ``sources/table.py`` says what they mean."""

    @property
    def target(self) -> str: ...
    @property
    def features(self) -> tuple[str, ...] | None: ...
    @property
    def site(self) -> str | None: ...
    @property
    def task(self) -> Literal["classification", "regression"]: ...
    @property
    def categorical(self) -> Literal["one_hot", "refuse"]: ...
    @property
    def missing(self) -> Literal["drop", "refuse"]: ...


def load_table(
    source: TableSource, columns: Columns, name: str, where: str, test: Columns | None = None, test_where: str = ""
) -> Loaded:
    """A table's rows, standardised; ``name`` and ``where`` are what messages call it and the place of its rows."""
    s = source
    schema = learn(
        columns, name=name, target=s.target, features=s.features, site=s.site, task=s.task, categorical=s.categorical,
        missing=s.missing,
    )  # fmt: skip
    if test is None:
        return standardised(apply(schema, columns, where))
    schema = with_new_owners(schema, test)
    held = apply(schema, test, test_where)
    return standardised(apply(schema, columns, where), held)


def plain(values: Iterable[Any], column: str, where: str, used: bool) -> list[Any]:
    """Values that a database or a library has typed, as numbers, text and None. Booleans become 0 and 1.

    Args:
        used: whether the column is; of others, whatever is neither number nor text becomes text.

    Raises:
        DataError: dates, bytes and the like in a used column.
    """
    return [_plain(v, column, where, used) for v in values]


def _plain(v: Any, column: str, where: str, used: bool) -> Any:
    if isinstance(v, np.generic):
        v = v.item()
    if v is None or type(v) in (int, float, str):
        return v
    if isinstance(v, bool | int):
        return int(v)
    if isinstance(v, Decimal):
        return float(v)
    if type(v).__name__ in ("NAType", "NaTType"):  # how pandas says that there is no value
        return None
    if isinstance(v, float | str) or not used:
        return str(v) if not isinstance(v, float) else float(v)
    raise DataError(
        f"Column `{column}` of {where} holds values of type `{type(v).__name__}`, neither numbers nor text; turn them "
        "into numbers or text first (a date: into days since some day)."
    )


def with_new_owners(schema: Schema, columns: Columns) -> Schema:
    """The schema with the owners of further rows added (a test file may come from other sites)."""
    if not schema.site or schema.site not in columns:
        return schema
    new = [o for o in _values(columns[schema.site]) if o not in schema.owners]
    return replace(schema, owners=(*schema.owners, *new))


def _missing(v: Any) -> bool:
    return (
        v is None or (isinstance(v, float) and math.isnan(v)) or (isinstance(v, str) and v.strip().lower() in MISSING)
    )


def _number(v: Any) -> float | None:
    try:
        x = float(v)
    except (TypeError, ValueError):
        return None
    return x if math.isfinite(x) else None


def _first_text(values: Sequence[Any]) -> tuple[int, Any] | None:
    """Position and value of the first entry that is neither missing nor a finite number."""
    return next(((i, v) for i, v in enumerate(values) if not _missing(v) and _number(v) is None), None)


def _numbers(values: Sequence[Any], column: str, where: str) -> Tensor:
    out = [_number(v) for v in values]
    for v, x in zip(values, out, strict=True):
        if x is None:
            raise DataError(f"Column `{column}` of {where} should hold numbers but has {str(v)[:40]!r}.")
    return torch.tensor(out, dtype=torch.float32)


def _values(values: Sequence[Any]) -> tuple[str, ...]:
    """The different values as text."""
    return ordered(_name(v) for v in values if not _missing(v))


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Each once: numbers in numeric order, before text in alphabetical order."""

    def place(v: str) -> tuple[bool, float, str]:
        x = _number(v)
        return (x is None, x or 0.0, v)

    return tuple(sorted(set(names), key=place))


def _name(v: Any) -> str:
    """3, 3.0 and "3.0" are one class; text is itself, and so are numbers that a float cannot tell apart."""
    x = _number(v) if not isinstance(v, bool) else None
    return str(int(x)) if x is not None and x == int(x) and abs(x) < 1 << 53 else str(v).strip()


def _codes(values: Sequence[Any], names: tuple[str, ...], column: str, where: str) -> Tensor:
    code = {name: i for i, name in enumerate(names)}
    for v in values:
        if _name(v) not in code:
            raise DataError(f"Column `{column}` of {where} has {_name(v)[:40]!r}, which the training rows do not have.")
    return torch.tensor([code[_name(v)] for v in values], dtype=torch.int64)


def check_classes(classes: Sequence[str], what: str, least: int = 2) -> None:
    """Raise :class:`DataError` unless these can be classes of ``what``. One site may well have rows of one class only;
    ``least`` 2 is for all rows together."""
    if len(classes) < least:
        values = "1 value" if len(classes) == 1 else f"{len(classes)} values"
        raise DataError(f"{what} has {values}; classification needs at least two.")
    broken = [c for c in classes if (x := _number(c)) is not None and x != int(x)]
    if len(broken) > 10:
        raise DataError(
            f"{what} holds {len(classes):,} different numbers such as {broken[0]}; that is `task: regression`."
        )
