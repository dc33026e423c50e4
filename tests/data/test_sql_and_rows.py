"""Rows from databases and from memory equal those of a CSV file, bit for bit; passwords stay where they are."""

from __future__ import annotations

import csv
import datetime
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from atoll.core.build import Reader, describe, schema
from atoll.core.errors import AtollError, DataError
from atoll.data.dataset import Dataset
from atoll.data.source import Loaded, Source
from atoll.data.sources import sql as sql_module
from atoll.data.sources.rows import Rows
from atoll.data.sources.sql import Sql
from atoll.data.sources.table import Table
from atoll.recipes.recipe import Recipe, read_recipe, recipe_yaml

NAMES = ["age", "mass", "town", "gender", "outcome", "clinic"]
RNG = np.random.default_rng(0)
ROWS: list[list[Any]] = [
    [int(a), None if i % 7 == 3 else float(m), ("Oslo", "Lyon", "Aix; Bonn")[i % 3], bool(i % 2), ("well", "ill")[int(a) % 2], f"c{i % 4}"]
    for i, (a, m) in enumerate(zip(RNG.integers(20, 90, 40), RNG.normal(70, 9, 40).round(3), strict=True))
]  # fmt: skip
VARIANTS: list[dict[str, Any]] = [
    {"target": "outcome"},
    {"target": "outcome", "site": "clinic", "features": ("mass", "town", "gender"), "categorical": "one_hot"},
    {"target": "mass", "task": "regression"},
    {"target": "gender", "features": ("age",)},
]


def as_csv(path: Path, rows: Sequence[Sequence[Any]] = ROWS) -> str:
    with open(path, "w", newline="", encoding="utf-8") as f:
        cells = [["" if v is None else int(v) if isinstance(v, bool) else v for v in row] for row in rows]
        csv.writer(f).writerows([NAMES, *cells])
    return str(path)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "rows.db"
    with sqlite3.connect(path) as c:
        c.execute("CREATE TABLE t (age INTEGER, mass REAL, town TEXT, gender BOOLEAN, outcome TEXT, clinic TEXT)")
        c.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?, ?)", ROWS)
    c.close()
    return path


def equal(a: Loaded, b: Loaded) -> None:
    x, y = a.train, b.train
    assert x.columns.keys() == y.columns.keys()
    for name in x.columns:
        assert x.column(name).dtype == y.column(name).dtype
        assert torch.equal(x.column(name), y.column(name))
    assert torch.equal(x.ready()["x"], y.ready()["x"])
    for fact in ("feature_names", "class_names", "categories", "names", "skipped", "target_mean", "target_scale"):
        assert getattr(x.info, fact) == getattr(y.info, fact)


# ------------------------------------------------------------------------------------------- databases


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_sqlite_equals_csv(
    tmp_path: Path, database: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_module, "CHUNK", 7)
    before = database.read_bytes()
    loaded = Sql(f"sqlite:///{database}", "SELECT * FROM t ORDER BY rowid", **options).load()
    equal(loaded, Table(as_csv(tmp_path / "t.csv"), **options).load())
    assert database.read_bytes() == before


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("DELETE FROM t", "must begin with SELECT or WITH"),
        ("", "must begin with SELECT or WITH"),
        ("-- SELECT\nDROP TABLE t", "must begin with SELECT or WITH"),
        ("/*! DROP TABLE t */ SELECT 1", "must begin with SELECT or WITH"),
        ("SELECT 1; DROP TABLE t", "a semicolon would begin a second statement"),
        ("WITH x AS (DELETE FROM t RETURNING *) SELECT * FROM x", "says DELETE, and a source only reads"),
        ("SELECT * INTO u FROM t", "says INTO"),
        ("PRAGMA user_version", "must begin with SELECT or WITH"),
    ],
)
def test_anything_but_one_select_is_refused_before_connecting(query: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Sql("sqlite:////nowhere/none.db", query, target="y")


def test_words_in_text_and_names_are_no_statements(database: Path) -> None:
    query = """WITH u AS (SELECT age, 'delete -- from' AS "update", outcome FROM t WHERE town NOT LIKE '%drop%' /* into */)
    SELECT age, "update", outcome -- insert
    FROM u;"""
    loaded = Sql(f"sqlite:///{database}", query, target="outcome").load()
    assert loaded.train.info.feature_names == ("age",)
    assert len(loaded.train) == len(ROWS)


def test_sqlite_cannot_be_written_even_by_a_query_that_slips_through(database: Path) -> None:
    source = Sql(f"sqlite:///{database}", "SELECT age, outcome FROM t", target="outcome")
    object.__setattr__(source, "query", "DELETE FROM t RETURNING age, outcome")
    with pytest.raises(DataError, match="readonly database"):
        source.load()


@pytest.mark.parametrize(
    ("url", "query", "words"),
    [
        ("sqlite:///{}", "SELECT * FROM u", r"The database did not answer the query \(no such table: u\)"),
        ("sqlite:///{}", "SELECT age FROM t", "`query` has no column `outcome`"),
        ("sqlite:///{}", "SELECT age, age, outcome FROM t", "more than one column named `age`"),
        ("sqlite:///{}", "SELECT age, outcome FROM t WHERE age < 0", "The query gave no rows"),
        ("sqlite:///{}", "SELECT CAST(town AS BLOB) AS outcome, age FROM t", "holds values of type `bytes`"),
        ("sqlite:///{}.none", "SELECT 1", "There is no file"),
        ("sqlite://", "SELECT 1", "names no SQLite file"),
        ("rows.db", "SELECT 1", "cannot be read; it looks like"),
        ("postgresql://h:port/db", "SELECT 1", "cannot be read; it looks like"),
        ("nosuchbase://h/db", "SELECT 1", "knows no database `nosuchbase`"),
        ("mysql+oursql_none://h/db", "SELECT 1", "knows no database `mysql\\+oursql_none`"),
    ],
)
def test_bad_places_and_results_are_one_sentence(database: Path, url: str, query: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as e:
        Sql(url.format(database), query, target="outcome").load()
    assert "\n" not in str(e.value)
    assert not database.with_name("rows.db.none").exists()


def test_without_sqlalchemy_the_extra_is_named(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    with pytest.raises(DataError, match=r"pip install 'atoll\[sql\]'"):
        Sql(f"sqlite:///{database}", "SELECT * FROM t", target="outcome").load()


# ------------------------------------------------------------------------------------------- secrets

PASSWORD = "s3cr/et@%"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://u:{PASSWORD}@h/db", "postgresql://u:x${P}@h/db", "postgresql://u:abc@h/db", "mysql://:abc@h/db",
        "postgresql://u@h/db?password=abc", "postgresql://h/db?a=1&sslpassword=abc", "mssql+pyodbc:///?odbc_connect=abc",
    ],
)  # fmt: skip
def test_a_password_in_the_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(
        DataError, match=r"write its name instead, as in `postgresql\+psycopg://reader:\$\{DB_PASSWORD\}@"
    ) as e:
        Sql(url, "SELECT 1", target="y")
    reader = Reader()
    reader.read(Source, {"name": "sql", "url": url, "query": "SELECT 1", "target": "y"}, "data")
    for text in (str(e.value), *reader.problems):
        assert "abc" not in text
        assert PASSWORD not in text
    assert len(reader.problems) == 1


def test_placeholders_are_filled_when_loading_and_never_written(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = (
        "postgresql+psycopg://u:${DB_PASSWORD}@127.0.0.1:1/${DB}?passfile=/x&password=${DB_PASSWORD}&connect_timeout=2"
    )
    recipe = Recipe(data=Sql(url, "SELECT 1", target="y"))
    with pytest.raises(DataError, match="environment variable `DB_PASSWORD`, which is not set"):
        recipe.data.load()
    monkeypatch.setenv("DB_PASSWORD", PASSWORD)
    monkeypatch.setenv("DB", "a/b")
    whole, secrets = sql_module.filled(url)
    assert whole == (
        "postgresql+psycopg://u:s3cr%2Fet%40%25@127.0.0.1:1/a/b?passfile=/x&password=s3cr%2Fet%40%25&connect_timeout=2"
    )
    assert {PASSWORD, "s3cr%2Fet%40%25"} <= set(secrets)
    for text in (recipe_yaml(recipe), repr(recipe)):
        assert "${DB_PASSWORD}" in text
        assert "s3cr" not in text
    with pytest.raises(DataError, match="did not answer") as e:
        recipe.data.load()
    assert "s3cr" not in str(e.value)
    assert e.value.__cause__ is None
    monkeypatch.setenv("WHOLE", f"sqlite:///{database}")
    assert len(Sql("${WHOLE}", "SELECT * FROM t", target="outcome").load().train)


def test_errors_of_drivers_lose_their_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    psycopg = pytest.importorskip("psycopg")

    def talkative(*_: object, **__: object) -> None:
        raise psycopg.OperationalError(f"cannot connect with password={PASSWORD}\nor s3cr%2Fet%40%25")

    monkeypatch.setattr(psycopg.Connection, "connect", talkative)
    monkeypatch.setenv("DB_PASSWORD", PASSWORD)
    monkeypatch.setenv("DB_URL", "postgresql+psycopg://u:s3cr%2Fet%40%25@h/db")
    monkeypatch.setattr(psycopg, "connect", talkative)
    for url in (
        "postgresql+psycopg://u:${DB_PASSWORD}@h/db",
        "${DB_URL}",
        "postgresql+psycopg://u@h/db?password=${DB_PASSWORD}",
    ):
        with pytest.raises(DataError) as e:
            Sql(url, "SELECT 1", target="y").load()
        assert str(e.value) == "The database did not answer the query (cannot connect with password=*** or ***)."


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(DataError, match=r"needs the Python package `psycopg2`; install it, or name another driver"):
        Sql("postgresql+psycopg2://h/db", "SELECT 1", target="y").load()


# ------------------------------------------------------------------------------------------- PostgreSQL


def postgres_binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A server of our own on a socket in a temporary folder; the url lacks the password, which is in PG_TEST_PASSWORD."""
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("there is no PostgreSQL server on this machine (apt-get install postgresql)")
    pytest.importorskip("psycopg")
    user: dict[str, Any] = {}
    if os.getuid() == 0:  # initdb refuses root
        import pwd

        known = {p.pw_name: p for p in pwd.getpwall()}
        other = known.get("postgres") or known["nobody"]
        user = {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": []}
    folder = Path(tempfile.mkdtemp(prefix="atoll-pg-"))
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **user}
    try:
        (folder / "password").write_text(PASSWORD)
        for path in (folder, folder / "password"):
            os.chown(path, user.get("user", -1), user.get("group", -1))
        options = ["-U", "reader", "--auth=scram-sha-256", f"--pwfile={folder}/password", "--no-sync"]
        subprocess.run([binaries / "initdb", "-D", folder / "data", *options], check=True, timeout=60, **quiet)
        run = [binaries / "postgres", "-D", folder / "data", "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
        server = subprocess.Popen(run, **quiet)
        try:
            yield _wait(folder)
        finally:
            server.terminate()
            server.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(folder: Path) -> str:
    import time

    import psycopg

    for _ in range(300):
        try:
            with psycopg.connect(host=str(folder), user="reader", password=PASSWORD, dbname="postgres") as c:
                c.execute(
                    "CREATE TABLE t (n SERIAL, age INTEGER, mass NUMERIC, town CHAR(12), gender BOOLEAN, outcome TEXT, "
                    "clinic TEXT, born DATE)"
                )
                with c.cursor() as cursor:
                    cursor.executemany(
                        "INSERT INTO t (age, mass, town, gender, outcome, clinic, born) VALUES (%s, %s, %s, %s, %s, %s, %s)",
                        [[*row, datetime.date(2000, 1, 1)] for row in ROWS],
                    )
            return f"postgresql+psycopg://reader:${{PG_TEST_PASSWORD}}@/postgres?host={folder}"
        except psycopg.OperationalError:
            time.sleep(0.1)
    raise AssertionError("PostgreSQL did not start")


def test_postgresql_equals_csv_and_is_only_read(tmp_path: Path, postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_TEST_PASSWORD", PASSWORD)
    monkeypatch.setattr(sql_module, "CHUNK", 7)
    query = (
        "SELECT age, mass, town, gender, outcome, clinic, born FROM t WHERE town LIKE '%' AND age::int > 0 ORDER BY n"
    )
    for options in VARIANTS:
        equal(Sql(postgres, query, **options).load(), Table(as_csv(tmp_path / "t.csv"), **options).load())
    with pytest.raises(DataError, match="`born` of the query holds values of type `date`"):
        Sql(postgres, query, target="outcome", features=("born",)).load()
    source = Sql(postgres, "SELECT nextval('t_n_seq') AS age, outcome FROM t", target="outcome")
    with pytest.raises(DataError, match="read-only transaction"):
        source.load()
    monkeypatch.setenv("PG_TEST_PASSWORD", "wr0ng")
    with pytest.raises(DataError, match="password authentication failed") as e:
        Sql(postgres, query, target="outcome").load()
    assert "wr0ng" not in str(e.value)


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_rows_in_memory_equal_csv(tmp_path: Path, options: dict[str, Any]) -> None:
    table = Table(as_csv(tmp_path / "t.csv"), **options).load()
    lists = {name: list(values) for name, values in zip(NAMES, zip(*ROWS, strict=True), strict=True)}
    equal(Rows(lists, **options).load(), table)
    equal(Rows(pd.DataFrame(lists), **options).load(), table)
    nullable = pd.DataFrame(lists).convert_dtypes()
    equal(Rows(nullable, **options).load(), table)
    mixed = {
        **lists, "age": torch.tensor(lists["age"]), "gender": np.array(lists["gender"]),
        "mass": [None if v is None else Decimal(str(v)) for v in lists["mass"]],
    }  # fmt: skip
    equal(Rows(mixed, **options).load(), table)


def test_a_recipe_with_rows_in_memory_does_not_hold_them() -> None:
    recipe = Recipe(data=Rows({"age": [777, 888], "y": ["a", "b"]}, target="y"))
    for text in (recipe_yaml(recipe), repr(recipe), str(describe(recipe))):
        assert "2 columns of 2 rows, in memory" in text
        assert "777" not in text
    for columns in (describe(recipe)["data"]["columns"], {"age": [1, 2], "y": ["a", "b"]}):
        with pytest.raises(AtollError, match="only a Python program can give these rows; run it again"):
            read_recipe({"data": {"name": "rows", "columns": columns, "target": "y"}})
    assert schema(Source)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"age": [1, 2], "y": [0]}, r"differ in length \(age: 2, y: 1\)"),
        ({"age": np.zeros((2, 2)), "y": [0, 1]}, "Column `age` of `rows` is not a list of values"),
        ({"age": "ab", "y": [0, 1]}, "Column `age` of `rows` is not a list of values"),
        ({"age": 5, "y": [0, 1]}, "Column `age` of `rows` is not a list of values"),
        ({"age": [], "y": []}, "`rows` holds no rows"),
        ({}, "`rows` takes columns by name"),
        ("age", "`rows` takes columns by name"),
        (pd.DataFrame([[1, 2, 0]], columns=["a", "a", "y"]), "Two columns of `rows` have the same name"),
        ({"age": [datetime.date(2000, 1, 1)] * 2, "y": [0, 1]}, "no numeric column besides `y`"),
        ({"age": [1, 2], "y": [datetime.date(2000, 1, 1)] * 2}, "`y` of `rows` holds values of type `date`"),
    ],
)
def test_bad_rows_are_one_sentence(columns: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Rows(columns, target="y").load()


def test_ids_that_a_float_cannot_tell_apart_are_two_owners(tmp_path: Path) -> None:
    big = 1 << 53
    rows = {"age": [1, 2], "y": [0, 1], "who": [big, big + 1]}
    data: Dataset = Rows(rows, target="y", site="who").load().train
    assert data.info.names == {"site": (str(big), str(big + 1))}
