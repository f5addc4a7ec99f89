"""Databases whose catalog is old, new, foreign, half-written or gone: hits stay hits, writing goes on, nobody waits."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

import backprompt_db as bp
from backprompt_db.catalog.schema_check import HEAD
from backprompt_db.database.opening import open_catalog
from backprompt_db.errors import CatalogTooNew, UnsafeLocation
from backprompt_db.operations.reindex import reindex
from backprompt_db.operations.verify import Found, verify
from tests.support.faults import (
    IN_OTHER_SHOES,
    ROOT,
    TIMEOUT_SECONDS,
    TOGETHER,
    assert_reads_back,
    assert_survived,
    child,
    keys_of,
    next_line,
    prompt,
    public_directory,
    put_prompts,
    run,
    run_together,
    wait_until_stopped,
)

assert sys.platform != "win32"

MIGRATIONS = ROOT / "migrations"
REVISIONS = sorted(script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions())
NUMBERS = range(4)


def fill(place: Path) -> Path:
    with bp.open(place) as db:
        put_prompts(db, NUMBERS)
    return place / "catalog.sqlite"


def give_revision(catalog: Path, revision: str) -> None:
    """Make a catalog what it was when a revision was the newest one."""
    config = Config(MIGRATIONS / "alembic.ini")
    config.set_main_option("sqlalchemy.url", f"sqlite:///{catalog}")
    command.downgrade(config, revision)


def execute(catalog: Path, *statements: str) -> None:
    with closing(sqlite3.connect(catalog)) as file, file:
        for statement in statements:
            file.execute(statement)


def revision_of(catalog: Path) -> str:
    with closing(sqlite3.connect(catalog)) as file:
        return str(file.execute("SELECT version_num FROM alembic_version").fetchone()[0])


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_catalog_of_every_released_revision_is_brought_up_to_date(tmp_path: Path, revision: str) -> None:
    catalog = fill(tmp_path / "db")
    with open_catalog(tmp_path / "db") as opened:
        before = opened.totals()
    give_revision(catalog, revision)
    with bp.open(tmp_path / "db") as db:
        assert_reads_back(db, NUMBERS)
        assert db.catalog is not None
        assert db.catalog.totals() == before
    assert revision_of(catalog) == HEAD
    assert_survived(tmp_path / "db", NUMBERS)


MEET = (
    TOGETHER
    + """
with bp.open(place) as db:
    assert_reads_back(db, range(4))
    assert db.catalog is not None
    put_prompts(db, [0], author=str(os.getpid()))
print(os.getpid())
"""
)


@pytest.mark.exhaustive
def test_six_processes_that_meet_an_old_catalog_at_once_bring_it_up_to_date(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "db")
    give_revision(catalog, REVISIONS[0])
    words = run_together(*[MEET] * 6, place=tmp_path / "db")
    assert revision_of(catalog) == HEAD
    for (pid,) in words:
        with bp.open(tmp_path / "db") as db:
            assert_reads_back(db, [0], author=pid)
    assert_survived(tmp_path / "db", NUMBERS)


def test_who_meets_a_migration_that_hangs_reads_and_goes_on_when_it_is_killed(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "db")
    give_revision(catalog, REVISIONS[0])
    migrate = "bp.open(place).catalog"
    meet = MEET.replace("    assert db.catalog", "    print('read', flush=True)\n    assert db.catalog")
    with child(migrate, tmp_path / "db", failpoint="migration.first=stop") as stopped:
        wait_until_stopped(stopped)
        with child(meet, tmp_path / "db") as other:
            assert next_line(other) == "ready"
            assert other.stdin is not None
            other.stdin.write("\n")
            other.stdin.flush()
            assert next_line(other) == "read"
            stopped.send_signal(signal.SIGKILL)
            out, err = other.communicate(timeout=TIMEOUT_SECONDS)
            assert (other.returncode, out.split(), err) == (0, [str(other.pid)], "")
    assert revision_of(catalog) == HEAD
    assert_survived(tmp_path / "db", NUMBERS)


READ_ONLY = (
    """
import backprompt_db.catalog.catalog, backprompt_db.database.opening, sqlalchemy.dialects.sqlite
"""
    + IN_OTHER_SHOES
    + """
with bp.open(place) as db:
    assert_reads_back(db, range(4))
    put_prompts(db, [9])
    print(db.readonly, db.catalog is None, db.counters.num_write_failures)
"""
)


@pytest.mark.parametrize("is_torn", [False, True], ids=["old schema", "hot journal"])
def test_a_user_who_may_only_read_is_content_without_a_catalog_that_needs_writing(*, is_torn: bool) -> None:
    with public_directory() as directory:
        place = directory / "db"
        catalog = fill(place)
        tear(catalog) if is_torn else give_revision(catalog, REVISIONS[0])
        for path in [place, *place.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = catalog.read_bytes()
        words, log = run(READ_ONLY, place)
        assert words == ["True", "True", "0"]
        assert "is not writable" in log
        assert "working without the catalog" in log
        assert "Traceback" not in log
        assert catalog.read_bytes() == before
        for path in [place, *place.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        assert_survived(place, NUMBERS)


TEAR = """
import sqlite3
file = sqlite3.connect(place, isolation_level=None)
file.execute('PRAGMA journal_mode = TRUNCATE')
file.execute('PRAGMA cache_size = 1')
file.execute('BEGIN IMMEDIATE')
file.execute('DELETE FROM parents')
file.execute('UPDATE representations SET num_tokens = 7, label = hex(randomblob(3000))')
os.kill(os.getpid(), signal.SIGKILL)
"""


def tear(catalog: Path) -> None:
    """Kill a process that has written half a transaction into the file."""
    before = catalog.read_bytes()
    with child(TEAR, catalog) as process:
        assert process.wait(TIMEOUT_SECONDS) == -signal.SIGKILL
    assert catalog.read_bytes() != before
    assert catalog.with_name(f"{catalog.name}-journal").stat().st_size > 0


def test_what_a_killed_process_has_half_written_into_the_catalog_is_taken_back(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "db")
    with open_catalog(tmp_path / "db") as opened:
        before = opened.totals(), opened.rows()
    tear(catalog)
    with bp.open(tmp_path / "db") as db:
        assert db.catalog is not None
        assert (db.catalog.totals(), db.catalog.rows()) == before
        assert verify(db).is_clean
    assert_survived(tmp_path / "db", NUMBERS)


def forget_half(catalog: Path) -> None:
    with bp.open(catalog.parent) as db:
        assert db.catalog is not None
        db.catalog.forget(keys_of(prompt(0)))


def delete_half_of_another(catalog: Path) -> None:
    with bp.open(catalog.parent) as db:
        put_prompts(db, [0], author="lost")
        assert db.store.delete(keys_of(prompt(0, author="lost")[2:])) == 3


def replace_by_another(catalog: Path) -> None:
    catalog.unlink()
    execute(catalog, "CREATE TABLE mine (value)")


def replace_by_a_directory(catalog: Path) -> None:
    catalog.unlink()
    catalog.mkdir()


STATES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda catalog: catalog.write_bytes(b""),
    "garbage": lambda catalog: catalog.write_bytes(b"garbage" * 1000),
    "half": lambda catalog: os.truncate(catalog, catalog.stat().st_size // 8192 * 4096),
    "holes": lambda catalog: catalog.write_bytes(catalog.read_bytes()[:4096] + bytes(catalog.stat().st_size - 4096)),
    "foreign": replace_by_another,
    "unversioned": lambda catalog: execute(catalog, "DROP TABLE alembic_version"),
    "of an unknown revision": lambda catalog: execute(catalog, "UPDATE alembic_version SET version_num = '0000'"),
    "a directory": replace_by_a_directory,
    "without rows of blobs": forget_half,
    "with rows of no blobs": delete_half_of_another,
}


@pytest.mark.parametrize("state", STATES)
def test_whatever_becomes_of_the_catalog_hits_stay_hits_and_a_reindex_mends_it(tmp_path: Path, state: str) -> None:
    catalog = fill(tmp_path / "db")
    STATES[state](catalog)
    with bp.open(tmp_path / "db") as db:
        assert_reads_back(db, NUMBERS)
        put_prompts(db, [5])
        assert_reads_back(db, [5])
        assert verify(db).found in (Found.NOTHING, Found.CATALOG)
    with bp.open(tmp_path / "db") as db:
        reindex(db)
        assert verify(db).is_clean
    assert_survived(tmp_path / "db", [*NUMBERS, 5])


def test_a_catalog_of_a_newer_version_is_left_alone_and_not_needed(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "db")
    execute(catalog, "UPDATE alembic_version SET version_num = '9999'", "CREATE TABLE news (value)")
    before = catalog.read_bytes()
    with bp.open(tmp_path / "db") as db:
        assert_reads_back(db, NUMBERS)
        put_prompts(db, [5])
        assert_reads_back(db, [5])
        assert db.catalog is None
        with pytest.raises(CatalogTooNew):
            reindex(db)
    assert catalog.read_bytes() == before
    catalog.unlink()
    assert_survived(tmp_path / "db", [*NUMBERS, 5])


def test_a_database_without_its_manifest_is_refused_and_left_alone(tmp_path: Path) -> None:
    fill(tmp_path / "db")
    manifest = tmp_path / "db" / "manifest.json"
    manifest.rename(tmp_path / "kept.json")
    before = sorted((tmp_path / "db").rglob("*"))
    with pytest.raises(UnsafeLocation, match=r"no manifest\.json"):
        bp.open(tmp_path / "db")
    assert sorted((tmp_path / "db").rglob("*")) == before
    shutil.copy(tmp_path / "kept.json", manifest)
    assert_survived(tmp_path / "db", NUMBERS)
