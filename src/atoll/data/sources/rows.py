"""Rows that a Python program already has in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from atoll.core.errors import DataError
from atoll.data.columns import load_table, plain
from atoll.data.source import Loaded, Source


class _FromPython:
    """Marks a field that no file can give: what is written down of it is not the rows."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import PydanticCustomError, core_schema

        def refuse(value: Any) -> Any:
            if isinstance(value, Held):
                return value
            raise PydanticCustomError("from_python", "only a Python program can give these rows; run it again")

        return core_schema.no_info_plain_validator_function(refuse)


class Held:
    """Columns in memory; as text, no more than how much there is of them: recipes are written down."""

    def __init__(self, columns: Mapping[str, Iterable[Any]]) -> None:
        self.columns = columns

    def __repr__(self) -> str:
        rows = len(next(iter(self.columns.values()), ()))  # type: ignore[arg-type]
        return f"{len(self.columns)} columns of {rows:,} rows, in memory"


@dataclass(frozen=True)
class Rows(Source):
    """One row an example, as in ``table``, for programs that embed Atoll. A YAML recipe cannot write it.

    Args:
        columns: by name: lists, or one-dimensional arrays, tensors or series; or a data frame of them (pandas, polars).
        target: the column to predict.
        features: columns to predict from; default: every numeric column but target and site.
        site: a column that names each row's natural owner (a hospital, a shop); kept as column ``site``.
        task: ``classification`` (values of the target are classes) or ``regression`` (they are numbers).
        categorical: text in a named feature: one column per value, or an error.
        missing: rows without a value in a used column (None, NaN): left out and counted, or an error.
        title: in reports.
    """

    columns: Annotated[Any, _FromPython()] = field(compare=False)
    target: str
    features: tuple[str, ...] | None = None
    site: str | None = None
    task: Literal["classification", "regression"] = "classification"
    categorical: Literal["one_hot", "refuse"] = "refuse"
    missing: Literal["drop", "refuse"] = "drop"
    title: str = "rows"

    def __post_init__(self) -> None:
        if not isinstance(self.columns, Held):
            object.__setattr__(self, "columns", Held(_columns(self.columns)))

    def load(self) -> Loaded:
        used = {self.target, self.site, *(self.features or ())}
        held: Mapping[str, Any] = self.columns.columns
        lists = {name: plain(_list(values), name, f"`{self.title}`", name in used) for name, values in held.items()}
        if not lists or not len(next(iter(lists.values()))):
            raise DataError(f"`{self.title}` holds no rows.")
        return load_table(self, lists, self.title, f"`{self.title}`")


def _columns(given: Any) -> dict[str, Any]:
    """The columns by name, each one-dimensional and of the same length."""
    names = list(given) if isinstance(given, Mapping) else list(getattr(given, "columns", ()))
    if not names or isinstance(given, str):
        raise DataError("`rows` takes columns by name, such as {'age': [30, 41], 'outcome': ['well', 'ill']}.")
    out = {str(name): given[name] for name in names}
    if len(out) < len(names):
        raise DataError("Two columns of `rows` have the same name.")
    for name, values in out.items():
        if len(getattr(values, "shape", (0,))) != 1 or isinstance(values, str) or not hasattr(values, "__len__"):
            raise DataError(f"Column `{name}` of `rows` is not a list of values, or a one-dimensional array.")
    sizes = {name: len(values) for name, values in out.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"The columns of `rows` differ in length ({', '.join(f'{n}: {k}' for n, k in sizes.items())}).")
    return out


def _list(values: Any) -> list[Any]:
    for name in ("tolist", "to_list"):
        if hasattr(values, name):
            return list(getattr(values, name)())
    return list(values)
