"""Short connections to the catalog's file, and the one place where errors of SQLite become `CatalogError`.

Each operation opens a connection and closes it again, which takes some 0.3 ms. A pool would save that time. But its
connections must not be shared between threads, and none may be open when the process forks: SQLite keeps the locks that
a process holds in the memory of that process, and the child would believe that it has them too.
"""

from __future__ import annotations

import errno
import json
import sqlite3
import threading
import weakref
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, NullPool, create_engine, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from backprompt_db.catalog.plain_sql import STATEMENT_SECONDS, STEPS_BETWEEN_LOOKS, passing, require_regular
from backprompt_db.catalog.search import folded
from backprompt_db.errors import CatalogError
from backprompt_db.system.locks import NOTICE_SECONDS, forgive, notice, patience_for, refuse, told_holders
from backprompt_db.system.platform import register_at_fork

if TYPE_CHECKING:
    from collections.abc import Iterator

OPERATION = threading.RLock()
"""Held during every operation, and by a fork, so that no child starts with half an operation in its memory."""

register_at_fork(before=OPERATION.acquire, after_in_parent=OPERATION.release, after_in_child=OPERATION.release)

_BUSY = "Another process has kept it locked; try again, and look for a process that hangs if this stays."
_FULL = "Free disk space; the store is not affected and the catalog catches up with the next reindex."
_SLOW = "Try again when the machine has less to do; if this stays, a reindex rebuilds the catalog from the store."
_DAMAGED = "Delete the file: the catalog is derived, and a reindex rebuilds it from the store."
_DENIED = "Open it as a user who may write to the file and its directory."
_MISSING = "Check that the path is a file that this user may open, in a directory that exists."
_LINK = "Find out who made the link and why, and delete it; a reindex rebuilds the catalog from the store."
_DISK = "Check the disk's space, quota and health; the catalog is derived, and a reindex rebuilds it from the store."
_OTHER = "If this stays, delete the file: the catalog is derived, and a reindex rebuilds it from the store."

_SQLITE_HINTS = {
    sqlite3.SQLITE_BUSY: _BUSY,
    sqlite3.SQLITE_LOCKED: _BUSY,
    sqlite3.SQLITE_INTERRUPT: _SLOW,
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_IOERR: _DISK,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_READONLY: _DENIED,
    sqlite3.SQLITE_PERM: _DENIED,
    sqlite3.SQLITE_CANTOPEN: _MISSING,
}
_PRAGMAS = (
    "PRAGMA journal_mode = TRUNCATE",
    "PRAGMA synchronous = NORMAL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA secure_delete = ON",
)
"""`secure_delete` overwrites what is deleted with zeros: texts that were purged must not stay in free pages.

`synchronous = FULL` would sync twice as often. On some filesystems it protects from a power cut at one moment where
NORMAL does not; but the file can be rebuilt. A process that is killed does no harm with either of them.
"""


@contextmanager
def catalog_errors(path: Path) -> Iterator[None]:
    """Turn whatever SQLAlchemy, SQLite or the operating system raises about `path` into `CatalogError`."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, OSError, UnicodeError, json.JSONDecodeError, OverflowError) as error:
        cause = (error.orig if isinstance(error, DBAPIError) else None) or error
        held = ""
        if _is_busy(cause):
            refuse(path)
            held = told_holders(path)
        raise CatalogError(f"the catalog {path} failed: {cause}{held}", hint=_hint(cause)) from error


def _is_busy(cause: BaseException) -> bool:
    return kind_of(cause) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def kind_of(cause: BaseException | None) -> int:
    """Return SQLite's kind of error: the low byte of its code, the rest of which says where it arose; 0 of others."""
    return getattr(cause, "sqlite_errorcode", 0) & 0xFF


def _hint(cause: BaseException) -> str:
    match cause:
        case sqlite3.Error():
            return _SQLITE_HINTS.get(kind_of(cause), _OTHER)
        case TimeoutError():
            return _BUSY
        case PermissionError():
            return _DENIED
        case FileNotFoundError() | NotADirectoryError() | IsADirectoryError():
            return _MISSING
        case OSError():
            return _LINK if cause.errno == errno.ELOOP else _DISK
    return _OTHER


class _Connection(sqlite3.Connection):
    """Closes its cursors with itself: one that an error left in the middle of a result would keep the file locked."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._cursors: weakref.WeakSet[sqlite3.Cursor] = weakref.WeakSet()

    def cursor(self, *arguments: Any, **options: Any) -> Any:
        """Return a new cursor."""
        cursor = super().cursor(*arguments, **options)
        self._cursors.add(cursor)
        return cursor

    def close(self) -> None:
        """Close the cursors, then the connection."""
        for cursor in list(self._cursors):
            cursor.close()
        super().close()


class CatalogFile:
    """An existing SQLite file, to which every operation opens a connection of its own. Safe to use from any thread."""

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self._path = path
        self._readonly = readonly
        self._is_closed = False
        self._engine = create_engine("sqlite://", creator=self._connect, poolclass=NullPool)
        event.listen(self._engine, "begin", self._begin)
        event.listen(self._engine, "before_cursor_execute", _limit_time)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection whose reads all see the file as it was at one moment."""
        with self._operation(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Yield a connection whose changes are all committed at the end or, after an error, none of them."""
        with self._operation(), self._engine.execution_options(begin="BEGIN IMMEDIATE").begin() as connection:
            yield connection
        forgive(self._path)

    def vacuum(self) -> None:
        """Rewrite the file without free pages."""
        with self._operation(), closing(self._connect()) as connection:
            connection.execute("VACUUM")

    def close(self) -> None:
        """Refuse all further operations. Nothing is lost: each of them has committed when it returned."""
        self._is_closed = True

    @contextmanager
    def _operation(self) -> Iterator[None]:
        if self._is_closed:
            raise CatalogError(f"the catalog {self._path} is closed", hint="Open it again.")
        with OPERATION, catalog_errors(self._path):
            yield

    def _connect(self) -> sqlite3.Connection:
        require_regular(self._path)
        # As a URI, because a plain path has no `mode`. Not mode=rwc: a catalog that somebody has deleted must be an
        # error, not an empty file without a schema. The pragmas are set here and not in a "connect" event, after
        # whose failure the connection would stay open.
        uri = f"{self._path.absolute().as_uri()}?mode={'ro' if self._readonly else 'rw'}"
        connection = sqlite3.connect(
            uri,
            uri=True,
            timeout=patience_for(self._path),
            isolation_level=None,
            check_same_thread=False,
            factory=_Connection,
        )
        connection.create_function("folded", 1, folded, deterministic=True)
        try:
            for pragma in () if self._readonly else _PRAGMAS:
                connection.execute(pragma)
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _begin(self, connection: Connection) -> None:
        # The driver would begin only before an INSERT, UPDATE or DELETE: too late for a read that must be consistent,
        # and without IMMEDIATE a write that has read first fails at once when another process writes.
        statement = connection.get_execution_options().get("begin", "BEGIN")
        patience = patience_for(self._path)
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)  # noqa: S101 - `_connect` made it
        try:
            _wait_no_longer_than(driver, min(NOTICE_SECONDS, patience))
            driver.execute(statement)
        except sqlite3.OperationalError as error:
            if patience <= NOTICE_SECONDS or not _is_busy(error):
                raise
            notice(self._path)
            _wait_no_longer_than(driver, patience - NOTICE_SECONDS)
            driver.execute(statement)
        _wait_no_longer_than(driver, patience)


def _wait_no_longer_than(driver: sqlite3.Connection, seconds: float) -> None:
    driver.execute(f"PRAGMA busy_timeout = {int(1000 * seconds)}")


_ROWS_PER_STATEMENT = 1_000


def _limit_time(
    connection: Connection, cursor: Any, _statement: str, parameters: Any, _context: object, executemany: Any
) -> None:
    num_statements = 1 + len(parameters) // _ROWS_PER_STATEMENT if executemany else 1
    seconds = connection.get_execution_options().get("statement_seconds", STATEMENT_SECONDS) * num_statements
    cursor.connection.set_progress_handler(passing(seconds), STEPS_BETWEEN_LOOKS)


_MAX_FLAWS = 10


def catalog_flaws(path: Path) -> list[str]:
    """Return what SQLite finds wrong with the catalog at `path`, at most 10 lines of each check."""
    try:
        require_regular(path)
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=patience_for(path))) as connection:
            damage = [str(line) for (line,) in connection.execute(f"PRAGMA integrity_check({_MAX_FLAWS})")]
            dangling = connection.execute("PRAGMA foreign_key_check").fetchmany(_MAX_FLAWS)
    except (sqlite3.Error, CatalogError) as error:
        return [f"it cannot be read: {error}"]
    flaws = [] if damage == ["ok"] else damage
    return flaws + [
        f"a row of {table} refers to a row of {target} that is not there" for table, _, target, _ in dangling
    ]
