"""The catalog as a file: how it is created, upgraded and shared, and what is said when it cannot be used."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import warnings
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import NullPool, create_engine, exc

import backprompt_db
from backprompt_db.catalog import connection
from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.schema import Base
from backprompt_db.catalog.schema_check import HEAD
from backprompt_db.errors import CatalogError, CatalogTooNew
from backprompt_db.prompt.ids import Address
from tests.support.catalogs import origin_of, stored

if TYPE_CHECKING:
    from collections.abc import Iterator

assert sys.platform != "win32"

MIGRATIONS = Path(__file__).parents[2] / "migrations"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


@pytest.fixture
def catalog(path: Path) -> Iterator[Catalog]:
    with Catalog.open(path) as opened:
        yield opened


def execute(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as file, file:
        for statement in statements:
            file.execute(statement)


def query(path: Path, statement: str) -> list[str]:
    with closing(sqlite3.connect(path)) as file:
        return [row[0] for row in file.execute(statement)]


def schema(path: Path) -> list[str]:
    return query(path, "SELECT sql FROM sqlite_master WHERE sql NOT NULL AND name <> 'alembic_version' ORDER BY sql")


def run(script: str, *, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=cwd, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_the_migrated_schema_is_the_declared_one(path: Path) -> None:
    Catalog.open(path).close()
    with create_engine(f"sqlite:///{path}", poolclass=NullPool).connect() as opened:
        context = MigrationContext.configure(opened, opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_revisions_are_numbered_in_order_up_to_the_head_that_the_catalog_expects() -> None:
    scripts = ScriptDirectory(str(MIGRATIONS))
    revisions = [script.revision for script in scripts.walk_revisions()]
    assert scripts.get_heads() == [HEAD]
    assert revisions == [f"{number:04}" for number in range(len(revisions), 0, -1)]


def test_every_revision_can_be_taken_back_and_applied_again(path: Path) -> None:
    Catalog.open(path).close()
    before = schema(path)
    config = Config(MIGRATIONS / "alembic.ini")
    config.set_main_option("sqlalchemy.url", f"sqlite:///{path}".replace("%", "%%"))
    command.downgrade(config, "base")
    assert schema(path) == []
    Catalog.open(path).close()
    assert schema(path) == before


def test_an_empty_file_becomes_a_catalog(path: Path) -> None:
    path.touch()
    with Catalog.open(path) as catalog:
        assert catalog.rows() == []


def test_threads_may_create_different_catalogs_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number % 3}.sqlite" for number in range(6)]
    threads = [
        threading.Thread(target=lambda path=path: Catalog.open(path).record([stored(origin_of("text"))], at=1.0))
        for path in paths
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for path in paths:
        with Catalog.open(path) as catalog:
            assert len(catalog.rows()) == 1


@pytest.mark.parametrize("readonly", [True, False])
def test_a_newer_schema_is_left_alone(path: Path, *, readonly: bool) -> None:
    Catalog.open(path).close()
    execute(path, "UPDATE alembic_version SET version_num = '9999'")
    before = path.read_bytes()
    with pytest.raises(CatalogTooNew, match="9999") as caught:
        Catalog.open(path, readonly=readonly)
    assert "Upgrade backprompt-db" in caught.value.hint
    assert path.read_bytes() == before


def test_a_revision_that_nobody_knows_is_an_error(path: Path) -> None:
    Catalog.open(path).close()
    execute(path, "UPDATE alembic_version SET version_num = '0000'")
    with pytest.raises(CatalogError, match="0000"):
        Catalog.open(path)


def test_a_migration_that_fails_changes_nothing(path: Path) -> None:
    execute(path, "CREATE TABLE alembic_version (version_num)", "CREATE TABLE cuts (mine)")
    before = schema(path)
    with pytest.raises(CatalogError, match="cuts already exists"):
        Catalog.open(path)
    assert schema(path) == before


def test_another_sqlite_file_is_left_alone(path: Path) -> None:
    execute(path, "CREATE TABLE mine (value)")
    before = path.read_bytes()
    with pytest.raises(CatalogError, match="tables mine is not a catalog"):
        Catalog.open(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("readonly", [True, False])
def test_garbage_is_left_alone(path: Path, *, readonly: bool) -> None:
    path.write_bytes(b"garbage" * 1000)
    with pytest.raises(CatalogError, match="not a database"):
        Catalog.open(path, readonly=readonly)
    assert path.read_bytes() == b"garbage" * 1000


def test_a_place_where_no_file_can_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "absent" / "catalog.sqlite", tmp_path / "file" / "catalog.sqlite"):
        with pytest.raises(CatalogError):
            Catalog.open(path)


@pytest.mark.parametrize("name", ["a b", "quote'\"", "what?", "#1", "100%", "%20", "näïve 🦜", ":memory:", "file:x"])
def test_any_file_name_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    monkeypatch.chdir(directory)
    with Catalog.open(Path(name)) as catalog:
        catalog.record([stored(origin_of("text"))], at=1.0)
    with Catalog.open(directory / name, readonly=True) as catalog:
        assert len(catalog.rows()) == 1
    assert {path.name for path in directory.iterdir()} == {name, f"{name}-journal", f"{name}.lock"}


def test_reading_only_never_writes(path: Path) -> None:
    with Catalog.open(path) as catalog:
        catalog.record([stored(origin_of("text"))], at=1.0)
    before = path.read_bytes()
    for beside in set(path.parent.iterdir()) - {path}:
        beside.unlink()
    with Catalog.open(path, readonly=True) as catalog:
        assert len(catalog.rows()) == 1
        with pytest.raises(CatalogError, match="readonly"):
            catalog.touch({Address(b"a" * 32): 1}, at=2.0)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_reading_only_neither_creates_nor_upgrades(path: Path) -> None:
    with pytest.raises(CatalogError, match="missing or has an older schema"):
        Catalog.open(path, readonly=True)
    assert not path.exists()
    path.touch()
    with pytest.raises(CatalogError) as caught:
        Catalog.open(path, readonly=True)
    assert "Open it once for writing" in caught.value.hint


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_permissions_are_what_was_asked_for_under_any_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        for name, mode in (("private", 0o600), ("group", 0o660)):
            Catalog.open(tmp_path / name, mode=mode).close()
        Catalog.open(tmp_path / "default").close()
    finally:
        assert os.umask(before) == umask
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.suffix != ".lock"}
    expected = {"private": 0o600, "group": 0o660, "default": 0o600}
    assert modes == {**expected, **{f"{name}-journal": mode for name, mode in expected.items()}}


def test_opening_a_current_catalog_imports_nothing_heavy(path: Path) -> None:
    Catalog.open(path).close()
    script = (
        "import sys; from pathlib import Path; from backprompt_db.catalog.catalog import Catalog\n"
        f"Catalog.open(Path({str(path)!r})).rows()\n"
        "print({'alembic', 'filelock', 'torch', 'lmdb', 'transformers'} & set(sys.modules))"
    )
    assert run(script, cwd=path.parent) == "set()\n"


def test_an_installed_package_finds_its_migrations(path: Path, tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "backprompt_db"
    shutil.copytree(Path(backprompt_db.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(MIGRATIONS, package / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    script = (
        "from pathlib import Path; import backprompt_db; from backprompt_db.catalog.catalog import Catalog\n"
        f"Catalog.open(Path({str(path)!r})).close(); print(backprompt_db.__file__)"
    )
    assert run(script, cwd=package.parent) == f"{package / '__init__.py'}\n"
    assert query(path, "SELECT version_num FROM alembic_version") == [HEAD]


def test_one_thread_records_while_another_reads(catalog: Catalog) -> None:
    def write() -> None:
        for number in range(40):
            catalog.record([stored(origin_of(f"{number} {index}")) for index in range(5)], at=float(number))

    writer = threading.Thread(target=write)
    writer.start()
    counts = [catalog.totals().num_representations]
    while writer.is_alive():
        counts.append(catalog.totals().num_representations)
    writer.join()
    assert all(count % 5 == 0 for count in counts)
    assert catalog.totals().num_representations == 200


def test_a_forked_child_may_go_on_using_it(catalog: Catalog) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            catalog.touch({Address(b"?" * 32): 1}, at=1.0)

    writer = threading.Thread(target=write)
    writer.start()
    children = [_fork_and_record(catalog, f"child {number}") for number in range(5)]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    stop.set()
    writer.join()
    assert statuses == [0] * 5
    assert sorted(row.text for row in catalog.rows()) == [f"child {number}" for number in range(5)]


def _fork_and_record(catalog: Catalog, text: str) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        failed = 1
        try:
            catalog.record([stored(origin_of(text))], at=1.0)
            failed = int(text not in {row.text for row in catalog.rows()})
        finally:
            os._exit(failed)
    return child


def test_a_lock_that_stays_is_an_error_that_names_the_cause(
    catalog: Catalog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backprompt_db.system.locks.PATIENCE_SECONDS", 0.05)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(CatalogError, match="database is locked") as caught:
            catalog.touch({Address(b"a" * 32): 1}, at=1.0)
    finally:
        other.close()
    assert "Another process" in caught.value.hint
    catalog.touch({Address(b"a" * 32): 1}, at=1.0)


def test_a_full_disk_is_an_error_that_says_what_to_free(path: Path) -> None:
    Catalog.open(path).close()
    with closing(sqlite3.connect(path)) as small:
        small.execute("PRAGMA max_page_count = 1")
        with pytest.raises(CatalogError, match="disk is full") as caught, connection.catalog_errors(path):
            small.execute("INSERT INTO cuts (key, offsets) VALUES (?, ?)", (b"k", "[" + "0," * 100_000 + "0]"))
    assert "Free disk space" in caught.value.hint


def test_a_file_deleted_meanwhile_is_an_error_and_not_an_empty_catalog(catalog: Catalog, path: Path) -> None:
    path.unlink()
    with pytest.raises(CatalogError, match="unable to open"):
        catalog.totals()
    assert not path.exists()


def test_a_damaged_file_is_an_error_that_says_how_to_rebuild_it(catalog: Catalog, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4096] + b"\xff" * (path.stat().st_size - 4096))
    with pytest.raises(CatalogError, match="malformed") as caught:
        catalog.rows()
    assert "rebuilds it from the store" in caught.value.hint


def _subclasses(kind: type[Exception]) -> set[type[Exception]]:
    return {kind}.union(*(_subclasses(below) for below in kind.__subclasses__()))


@pytest.mark.parametrize("kind", sorted(_subclasses(sqlite3.Error) | _subclasses(exc.DBAPIError), key=str))
def test_every_error_of_the_layers_below_becomes_a_catalog_error(path: Path, kind: type[Exception]) -> None:
    lower = kind("SELECT 1", {}, sqlite3.Error("why")) if issubclass(kind, exc.DBAPIError) else kind("why")
    with pytest.raises(CatalogError, match="failed: why") as caught, connection.catalog_errors(path):
        raise lower
    assert caught.value.hint
    assert caught.value.__cause__ is lower
