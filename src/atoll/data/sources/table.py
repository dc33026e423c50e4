"""Tables in files: CSV, TSV, Parquet, JSON Lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atoll.core.errors import DataError
from atoll.data.columns import Columns, load_table
from atoll.data.source import Loaded, Source


@dataclass(frozen=True)
class Table(Source):
    """One row an example. Features are standardised by mean and deviation of the training rows.

    Args:
        path: ``.csv``, ``.tsv``, ``.parquet``, ``.jsonl`` or ``.ndjson``; CSV is UTF-8 with a header line.
        target: the column to predict.
        features: columns to predict from; default: every numeric column but target and site.
        site: a column that names each row's natural owner (a hospital, a shop); kept as column ``site``.
        task: ``classification`` (values of the target are classes) or ``regression`` (they are numbers).
        test_path: a second file with the same columns, as the common test set.
        categorical: text in a named feature: one column per value, or an error.
        missing: rows with an empty cell in a used column: left out and counted, or an error.
    """

    path: str
    target: str
    features: tuple[str, ...] | None = None
    site: str | None = None
    task: Literal["classification", "regression"] = "classification"
    test_path: str | None = None
    categorical: Literal["one_hot", "refuse"] = "refuse"
    missing: Literal["drop", "refuse"] = "drop"

    def load(self) -> Loaded:
        columns, path = read_columns(self.path), Path(self.path)
        if self.test_path is None:
            return load_table(self, columns, path.stem, path.name)
        return load_table(self, columns, path.stem, path.name, read_columns(self.test_path), Path(self.test_path).name)


def read_columns(path: str) -> Columns:
    """The columns of a file, by its suffix, values as the format gives them (text, for CSV)."""
    file = Path(path).expanduser()
    readers = {
        ".csv": lambda: _csv(file, ","), ".tsv": lambda: _csv(file, "\t"), ".parquet": lambda: _parquet(file),
        ".jsonl": lambda: _json_lines(file), ".ndjson": lambda: _json_lines(file),
    }  # fmt: skip
    if file.suffix.lower() not in readers:
        raise DataError(f"{file} has a suffix that is not known; choose from {', '.join(readers)}.")
    if not file.is_file():
        raise DataError(f"There is no file {file}.")
    try:
        columns = readers[file.suffix.lower()]()
    except UnicodeDecodeError as e:
        raise DataError(f"{file} is not UTF-8 text (byte {e.start:,}); convert it first.") from e
    if not columns or not len(next(iter(columns.values()))):
        raise DataError(f"{file} holds no rows.")
    return columns


def _csv(file: Path, delimiter: str) -> dict[str, list[str]]:
    with open(file, encoding="utf-8-sig", newline="") as f:
        try:
            lines = csv.reader(f, delimiter=delimiter, strict=True)
            header = [h.strip() for h in next(lines, [])]
            _distinct(header, file)
            rows = []
            for row in lines:
                if row and len(row) != len(header):
                    raise DataError(
                        f"Line {lines.line_num} of {file} has {len(row)} cells; the header has {len(header)}."
                    )
                if row:
                    rows.append(row)
        except csv.Error as e:
            raise DataError(f"Line {lines.line_num} of {file} is not CSV ({e}).") from e
    return {h: list(column) for h, column in zip(header, zip(*rows, strict=True), strict=bool(rows))}


def _distinct(header: Sequence[str], file: Path) -> None:
    twice = sorted({h for h in header if header.count(h) > 1})
    if twice:
        raise DataError(f"{file} has more than one column named {twice[0]!r}.")


def _json_lines(file: Path) -> dict[str, list[Any]]:
    rows: list[dict[str, Any]] = []
    with open(file, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as e:
                raise DataError(f"Line {number} of {file} is not JSON ({e}).") from e
            if not isinstance(row, dict):
                raise DataError(f"Line {number} of {file} is not a JSON object with a value per column.")
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _parquet(file: Path) -> dict[str, list[Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as e:
        raise DataError("Reading Parquet needs pyarrow: pip install 'atoll[datasets]'.") from e
    try:
        table = parquet.read_table(file)
    except (OSError, ValueError) as e:
        raise DataError(f"{file} is not a Parquet file ({e}).") from e
    _distinct(table.column_names, file)
    return {name: table.column(name).to_pylist() for name in table.column_names}
