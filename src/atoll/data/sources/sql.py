"""Rows that a query brings from a database, through SQLAlchemy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, quote_plus, unquote, unquote_plus

from atoll.core.errors import DataError
from atoll.data.columns import Columns, load_table, plain
from atoll.data.source import Loaded, Source

CHUNK = 4096
HOLE = re.compile(r"\$\{([A-Za-z_]\w*)\}")
USER = re.compile(r"[\w+.-]+://([^:/@]*)(?::([^@]*))?@")
SECRET = re.compile(r"pass(word|wd|phrase)?$|pwd|secret|token|credential|private_key|odbc_connect", re.IGNORECASE)
WRITES = ("insert", "update", "delete", "merge", "into")
"""What can make a statement that begins with SELECT or WITH write."""


@dataclass(frozen=True)
class Sql(Source):
    """One row of a query's result an example, as in ``table``. Nothing is ever written.

    The database types the values: numbers are numbers, NULL is missing, booleans are 0 and 1. Only one SELECT (or
    WITH ... SELECT) is executed. SQLite files are opened for reading, PostgreSQL is told that the transaction only
    reads, and everything is rolled back in the end; an account that may only read is still the better guard.

    Passwords never stand in a recipe: ``postgresql+psycopg://reader:${DB_PASSWORD}@host/clinic`` takes the value of
    the environment variable when the rows are loaded, and whatever is written down or reported has the name alone.
    Look at the url of a recipe that you did not write: it says where such values go.

    Args:
        url: of SQLAlchemy, e.g. ``sqlite:///rows.db``; ``${NAME}`` stands for an environment variable.
        query: one SELECT, without a semicolon. Give it an ORDER BY where runs must repeat to the bit.
        target: the column to predict.
        features: columns to predict from; default: every numeric column but target and site.
        site: a column that names each row's natural owner (a hospital, a shop); kept as column ``site``.
        task: ``classification`` (values of the target are classes) or ``regression`` (they are numbers).
        categorical: text in a named feature: one column per value, or an error.
        missing: rows without a value in a used column: left out and counted, or an error.
    """

    url: str
    query: str
    target: str
    features: tuple[str, ...] | None = None
    site: str | None = None
    task: Literal["classification", "regression"] = "classification"
    categorical: Literal["one_hot", "refuse"] = "refuse"
    missing: Literal["drop", "refuse"] = "drop"

    def __post_init__(self) -> None:
        refuse_literal_secrets(self.url)
        refuse_other_than_reading(self.query)

    def load(self) -> Loaded:
        return load_table(self, self._columns(), "query", "the query")

    def _columns(self) -> Columns:
        used = {self.target, self.site, *(self.features or ())}
        options = {"no_parameters": True, "stream_results": True, "max_row_buffer": CHUNK}
        text = self.query.strip().removesuffix(";")
        with (
            _reading(self.url) as connection,
            closing(connection.exec_driver_sql(text, execution_options=options)) as result,
        ):
            names = list(result.keys())
            if twice := sorted({n for n in names if names.count(n) > 1}):
                raise DataError(f"The query gives more than one column named `{twice[0]}`; name them apart with AS.")
            columns: dict[str, list[Any]] = {name: [] for name in names}
            for rows in result.partitions(CHUNK):
                for name, values in zip(names, zip(*rows, strict=True), strict=True):
                    columns[name] += plain(values, name, "the query", name in used)
        if not columns or not len(columns[names[0]]):
            raise DataError("The query gave no rows.")
        return columns


def refuse_literal_secrets(url: str) -> None:
    """Raise :class:`DataError` when a password stands in the url itself. The sentence does not repeat it."""
    if any(not HOLE.fullmatch(s) for s in _secrets(url)):
        raise DataError(
            "The url holds a password, and recipes are written down. Put it into an environment variable and write "
            "its name instead, as in `postgresql+psycopg://reader:${DB_PASSWORD}@host/database`."
        )


def _secrets(url: str) -> list[str]:
    """The password, and the values of parameters that sound like one, as they stand there."""
    found = USER.match(url)
    pairs = [pair.partition("=") for pair in url.partition("?")[2].split("&")]
    named = [value for name, _, value in pairs if SECRET.search(unquote_plus(name))]
    return [s for s in ((found[2] or "") if found else "", *named) if s]


def refuse_other_than_reading(query: str) -> None:
    """Raise :class:`DataError` unless the query is one SELECT, with or without a WITH."""
    text = query.strip().removesuffix(";")
    if ";" in text:
        raise DataError("`query` is one SELECT; a semicolon would begin a second statement.")
    text = re.sub(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|--[^\n]*|/\*(?!!).*?\*/", " ", text, flags=re.DOTALL)
    words = re.findall(r"[A-Za-z_]\w*", text.lower())
    if not words or words[0] not in ("select", "with"):
        raise DataError("`query` must begin with SELECT or WITH: a source only reads.")
    if found := [w for w in words if w in WRITES]:
        raise DataError(
            f"`query` says {found[0].upper()}, and a source only reads. A column of that name stands in double quotes."
        )


def filled(url: str) -> tuple[str, list[str]]:
    """The url with the values of environment variables, and those values, which nobody may see.

    Values are quoted where the url's grammar asks for it: before the ``@``, and after the ``?``.

    Raises:
        DataError: a variable is not set.
    """
    secrets: list[str] = []
    user, question = USER.match(url), url.find("?")

    def value(hole: re.Match[str]) -> str:
        text = os.environ.get(hole[1])
        if text is None:
            raise DataError(f"The url of the database needs the environment variable `{hole[1]}`, which is not set.")
        secrets.append(text)
        if user and hole.start() < user.end():
            return quote(text, safe="")
        return quote_plus(text) if 0 <= question < hole.start() else text

    whole = HOLE.sub(value, url)
    secrets += [decode(s) for s in _secrets(whole) for decode in (unquote, unquote_plus, str)]
    return whole, [s for s in {*secrets, *map(quote, secrets), *map(quote_plus, secrets)} if s]


@contextmanager
def _reading(url: str) -> Iterator[Any]:
    """A connection in a transaction that only reads. What goes wrong is a sentence without secrets."""
    try:
        import sqlalchemy
        from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
        from sqlalchemy.pool import NullPool
    except ImportError as e:
        raise DataError("Databases need SQLAlchemy: pip install 'atoll[sql]'.") from e
    whole, secrets = filled(url)
    options: dict[str, Any] = {"poolclass": NullPool, "hide_parameters": True}
    try:
        place = sqlalchemy.make_url(whole)
        if place.get_backend_name() == "sqlite":
            options["creator"] = _sqlite(place.database)
        engine = sqlalchemy.create_engine(place, **options)
    except DataError:
        raise
    except NoSuchModuleError:
        raise DataError(f"SQLAlchemy knows no database `{place.drivername}`; check the beginning of the url.") from None
    except ImportError as e:
        raise DataError(
            f"The database needs the Python package `{e.name}`; install it, or name another driver in the url, as in "
            "`postgresql+psycopg://`."
        ) from None
    except (ArgumentError, ValueError):
        raise DataError("The url of the database cannot be read; it looks like `sqlite:///rows.db`.") from None
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "postgresql":
                connection.exec_driver_sql("SET TRANSACTION READ ONLY")
            yield connection  # closing it rolls back
    except SQLAlchemyError as e:
        why = " ".join(str(getattr(e, "orig", None) or e).split())
        for secret in sorted(secrets, key=len, reverse=True):
            why = why.replace(secret, "***")
        raise DataError(f"The database did not answer the query ({why[:300]}).") from None


def _sqlite(database: str | None) -> Any:
    """Opens the file for reading, and never makes one."""
    if not database or database.startswith((":", "file:")):
        raise DataError("The url names no SQLite file; write `sqlite:///rows.db` (four slashes for an absolute path).")
    path = Path(database).expanduser()
    if not path.is_file():
        raise DataError(f"There is no file {path}.")

    def connect() -> Any:
        import sqlite3

        return sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)

    return connect
