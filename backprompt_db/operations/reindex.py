"""Reindexing: making the catalog agree with the store, and the index of texts agree with the catalog."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from backprompt_db.catalog.plain_sql import SUFFIXES
from backprompt_db.database.config import sharing_of
from backprompt_db.database.database import Database
from backprompt_db.database.location import CATALOG, REINDEX_LOCK
from backprompt_db.database.opening import open_catalog
from backprompt_db.database.reconcile import Reindexing, reconcile
from backprompt_db.database.signatures import changed_rows
from backprompt_db.errors import CatalogError, CatalogTooNew, StoreLocked, StoreReadOnly
from backprompt_db.store.files import locked

if TYPE_CHECKING:
    from backprompt_db.catalog.catalog import Catalog

_KEEPING_UP_SECONDS = 2.0

_PASSING = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
    }
)
"""SQLite's codes for failures that do not mean that the file is damaged."""


def reindex(db: Database) -> Reindexing:
    """Enter what the catalog lacks, forget what the store lacks; hits, pins and labels of the rest are kept.

    What it remembers of models and prompts is forgotten where it is not what was written, and found out again.

    A catalog that is damaged is moved aside and built anew; what only it knew (hits, pins, labels, models' names,
    counts) is lost. New files get the permissions that the database is shared with. What is entered counts as created
    now. After being killed it can be repeated, and goes on where it was. Memory does not grow with the size of the
    database.

    Only what a part was computed from is read; damage in its arrays is found by `verify`.

    Raises `StoreReadOnly` for a database that may not be written to, `StoreLocked` while another process reindexes it,
    `CatalogTooNew` for a catalog of a newer version, and `CatalogError` when the catalog is locked or the disk full.
    """
    path = _writable_directory(db) / CATALOG
    modes = sharing_of(path.parent).modes
    with _alone(path.parent, mode=modes.writers):
        try:
            return _reconcile(db, path, mode=modes.file, moved_aside=None)
        except CatalogError as error:
            if not _is_damage(error):
                raise
        return _reconcile(db, path, mode=modes.file, moved_aside=_move_aside(path))


def _writable_directory(db: Database) -> Path:
    if db.directory is None:
        raise CatalogError("a database in memory has no catalog", hint="Open a database in a directory.")
    if db.readonly:
        raise StoreReadOnly(f"{db.directory} may only be read", hint="Reindex it as a user who may write to it.")
    return db.directory


@contextlib.contextmanager
def _alone(directory: Path, *, mode: int) -> Iterator[None]:
    """Hold the lock of reindexing: a second process would move aside what the first has just rebuilt."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(directory / REINDEX_LOCK, mode=mode, timeout_seconds=0))
        except StoreLocked:
            raise StoreLocked(f"another process is reindexing {directory}", hint="Wait until it is done.") from None
        yield


def _reconcile(db: Database, path: Path, *, mode: int, moved_aside: Path | None) -> Reindexing:
    from backprompt_db.catalog.catalog import Catalog

    with Catalog.open(path, mode=mode) as catalog:
        _check_integrity(path)
        changed = changed_rows(catalog, db.model_metadata.seal)
        for table, rowids in changed.items():
            catalog.forget_remembered(table, rowids)
        _check_values(catalog, path)
        num_changed = sum(map(len, changed.values()))
        return replace(reconcile(db.store, catalog), moved_aside=moved_aside, num_changed_rows=num_changed)


def _check_integrity(path: Path) -> None:
    """Raise `CatalogError` for damage, which the queries of a reindexing may not come across."""
    from backprompt_db.catalog.connection import catalog_errors

    with catalog_errors(path), contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        verdict = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        dangling = connection.execute("PRAGMA foreign_key_check").fetchone()
    if verdict == "ok" and dangling is not None:
        verdict = f"a row of {dangling[0]} refers to a row of {dangling[2]} that is not there"
    if verdict != "ok":
        raise _damaged(path, verdict)


def _check_values(catalog: Catalog, path: Path) -> None:
    """Raise `CatalogError` for a value that does not belong in its column: nobody knows what stood there."""
    tables = catalog.misfit_tables()
    if tables:
        raise _damaged(path, f"values in {', '.join(tables)} do not belong there")


def _damaged(path: Path, detail: str) -> CatalogError:
    return CatalogError(f"the catalog {path} is damaged: {detail}", hint="Run `backprompt-db reindex`.")


def _is_damage(error: CatalogError) -> bool:
    from backprompt_db.catalog.connection import kind_of

    cause = getattr(error.__cause__, "orig", None) or error.__cause__
    if isinstance(error, CatalogTooNew) or isinstance(cause, OSError):
        return False
    return kind_of(cause) not in _PASSING


def _move_aside(path: Path) -> Path:
    timestamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    aside = path.with_name(f"{path.name}.damaged-{timestamp}")
    for suffix in SUFFIXES:  # SQLite would play a journal that is left behind back into the new catalog
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{suffix}").replace(f"{aside}{suffix}")
    return aside


def update_index(directory: Path) -> Iterator[int]:
    """Make the index, or bring it up to date, some texts at a time; yield how many are left, until none are.

    Raises `CatalogError` for a catalog that cannot be written to or read.
    """
    from backprompt_db.catalog.catalog import Catalog

    open_catalog(directory).close()  # which neither makes a catalog nor upgrades one
    with Catalog.open(directory / CATALOG) as catalog:
        yield from catalog.index_texts()


def keep_up_index(directory: Path) -> None:
    """Add to the index what was recorded since, for two seconds at most, if this user may write."""
    deadline = time.monotonic() + _KEEPING_UP_SECONDS
    with contextlib.suppress(CatalogError):
        for _ in itertools.takewhile(lambda _: time.monotonic() < deadline, update_index(directory)):
            pass
