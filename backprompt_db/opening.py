"""Opening a database: where it is, what it is made as, and what may be done there."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import filelock
import platformdirs

from backprompt_db.database import MEMORY, Database
from backprompt_db.errors import FormatError, UnsafeLocation
from backprompt_db.fidelity import Fidelity
from backprompt_db.flights import Flights
from backprompt_db.manifest import Manifest, read_manifest, write_manifest
from backprompt_db.store.lmdb import LmdbStore
from backprompt_db.store.memory import MemoryStore

logger = logging.getLogger(__name__)

_STORE = "store"
_LOCK = "manifest.lock"
_FLIGHTS = "flights.lock"


def default_location() -> Path:
    """Return `$BACKPROMPT_DB`, else a directory in the platform's user cache directory."""
    return Path(os.environ.get("BACKPROMPT_DB") or platformdirs.user_cache_dir("backprompt-db", appauthor=False))


def open_database(
    location: str | os.PathLike[str] | None = None,
    *,
    namespace: str = "",
    strict: bool = False,
    fidelity: str | None = None,
    memory_nbytes: int | None = None,
    single_flight: bool = True,
) -> Database:
    """Open the database in a directory, making it if there is none, and return it.

    `location` defaults to `$BACKPROMPT_DB`, else a directory in the platform's user cache directory; `":memory:"` keeps
    everything in memory. `namespace` separates tenants: nothing stored in one is ever found in another. `strict` raises
    the errors of the store instead of computing what it could not give. `fidelity` says how closely a new database
    keeps keys and values: `"exact"`, the default, `"bfloat16"` or `"int8"`. What was used last stays in memory, up to
    `memory_nbytes`; the default is an eighth of the memory that is free. With `single_flight`, what another process is
    computing already is waited for; `$BACKPROMPT_DB_SINGLE_FLIGHT` turns it off when it is 0, and
    `$BACKPROMPT_DB_FLIGHT_SECONDS` says how long to wait without progress, 60 if not set.

    A directory that may not be written to is read, and what is missing is computed but not kept; this is logged once.

    Raises `UnsafeLocation` for a place where no database can be, `FormatTooNew` for one written by a newer version,
    `FormatError` for one of another fidelity than the one asked for, and `StoreCorrupt` for a damaged one.

    >>> with open_database(":memory:") as db:
    ...     db
    <Database :memory:>
    """
    asked = None if fidelity is None else _fidelity(fidelity)
    if location == MEMORY:
        return Database(
            MemoryStore(),
            directory=None,
            namespace=namespace,
            strict=strict,
            fidelity=asked or Fidelity.EXACT,
            memory_nbytes=memory_nbytes,
        )
    directory = Path(location if location is not None else default_location()).expanduser().absolute()
    manifest = _manifest(directory, asked)
    readonly = not os.access(directory, os.W_OK) or not os.access(directory / _STORE / "data.mdb", os.W_OK)
    if readonly:
        logger.warning("%s is not writable: reading what is there, keeping nothing new", directory)
    store = LmdbStore(directory / _STORE, readonly=readonly)
    return Database(
        store,
        directory=directory,
        readonly=readonly,
        namespace=namespace,
        strict=strict,
        fidelity=manifest.fidelity,
        memory_nbytes=memory_nbytes,
        flights=Flights(directory / _FLIGHTS if single_flight and not readonly else None),
    )


def _manifest(directory: Path, asked: Fidelity | None) -> Manifest:
    """Return the manifest of a database, made now if there is none. Raises `FormatError` for another fidelity."""
    manifest = read_manifest(directory) or _create(directory, Manifest(fidelity=asked or Fidelity.EXACT))
    if asked not in (None, manifest.fidelity):
        raise FormatError(
            f"{directory} keeps keys and values {manifest.fidelity}, not {asked}",
            hint="A database's fidelity is fixed when it is made: open it without fidelity=, or another directory.",
        )
    return manifest


def _fidelity(name: str) -> Fidelity:
    try:
        return Fidelity(name)
    except ValueError:
        known = ", ".join(repr(each.value) for each in Fidelity)
        raise FormatError(f"there is no fidelity {name!r}", hint=f"Give one of {known}.") from None


def _create(directory: Path, manifest: Manifest) -> Manifest:
    """Make an empty database and return its manifest; of several processes one does, the others take what it made."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with filelock.FileLock(directory / _LOCK, mode=0o600):
            made = read_manifest(directory)
            if made is None:
                LmdbStore.create(directory / _STORE).close()
                write_manifest(directory, manifest)
            return made or manifest
    except OSError as error:
        raise UnsafeLocation(
            f"no database can be made in {directory} ({error.strerror})", hint="Give a directory that you may write to."
        ) from error
