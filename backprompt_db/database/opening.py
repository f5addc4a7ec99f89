"""Opening a database: where it is, what it is made as, and what may be done there."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import filelock
import platformdirs

from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.database.config import default_config, sharing_of, write_config
from backprompt_db.database.database import MEMORY, Database
from backprompt_db.database.journal import make_marks_directory
from backprompt_db.database.location import access_problem, require_local
from backprompt_db.database.manifest import (
    KEYED,
    Manifest,
    digest_of,
    find_secret,
    read_manifest,
    secret_id,
    write_manifest,
)
from backprompt_db.database.single_flight import SingleFlight
from backprompt_db.errors import BackpromptError, CatalogError, FormatError, PromptError, UnsafeLocation
from backprompt_db.store.contract import Store
from backprompt_db.store.files import Sharing, make_directory
from backprompt_db.store.layered import LayeredStore
from backprompt_db.store.lmdb import LmdbStore
from backprompt_db.store.memory import MemoryStore
from backprompt_db.store.records import Digest
from backprompt_db.system.failpoints import reach
from backprompt_db.system.platform import give, group_number, require_directories

if TYPE_CHECKING:
    from backprompt_db.catalog.catalog import Catalog


logger = logging.getLogger(__name__)

READ, APPEND = "r", "a"
"""The modes of opening: for reading only, and for reading and writing."""

_FLIGHTS = "flights.lock"


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
    everything in memory. With `mode="r"` nothing is ever written, and there must be one; `"a"` reads and writes. `base`
    is another database, which is only read: what it has is found, what it lacks is kept here, in front of it. Both have
    the same fidelity, and a new one gets it from its base.
    `namespace` separates tenants: nothing stored in one is ever found in another. `strict` raises
    the errors of the store instead of computing what it could not give. `fidelity` says how closely a new database
    keeps keys and values: `"exact"`, the default, `"bfloat16"` or `"int8"`. What was used last stays in memory, up to
    `memory_nbytes`; the default is an eighth of the memory that is free. With `single_flight`, what another process is
    computing already is waited for; `$BACKPROMPT_DB_SINGLE_FLIGHT` turns it off when it is 0, and
    `$BACKPROMPT_DB_FLIGHT_SECONDS` says how long to wait without progress, 60 if not set.

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
    asked = None if fidelity is None else _fidelity(fidelity)
    below = None if base is None else _below(_absolute(base), asked)
    default = Fidelity.EXACT if below is None else below.manifest.fidelity
    options: dict[str, Any] = {"namespace": namespace, "strict": strict, "memory_nbytes": memory_nbytes}
    options["base"] = None if below is None else below.directory
    if location == MEMORY:
        store, seal = _layered(MemoryStore(), below), None if below is None else below.seal
        is_reader = mode == READ
        return Database(store, directory=None, readonly=is_reader, fidelity=asked or default, seal=seal, **options)
    directory = _absolute(location if location is not None else default_location())
    manifest = _manifest(directory, asked, default=None if mode == READ else default)
    _require_match(directory, manifest, below)
    readonly = not _may_write(directory, mode)
    options["single_flight"] = _single_flight(directory) if single_flight and not readonly else None
    return _open(directory, manifest, below, readonly=readonly, **options)


def _open(directory: Path, manifest: Manifest, below: _Below | None, *, readonly: bool, **options: Any) -> Database:
    digest = digest_of(manifest, directory)
    return Database(
        _layered(LmdbStore(directory / STORE, readonly=readonly, digest=digest), below),
        directory=directory,
        readonly=readonly,
        fidelity=manifest.fidelity,
        seal=None if manifest.secret_id is None else digest,
        **options,
    )


def _single_flight(directory: Path) -> SingleFlight:
    return SingleFlight(directory / _FLIGHTS, mode=sharing_of(directory).modes.lock)


class _Below(NamedTuple):
    """The database in front of which another one is opened."""

    directory: Path
    manifest: Manifest
    digest: Digest

    @property
    def seal(self) -> Digest | None:
        """What signs its notes, and those in front of it."""
        return None if self.manifest.secret_id is None else self.digest


def _below(directory: Path, asked: Fidelity | None) -> _Below:
    """Look at a base, before anything is made in front of it."""
    manifest = _manifest(directory, asked, default=None)
    digest = digest_of(manifest, directory)
    _may_write(directory, READ)
    return _Below(directory, manifest, digest)


def _absolute(location: str | os.PathLike[str]) -> Path:
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
    """Whether to write: where this user may not, it is said why. Raises for what cannot be read, or not be trusted."""
    sharing = sharing_of(directory)
    unreadable = access_problem(directory, sharing, readonly=True)
    if unreadable is not None:
        raise unreadable
    if mode == READ:
        return False
    problem = access_problem(directory, sharing, readonly=False)
    may_write = all(os.access(path, os.W_OK) for path in (directory, directory / STORE / "data.mdb"))
    if problem is not None or not may_write:
        why = f": {problem}" if problem is not None else ""
        logger.warning("%s is not writable: reading what is there, keeping nothing new%s", directory, why)
    return problem is None and may_write


def _require_match(directory: Path, manifest: Manifest, below: _Below | None) -> None:
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


def _layered(own: Store, below: _Below | None) -> Store:
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


STORE = "store"
_LOCK = "manifest.lock"
_NO_GROUP = 2**32 - 1
"""The first number that no group can have: it asks the kernel to change nothing."""


def create_database(
    directory: Path,
    *,
    sharing: Sharing = Sharing.PRIVATE,
    group: str | None = None,
    fidelity: Fidelity = Fidelity.EXACT,
    limits: Mapping[str, Any] = MappingProxyType({}),
) -> Manifest:
    """Make an empty database and return its manifest; of several processes one does, the others take what it made.

    `group` is a group's name or number, for the ways of sharing that have one; without it, the group that the directory
    has. `limits` are fields of `Config` that differ from the default: a limit of 50 GB, or of a quarter of the free
    space if that is less. With a secret in the environment, digests are keyed with it.

    Raises `UnsafeLocation` where no database can be, or may be made by this user.
    """
    require_local(directory)
    gid = None if group is None else group_id(group)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _give(directory, sharing, gid)
        with filelock.FileLock(directory / _LOCK, mode=sharing.modes.lock):
            return read_manifest(directory) or _fill(directory, sharing, fidelity, limits)
    except OSError as error:
        raise UnsafeLocation(
            f"no database can be made in {directory} ({error.strerror})", hint="Give a directory that you may write to."
        ) from error


def group_id(name: str) -> int:
    """Return the number of a group, given by name or number. Raises `UnsafeLocation` for an unknown one."""
    try:
        return _checked(int(name)) if name.isdecimal() else group_number(name)
    except KeyError:
        raise UnsafeLocation(f"there is no group {name!r}", hint="`getent group` lists the groups.") from None


def _checked(number: int) -> int:
    if number >= _NO_GROUP:
        raise KeyError(number)
    return number


def _give(directory: Path, sharing: Sharing, gid: int | None) -> None:
    """Give the directory to those who shall share it."""
    try:
        if gid is not None:
            give(directory, gid=gid, through_link=True)
        make_directory(directory, sharing.modes.directory)
    except PermissionError as error:
        given = f"the mode {sharing.modes.directory:04o}" + ("" if gid is None else f" and the group {gid}")
        raise UnsafeLocation(
            f"{directory} cannot be given {given}",
            hint="Only its owner may do that, for a group of which they are a member; or give a new directory.",
        ) from error


def _fill(directory: Path, sharing: Sharing, fidelity: Fidelity, limits: Mapping[str, Any]) -> Manifest:
    """Make everything in the directory, the manifest last: without it, creation starts over."""
    secret = find_secret(directory)
    manifest = Manifest(fidelity=fidelity)
    if secret is not None:
        manifest = Manifest(fidelity=fidelity, digest=KEYED, secret_id=secret_id(secret))
    LmdbStore.create(directory / STORE, digest=digest_of(manifest, directory), modes=sharing.modes).close()
    reach("create.store")
    make_marks_directory(directory, sharing.modes)
    write_config(directory, replace(default_config(directory, sharing=sharing), **limits))
    reach("create.manifest")
    write_manifest(directory, manifest, mode=sharing.modes.file)
    return manifest


CATALOG = "catalog.sqlite"


def manifest_of(directory: Path) -> Manifest:
    """Return the manifest of the database in `directory`; raises `UnsafeLocation` where there is none."""
    require_directories(directory)
    manifest = read_manifest(directory)
    if manifest is None:
        raise UnsafeLocation(
            f"there is no database in {directory}",
            hint="Give another directory with --db, or run a prompt there: that makes one.",
        )
    return manifest


def open_existing(directory: Path) -> Database:
    """Open the database in `directory`; raises `UnsafeLocation` where there is none."""
    from backprompt_db.database.opening import open_database

    manifest_of(directory)
    return open_database(directory)


def open_store(directory: Path) -> LmdbStore:
    """Open the store of the database in `directory` for reading; damaged parts are counted and stay where they are."""
    from backprompt_db.database.manifest import digest_of
    from backprompt_db.store.lmdb import LmdbStore

    manifest = manifest_of(directory)
    return LmdbStore(directory / STORE, readonly=True, digest=digest_of(manifest, directory))


def open_catalog(directory: Path) -> Catalog:
    """Open the catalog of the database in `directory` for reading.

    Raises `CatalogError` for one that is missing, damaged or of an older schema; `reindex` mends each of these.
    """
    from backprompt_db.catalog.catalog import Catalog

    manifest_of(directory)
    path = directory / CATALOG
    if not path.exists():
        raise CatalogError(
            f"the catalog {path} is missing",
            hint="Run `backprompt-db reindex`: it rebuilds the catalog from the store.",
        )
    return Catalog.open(path, readonly=True)
