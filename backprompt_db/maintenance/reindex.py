"""Reindexing: making the catalog agree with the store, from which all of it can be derived."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from backprompt_db.config import sharing_of
from backprompt_db.database import Database
from backprompt_db.errors import CatalogError, CatalogTooNew, StoreLocked, StoreReadOnly
from backprompt_db.failpoints import reach
from backprompt_db.maintenance.differences import Difference, differences
from backprompt_db.maintenance.existing import CATALOG
from backprompt_db.maintenance.origins import read_origin
from backprompt_db.store.contract import Key
from backprompt_db.store.locks import exclusive_lock

if TYPE_CHECKING:
    from backprompt_db.catalog import Catalog, StoredPart
    from backprompt_db.store.contract import Store

_LOCK = "reindex.lock"
_PARTS_PER_TRANSACTION = 5_000
"""The more, the fewer pages of the catalog are written several times, and the longer others wait to write."""
_CHARACTERS_PER_TRANSACTION = 16 << 20
"""Of texts, which are in memory until they are entered."""
_SIDE_FILES = ("", "-journal", "-wal", "-shm")
"""A journal left behind would be played back into the new catalog."""

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
"""Failures that say nothing about the file."""


@dataclass(frozen=True, slots=True)
class Reindexing:
    """What a reindexing changed."""

    num_added: int
    """Parts that were in the store but not in the catalog."""
    num_forgotten: int
    """Parts that were in the catalog but not in the store."""
    num_unreadable: int
    """Parts in the store that cannot be used, and are not entered."""
    moved_aside: Path | None = None
    """Where a damaged catalog was moved to; None when the catalog could be kept."""


def reindex(db: Database) -> Reindexing:
    """Enter what the catalog lacks, forget what the store lacks; hits, pins and labels of the rest are kept.

    A catalog that is damaged is moved aside and built anew; what only it knew (hits, pins, labels, models' names,
    counts) is lost. Files that are made have the permissions that the database is shared with. What is entered counts
    as created now. One that is killed can be repeated, and goes on where it was. Memory does not grow with the size of
    the database.

    Of a part, only what it was computed from is read: `verify` is what finds damage in its arrays.

    Raises `StoreReadOnly` for a database that may not be written to, `StoreLocked` while another process reindexes it,
    `CatalogTooNew` for a catalog of a newer version, and `CatalogError` when the catalog is locked or the disk full.
    """
    path = _writable_directory(db) / CATALOG
    modes = sharing_of(path.parent).modes
    with _alone(path.parent, mode=modes.lock):
        try:
            return _reconcile(db.store, path, mode=modes.file, moved_aside=None)
        except CatalogError as error:
            if not _is_damage(error):
                raise
        return _reconcile(db.store, path, mode=modes.file, moved_aside=_move_aside(path))


def _writable_directory(db: Database) -> Path:
    if db.directory is None:
        raise CatalogError("a database in memory has no catalog", hint="Open a database in a directory.")
    if db.readonly:
        raise StoreReadOnly(f"{db.directory} may only be read", hint="Reindex it as a user who may write to it.")
    return db.directory


@contextlib.contextmanager
def _alone(directory: Path, *, mode: int) -> Iterator[None]:
    """Keep a second process from moving aside what the first has just rebuilt."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive_lock(directory / _LOCK, mode=mode, timeout_seconds=0))
        except StoreLocked:
            raise StoreLocked(f"another process is reindexing {directory}", hint="Wait until it is done.") from None
        yield


def _reconcile(store: Store, path: Path, *, mode: int, moved_aside: Path | None) -> Reindexing:
    from backprompt_db.catalog import Catalog

    with Catalog.open(path, mode=mode) as catalog:
        _check_integrity(path)
        return replace(reconcile(store, catalog), moved_aside=moved_aside)


def reconcile(store: Store, catalog: Catalog) -> Reindexing:
    """Enter in a whole catalog what it lacks, and forget what the store lacks."""
    num_added = num_forgotten = num_unreadable = 0
    for batch in _batches(differences(store, catalog)):
        missing = {key: nbytes for key, nbytes in batch if nbytes is not None}
        added = _add(store, catalog, missing)
        num_forgotten += _forget(store, catalog, [found.key for found in batch if not found.is_stored])
        num_added += added
        num_unreadable += len(missing) - added
        reach("reindex.batch")
    return Reindexing(num_added, num_forgotten, num_unreadable)


def _add(store: Store, catalog: Catalog, sizes: Mapping[Key, int]) -> int:
    num_added = 0
    for parts in _by_length(_read(store, sizes)):
        catalog.record(parts, at=time.time())
        # Those that were evicted since they were read may have been forgotten before they were recorded.
        _forget(store, catalog, [Key(part.address, part.part) for part in parts])
        num_added += len(parts)
    return num_added


def _read(store: Store, sizes: Mapping[Key, int]) -> Iterator[StoredPart]:
    from backprompt_db.catalog import StoredPart

    for key, nbytes in sizes.items():
        origin = read_origin(store, key)
        if origin is not None:
            yield StoredPart(*key, nbytes, origin)


def _by_length(parts: Iterable[StoredPart]) -> Iterator[list[StoredPart]]:
    """Divide parts into lists, of which each holds texts of about as many characters as may be in memory, or fewer."""
    some: list[StoredPart] = []
    num_characters = 0
    for part in parts:
        some.append(part)
        num_characters += len(part.origin.text)
        if num_characters >= _CHARACTERS_PER_TRANSACTION:
            yield some
            some, num_characters = [], 0
    if some:
        yield some


def _forget(store: Store, catalog: Catalog, keys: list[Key]) -> int:
    gone = [key for key in keys if not store.has(key)]
    catalog.forget(gone)
    return len(gone)


def _batches(found: Iterable[Difference]) -> Iterator[list[Difference]]:
    remaining = iter(found)
    while batch := list(islice(remaining, _PARTS_PER_TRANSACTION)):
        yield batch


def _check_integrity(path: Path) -> None:
    """Raise `CatalogError` for damage that the queries of a reindexing need not meet."""
    from backprompt_db.catalog.connection import catalog_errors

    with catalog_errors(path), contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        verdict = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if verdict != "ok":
        raise CatalogError(f"the catalog {path} is damaged: {verdict}", hint="Run `backprompt-db reindex`.")


def _is_damage(error: CatalogError) -> bool:
    cause = getattr(error.__cause__, "orig", None) or error.__cause__
    if isinstance(error, CatalogTooNew) or isinstance(cause, OSError):
        return False
    # The low byte is the kind of error; the bytes above it say where in SQLite it arose.
    return getattr(cause, "sqlite_errorcode", 0) & 0xFF not in _PASSING


def _move_aside(path: Path) -> Path:
    timestamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    aside = path.with_name(f"{path.name}.damaged-{timestamp}")
    for suffix in _SIDE_FILES:
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{suffix}").replace(f"{aside}{suffix}")
    return aside
