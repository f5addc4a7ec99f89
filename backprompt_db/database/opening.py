"""Opening a database: where it is, whether it may be written to, and what is opened in front of what."""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import platformdirs

from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.database.config import sharing_of
from backprompt_db.database.creating import create_database
from backprompt_db.database.database import MEMORY, Database
from backprompt_db.database.location import CATALOG, FLIGHTS_LOCK, STORE, access_problem, require_local, wide_files
from backprompt_db.database.manifest import Manifest, digest_of, read_manifest
from backprompt_db.database.single_flight import SingleFlight
from backprompt_db.errors import BackpromptError, CatalogError, FormatError, PromptError, StoreReadOnly, UnsafeLocation
from backprompt_db.store.contract import Store
from backprompt_db.store.files import DATA, Sharing
from backprompt_db.store.layered import LayeredStore
from backprompt_db.store.lmdb import LmdbStore
from backprompt_db.store.memory import MemoryStore
from backprompt_db.store.records import Digest, xxh3_128
from backprompt_db.system.platform import require_directories

if TYPE_CHECKING:
    from backprompt_db.catalog.catalog import Catalog


logger = logging.getLogger(__name__)

READ, APPEND = "r", "a"
"""The modes of opening: for reading only, and for reading and writing."""


def default_location() -> Path:
    """Return `$BACKPROMPT_DB`, else a directory in the platform's user cache directory."""
    return Path(os.environ.get("BACKPROMPT_DB") or platformdirs.user_cache_dir("backprompt-db", appauthor=False))


def open_database(
    location: str | os.PathLike[str] | None = None,
    *,
    mode: str = APPEND,
    base: str | os.PathLike[str] | None = None,
    namespace: str = "",
    strict: bool = False,
    fidelity: str | None = None,
    memory_nbytes: int | None = None,
    single_flight: bool = True,
) -> Database:
    """Open the database in a directory, making it if there is none, and return it.

    `location` defaults to `$BACKPROMPT_DB`, else a directory in the platform's user cache directory; `":memory:"` keeps
    everything in memory. With `mode="r"` the database must exist, and nothing is ever written; `"a"` reads and writes.
    `namespace` separates tenants: nothing stored in one is ever found in another.

    `base` is another database, which is only read: what it has is found, and what it lacks is kept here, in front of
    it. Both have the same fidelity; a new database gets that of its base. `fidelity` says how closely a new database
    keeps keys and values: `"exact"`, the default, `"bfloat16"` or `"int8"`.

    `strict` raises the errors of the store; without it, what the store could not give is computed. What was used last
    stays in memory, up to `memory_nbytes`; the default is an eighth of the memory that is free, at any time. With
    `single_flight`, what another process is computing is waited for; `$BACKPROMPT_DB_SINGLE_FLIGHT` turns this off when
    it is 0, and `$BACKPROMPT_DB_FLIGHT_SECONDS` says how long to wait without progress, 60 if not set.

    A directory that may not be written to is read, and what is missing is computed but not kept; this is logged once.
    A new one is private to its user, and has a limit of 50 GB, or of a quarter of the free space if that is less;
    `backprompt-db init` and `config` have others.

    Raises `UnsafeLocation` for a place where no database can be, `StoreReadOnly` for one that may not be read,
    `FormatTooNew` for one written by a newer version, `FormatError` for one of another fidelity or secret than the one
    asked for, and `StoreCorrupt` for a damaged one.

    >>> with open_database(":memory:") as db:
    ...     db
    <Database :memory:>
    """
    if mode not in (READ, APPEND):
        raise PromptError(f"there is no mode {mode!r}", hint='Give "r" to read only, or "a" to read and write.')
    if not isinstance(namespace, str):
        raise PromptError(f"namespace={namespace!r} is not a name", hint="Give a str.")
    asked = None if fidelity is None else _fidelity(fidelity)
    below = None if base is None else _look_at(_absolute(base), asked)
    default = Fidelity.EXACT if below is None else below.manifest.fidelity
    options: dict[str, Any] = {"namespace": namespace, "strict": strict, "memory_nbytes": memory_nbytes}
    options["base"] = None if below is None else below.directory
    if location == MEMORY:
        store, seal = _layered(MemoryStore(), below), xxh3_128 if below is None else below.digest
        is_reader = mode == READ
        return Database(store, directory=None, readonly=is_reader, fidelity=asked or default, seal=seal, **options)
    directory = _absolute(location if location is not None else default_location())
    manifest = _manifest(directory, asked, default=None if mode == READ else default)
    _require_match(directory, manifest, below)
    readonly = not _may_write(directory, mode)
    options["single_flight"] = _single_flight(directory) if single_flight and not readonly else None
    return _open(directory, manifest, below, readonly=readonly, **options)


def _open(directory: Path, manifest: Manifest, below: _Base | None, *, readonly: bool, **options: Any) -> Database:
    digest = digest_of(manifest, directory)
    return Database(
        _layered(LmdbStore(directory / STORE, readonly=readonly, digest=digest), below),
        directory=directory,
        readonly=readonly,
        fidelity=manifest.fidelity,
        seal=digest,
        **options,
    )


def _single_flight(directory: Path) -> SingleFlight:
    return SingleFlight(directory / FLIGHTS_LOCK, mode=sharing_of(directory).modes.writers)


class _Base(NamedTuple):
    """The database in front of which another one is opened."""

    directory: Path
    manifest: Manifest
    digest: Digest


def _look_at(directory: Path, asked: Fidelity | None) -> _Base:
    """Read what a base is, before anything is made in front of it."""
    manifest = _manifest(directory, asked, default=None)
    digest = digest_of(manifest, directory)
    _may_write(directory, READ)
    return _Base(directory, manifest, digest)


def _absolute(location: str | os.PathLike[str]) -> Path:
    if not os.fspath(location):
        raise UnsafeLocation("an empty string is no directory", hint='Give a directory; "." is the current one.')
    return Path(location).expanduser().absolute()


def _manifest(directory: Path, asked: Fidelity | None, *, default: Fidelity | None) -> Manifest:
    """Return the manifest of a database; without one it is made now, unless there is no `default` fidelity.

    Raises `FormatError` for another fidelity than the one that is asked for.
    """
    require_local(directory)
    manifest = read_manifest(directory)
    if manifest is None and default is None:
        raise UnsafeLocation(f"there is no database in {directory}", hint='Open it with mode="a", which makes one.')
    if manifest is None:
        manifest = create_database(directory, fidelity=asked or default or Fidelity.EXACT)
    if asked not in (None, manifest.fidelity):
        raise FormatError(
            f"{directory} keeps keys and values {manifest.fidelity}, not {asked}",
            hint="A database's fidelity is fixed when it is made: open it without fidelity=, or another directory.",
        )
    return manifest


def _may_write(directory: Path, mode: str) -> bool:
    """Whether to write; where this user may not, the reason is logged. Raises for what cannot be read or trusted."""
    sharing = sharing_of(directory)
    unreadable = access_problem(directory, sharing, readonly=True)
    if unreadable is not None:
        raise unreadable
    _warn_of_wide_files(directory, sharing)
    if mode == READ:
        return False
    problem = access_problem(directory, sharing, readonly=False)
    if isinstance(problem, UnsafeLocation):
        raise problem
    may_write = all(os.access(path, os.W_OK) for path in (directory, directory / STORE / DATA))
    if problem is not None or not may_write:
        why = f": {problem}" if problem is not None else ""
        logger.warning("%s is not writable: reading what is there, keeping nothing new%s", directory, why)
    return problem is None and may_write


_known_as_wide: set[Path] = set()
"""Of which directories this process has logged that more people may use them than should."""


def _warn_of_wide_files(directory: Path, sharing: Sharing) -> None:
    wide = wide_files(directory, sharing)
    if wide and directory not in _known_as_wide:
        _known_as_wide.add(directory)
        doctor = f"`backprompt-db doctor --fix --db {shlex.quote(str(directory))}`"
        logger.warning(
            "more people may use %d files than %s sharing says: %s; %s mends them", len(wide), sharing, wide[0], doctor
        )


def _require_match(directory: Path, manifest: Manifest, below: _Base | None) -> None:
    """Raise `FormatError` for a base of another fidelity, and `PromptError` where it is the database itself."""
    if below is None:
        return
    if below.directory.resolve() == directory.resolve():
        raise PromptError(f"{directory} cannot be its own base", hint="Give the directory of another database.")
    if below.manifest.fidelity is not manifest.fidelity:
        raise FormatError(
            f"{below.directory} keeps keys and values {below.manifest.fidelity}, and {directory} {manifest.fidelity}",
            hint="Open it with a base of its own fidelity, or open a new directory: it gets that of its base.",
        )


def _layered(own: Store, below: _Base | None) -> Store:
    """Put a store in front of that of the database below, if there is one."""
    if below is None:
        return own
    try:
        return LayeredStore(own, LmdbStore(below.directory / STORE, readonly=True, digest=below.digest))
    except BackpromptError:
        own.close()
        raise


def _fidelity(name: str) -> Fidelity:
    try:
        return Fidelity(name)
    except ValueError:
        known = ", ".join(repr(each.value) for each in Fidelity)
        raise FormatError(f"there is no fidelity {name!r}", hint=f"Give one of {known}.") from None


_MAKE_ONE = "Give another directory with --db, or run a prompt there: that makes one."


def manifest_of(directory: Path, *, hint: str = _MAKE_ONE) -> Manifest:
    """Return the manifest of the database in `directory`; raises `UnsafeLocation`, with `hint`, where there is none."""
    require_directories(directory)
    manifest = read_manifest(directory)
    if manifest is None:
        raise UnsafeLocation(f"there is no database in {directory}", hint=hint)
    return manifest


def open_existing(directory: Path) -> Database:
    """Open the database in `directory`; raises `UnsafeLocation` where there is none."""
    manifest_of(directory)
    return open_database(directory)


def open_store(directory: Path) -> LmdbStore:
    """Open the store of the database in `directory` for reading; damaged parts are counted and stay where they are."""
    manifest = manifest_of(directory)
    try:
        return LmdbStore(directory / STORE, readonly=True, digest=digest_of(manifest, directory))
    except StoreReadOnly as error:
        raise (access_problem(directory, sharing_of(directory), readonly=True) or error) from error


def open_catalog(directory: Path) -> Catalog:
    """Open the catalog of the database in `directory` for reading.

    Raises `CatalogError` for one that is missing, damaged or of an older schema, each of which `reindex` mends, and for
    one that this user may not read.
    """
    from backprompt_db.catalog.catalog import Catalog

    manifest_of(directory)
    path = directory / CATALOG
    if not path.exists():
        raise CatalogError(
            f"the catalog {path} is missing",
            hint="Run `backprompt-db reindex`: it rebuilds the catalog from the store.",
        )
    if not os.access(path, os.R_OK):
        problem = access_problem(directory, sharing_of(directory), readonly=False)
        raise CatalogError(
            f"the catalog {path} cannot be read",
            hint="Ask its owner for permission to read it." if problem is None else problem.hint,
        )
    return Catalog.open(path, readonly=True)
