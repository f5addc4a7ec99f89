"""A catalog that somebody has put views or triggers into: nobody runs them, and reindex builds another."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import backprompt_db as bp
from backprompt_db.catalog import connection, plain_sql
from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import Event
from backprompt_db.catalog.schema_check import HEAD, revision_of
from backprompt_db.errors import CatalogError, CatalogTooNew
from tests.conftest import cases
from tests.support.catalogs import new_catalog, origin_of, put, stored
from tests.support.cli import run
from tests.support.faults import assert_reads_back, put_prompts
from tests.support.operations import catalog_of, reindexed, run_prompts

MakeLM = Callable[..., bp.LanguageModel]

WITHOUT_END = "WITH RECURSIVE forever(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM forever)"
FOREVER = f"{WITHOUT_END} SELECT max(n) FROM forever"  # noqa: S608
TABLES = ["models", "segments", "parents", "representations", "sums", "counts", "events", "namespaces", "cuts"]


def view(table: str) -> list[str]:
    """A view without end in the place of a table, which has its columns."""
    return [
        f"ALTER TABLE {table} RENAME TO real_{table}",
        f"CREATE VIEW {table} AS {WITHOUT_END} SELECT real_{table}.* FROM forever, real_{table}",  # noqa: S608
    ]


def trigger(table: str, event: str) -> list[str]:
    return [
        f"CREATE VIEW planted AS {FOREVER}",
        f"CREATE TRIGGER more AFTER {event} ON {table} BEGIN INSERT INTO counts SELECT 'n', * FROM planted; END",  # noqa: S608
    ]


def redefined(name: str, before: str, after: str) -> list[str]:
    """Another definition of something, with its own name, behind SQLite's back."""
    return [
        "PRAGMA writable_schema = ON",
        f"UPDATE sqlite_master SET sql = replace(sql, '{before}', '{after}') WHERE name = '{name}'",  # noqa: S608
    ]


PLANTED = st.one_of(
    st.sampled_from(TABLES).map(view),
    st.builds(trigger, st.sampled_from(TABLES), st.sampled_from(["INSERT", "UPDATE", "DELETE"])),
    st.sampled_from(["inserted", "updated", "deleted"]).map(lambda event: [f"DROP TRIGGER representations_{event}"]),
    st.sampled_from(TABLES).map(lambda table: [f"CREATE TABLE {table}_2 (a)"]),
    st.sampled_from(
        [
            ["CREATE VIRTUAL TABLE more USING fts5(text)"],
            ["CREATE INDEX more ON segments (length(text))"],
            ["DROP INDEX ix_parents_parent_id", "CREATE INDEX ix_parents_parent_id ON parents (parent_id || 'x')"],
            ["ALTER TABLE events ADD COLUMN more AS (hex(zeroblob(100000000)))"],
            redefined("counts", "name VARCHAR", "name VARCHAR CHECK (length(hex(zeroblob(100000000))) > 0)"),
            redefined("representations_updated", "END", "DELETE FROM models; END"),
            redefined("models", "CREATE TABLE models", "CREATE TABLE other"),
        ]
    ),
)
COMMANDS = [
    ("ls",),
    ("ls", "--models"),
    ("ls", "--grep", "request"),
    ("tree",),
    ("graph", "--out", "page.html"),
    ("stats",),
    ("doctor",),
]


SWAPPED: list[tuple[str, str, object]] = [
    ("representations", "created_at", math.inf),
    ("events", "at", "yesterday"),
    ("segments", "text", b"\xff"),
    ("segments", "text", None),
    ("segments", "namespace", 7),
    ("representations", "num_hits", "many"),
    ("representations", "num_tokens", None),
    ("representations", "last_used_at", 1e300),
    ("representations", "compute_seconds", -math.inf),
    ("representations", "is_pinned", b"yes"),
    ("representations", "label", b"\xff"),
    ("representations", "weights_id", b"short"),
    ("models", "name", None),
    ("models", "max_positions", "none"),
    ("tokenizers", "vocab_size", b"\xff"),
    ("sums", "saved_seconds", math.inf),
    ("sums", "num_tokens", None),
    ("counts", "value", math.inf),
    ("events", "address", "words"),
    ("namespaces", "num_segments", "many"),
]


def plant(path: Path, statements: list[str]) -> None:
    with closing(sqlite3.connect(path)) as catalog, catalog:
        for statement in statements:
            catalog.execute(statement)


def assert_told(directory: Path) -> None:
    """Each command says what it can without the catalog, or that it cannot, and what to do; none waits for an end."""
    for name, *options in COMMANDS:
        done = run(name, *options, "--db", directory)
        assert isinstance(done.exception, SystemExit | None)
        assert "reindex" in done.output, (name, done.output)
        assert done.exit_code == {"stats": 0, "doctor": 0}.get(name, 2), done.output


@given(planted=PLANTED)
def test_nothing_planted_is_used(tmp_path_factory: pytest.TempPathFactory, planted: list[str]) -> None:
    path = tmp_path_factory.mktemp("catalog") / "catalog.sqlite"
    new_catalog(path).close()
    plant(path, planted)
    with pytest.raises(CatalogError):
        Catalog.open(path)


@pytest.mark.parametrize(
    "planted",
    [
        pytest.param(view("representations"), id="view"),
        pytest.param(trigger("counts", "INSERT"), id="trigger", marks=pytest.mark.exhaustive),
    ],
)
def test_commands_say_so_runs_go_on_and_reindex_builds_another(
    tmp_path: Path, make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch, planted: list[str]
) -> None:
    place = tmp_path / "db"
    with bp.open(place) as db:
        run_prompts(make_lm(db=db))
    monkeypatch.chdir(tmp_path)
    plant(catalog_of(place), planted)
    assert_told(place)
    with bp.open(place) as db:
        lm = make_lm(db=db)
        lm(lm.text("Pick the endpoint for the request.\n") + "Request: show me everyone")
        assert db.counters.num_misses == 0
    done = reindexed(place)
    assert done.moved_aside is not None
    assert done.moved_aside.exists()
    assert run("doctor", "--db", place).exit_code == 0
    assert "show me everyone" in run("ls", "--db", place).stdout


def swap(path: Path, table: str, column: str, value: object) -> None:
    """Put a value into a column of every row, whatever the schema allows; the schema stays as it was."""
    with closing(sqlite3.connect(path)) as catalog, catalog:
        schema = catalog.execute("SELECT sql, rowid FROM sqlite_master").fetchall()
        catalog.execute("PRAGMA writable_schema = ON")
        catalog.execute("UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '') WHERE type = 'table'")
    put(path, table, column, value)
    with closing(sqlite3.connect(path)) as catalog, catalog:
        catalog.execute("PRAGMA writable_schema = ON")
        catalog.executemany("UPDATE sqlite_master SET sql = ? WHERE rowid = ?", schema)


@pytest.mark.parametrize("swapped", cases(SWAPPED, by_default=SWAPPED[:2]), ids=str)
def test_values_that_do_not_belong_there_are_told_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swapped: tuple[str, str, object]
) -> None:
    place = tmp_path / "db"
    monkeypatch.chdir(tmp_path)
    with bp.open(place) as db:
        put_prompts(db, [0])
        assert db.catalog is not None
        db.catalog.log([Event(1.0, "kind", None, "detail")])
        db.catalog.count({"hits": 1.0})
    swap(catalog_of(place), *swapped)
    for command in COMMANDS:
        assert isinstance(run(*command, "--db", place).exception, SystemExit | None), command
    assert run("doctor", "--fix", "--db", place).exit_code == 0
    assert run("ls", "--db", place).exit_code == 0
    with bp.open(place) as db:
        assert_reads_back(db, [0])


def test_a_statement_that_does_not_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STATEMENT_SECONDS", 0.1)
    monkeypatch.setattr(plain_sql, "STATEMENT_SECONDS", 0.1)
    with new_catalog(tmp_path / "catalog.sqlite") as catalog:
        with pytest.raises(CatalogError, match=r"interrupted.*Try again"), catalog.reading() as reading:
            reading.exec_driver_sql(FOREVER)
        with pytest.raises(CatalogError, match="interrupted"):
            plain_sql.rows(tmp_path / "catalog.sqlite", FOREVER)
        catalog.record([stored(origin_of("one"))], at=1.0)
        assert len(catalog.rows()) == 1


def test_what_the_library_itself_adds_is_its_own(tmp_path: Path) -> None:
    with new_catalog(tmp_path / "catalog.sqlite") as catalog:
        assert list(catalog.index_texts())[-1] == 0
    plant(tmp_path / "catalog.sqlite", ["ANALYZE"])
    with Catalog.open(tmp_path / "catalog.sqlite") as catalog:
        assert catalog.has_index()
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as file:
        assert revision_of(file.execute) == HEAD


def test_a_newer_catalog_is_newer_whatever_is_in_it(tmp_path: Path) -> None:
    new_catalog(tmp_path / "catalog.sqlite").close()
    plant(tmp_path / "catalog.sqlite", ["CREATE TABLE later (a)", "UPDATE alembic_version SET version_num = '9999'"])
    with pytest.raises(CatalogTooNew):
        Catalog.open(tmp_path / "catalog.sqlite")
    with pytest.raises(CatalogTooNew):
        plain_sql.rows(tmp_path / "catalog.sqlite", "SELECT 1")
