"""What the doctor looks at, one function for each: the machine, the files and who may use them, the catalog, the clock.

They come in the order in which `doctor.py` calls them. `share` sets the permissions that `permissions` looks at.
"""

from __future__ import annotations

import contextlib
import enum
import os
import platform
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from backprompt_db.catalog.connection import catalog_flaws
from backprompt_db.catalog.plain_sql import rows
from backprompt_db.database.config import sharing_of
from backprompt_db.database.creating import group_id
from backprompt_db.database.location import CATALOG, STORE, Fault, access_problem, faults, require_local
from backprompt_db.database.manifest import Manifest, digest_of
from backprompt_db.database.opening import open_catalog, open_existing, open_store
from backprompt_db.database.reconcile import differences
from backprompt_db.database.signatures import changed_rows
from backprompt_db.errors import (
    CatalogError,
    CatalogTooNew,
    FormatError,
    StoreError,
    StoreLocked,
    StoreReadOnly,
    UnsafeLocation,
)
from backprompt_db.operations.disk_usage import room_of
from backprompt_db.operations.reindex import reindex
from backprompt_db.store.environment import LMDB_GENERATION, release, shared_environment
from backprompt_db.store.files import DATA, READER_TABLE, Sharing
from backprompt_db.store.lmdb_errors import store_errors
from backprompt_db.store.lmdb_pages import check_length, check_pages
from backprompt_db.store.turns import give_turn, take_turn
from backprompt_db.system.platform import UNKNOWN, change_mode, filesystem_of, give
from backprompt_db.views.formatting import size

_NEEDED = ("backprompt-db", "lmdb", "sqlalchemy", "safetensors", "numpy", "xxhash", "blake3")
_NEEDED_TO_COMPUTE = ("torch", "transformers", "tokenizers")

_LITTLE_NBYTES = 1 << 30
_NUM_SHOWN = 3
_SECONDS = 5.0

_LEFTOVERS = (".compact-*", ".*.json.*", ".CACHEDIR.TAG.*")
_LEFT_SECONDS = 3600
"""A file that nobody has changed for so long is not in use."""

_FUTURE_SECONDS = 60
"""How far the clocks of several machines may be apart."""
_IN_FUTURE = "SELECT count(*) FROM representations WHERE created_at > :latest OR last_used_at > :latest"


class Status(enum.Enum):
    """How something is."""

    OK = "ok"
    WARNING = "warning"
    """It works, but not for long, or not as well as it could."""
    PROBLEM = "problem"
    """Something does not work, or not for everybody."""


class Subject(NamedTuple):
    """The database that is examined."""

    directory: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Finding:
    """How one thing is, and what can be done about it."""

    status: Status
    what: str
    remedy: str | None = None
    mend: Callable[[], object] | None = None
    """Does what the remedy says; None where that would lose something, or where people must decide."""


def fine(what: str) -> Finding:
    """Return the finding that all is well."""
    return Finding(Status.OK, what)


def python(_: Subject) -> Finding:
    """Tell which interpreter and machine this is."""
    return fine(f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}.")


def libraries(_: Subject) -> Finding:
    """Check that all libraries are installed, without importing them."""
    import lmdb

    versions = {name: _version(name) for name in (*_NEEDED, *_NEEDED_TO_COMPUTE)}
    engine = ".".join(map(str, lmdb.version()))
    listed = ", ".join(f"{name} {found or 'missing'}" for name, found in versions.items())
    what = f"{listed}, SQLite {sqlite3.sqlite_version}, LMDB {engine}."
    missing = [name for name in _NEEDED_TO_COMPUTE if versions[name] is None]
    if missing:
        return Finding(
            Status.WARNING,
            what,
            f"What is stored can be read; to compute what is missing, run `pip install {' '.join(missing)}`.",
        )
    return fine(what)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def filesystem(subject: Subject) -> Finding:
    """Check that locks and memory maps on this filesystem work for all who use it."""
    try:
        require_local(subject.directory)
    except UnsafeLocation as error:
        return Finding(Status.PROBLEM, f"{error.message}.", error.hint)
    kind = filesystem_of(subject.directory)
    if kind == UNKNOWN:
        return fine(f"The system does not say which filesystem {subject.directory} is on: it must be a local disk.")
    return fine(f"{subject.directory} is on {kind}.")


def free_space(subject: Subject) -> Finding:
    """Check that the disk has room up to the limit."""
    free, room = shutil.disk_usage(subject.directory).free, room_of(subject.directory)
    to_come = None if room.max_nbytes is None else room.max_nbytes - (room.live_nbytes or 0)
    what = f"{size(free)} are free" + ("." if to_come is None else f", {size(max(0, to_come))} may still be added.")
    if free < min(_LITTLE_NBYTES, _LITTLE_NBYTES if to_come is None else to_come):
        return Finding(
            Status.WARNING, what, "Free some space, or lower the limit: `backprompt-db config --max-size SIZE`."
        )
    return fine(what)


def directory(subject: Subject) -> Finding:
    """Check that strangers cannot put files into the directory."""
    mode = stat.S_IMODE(subject.directory.stat().st_mode)
    if not mode & stat.S_IWOTH:
        return fine(f"{subject.directory} has the mode {mode:04o}.")
    is_sticky = bool(mode & stat.S_ISVTX)
    return Finding(
        Status.WARNING if is_sticky else Status.PROBLEM,
        f"Everybody may put files into {subject.directory} ({mode:04o})"
        + ("." if is_sticky else ", and delete or replace those of others."),
        f"Run `chmod o-w {subject.directory}`.",
        mend=lambda: change_mode(subject.directory, mode & ~stat.S_IWOTH),
    )


def permissions(subject: Subject) -> Finding:
    """Check that every file has the owner, the group and the mode that the way of sharing asks for."""
    sharing = sharing_of(subject.directory)
    found = list(faults(subject.directory, sharing))
    if not found:
        return fine(f"All files are as {sharing.value} sharing needs them.")
    shown = [str(fault) for fault in found[:_NUM_SHOWN]]
    more = [f"{len(found) - _NUM_SHOWN} more"] if len(found) > _NUM_SHOWN else []
    return Finding(
        Status.PROBLEM,
        f"{'; '.join(shown + more)}.",
        "Run `backprompt-db doctor --fix` as their owner, or as root: it sets owner, group and mode.",
        mend=lambda: _mend(found),
    )


def share(directory: Path, sharing: Sharing, *, group: str | None) -> None:
    """Give a database and all its files the permissions of a way of sharing, and the group of its directory.

    With `group`, the directory gets that group first.

    Raises `StoreReadOnly` where this user may not.
    """
    try:
        if group is not None:
            give(directory, gid=group_id(group), through_link=True)
        _mend(faults(directory, sharing))
    except PermissionError as error:
        raise StoreReadOnly(
            f"{directory} and its files cannot be given other permissions",
            hint="Only its owner may, and only for a group of which they are a member; or root.",
        ) from error


def _mend(found: Iterable[Fault]) -> None:
    for path, status, uid, gid, mode in found:
        if (status.st_uid, status.st_gid) != (uid, gid):
            give(path, uid=uid, gid=gid)
        change_mode(path, mode)  # afterwards: a new owner clears the setgid bit


def writing(subject: Subject) -> Finding:
    """Check that this user can write, and gets a turn to do so."""
    if not os.access(subject.directory, os.W_OK) or not os.access(subject.directory / STORE / DATA, os.W_OK):
        return Finding(
            Status.WARNING,
            "This user may only read: what is missing is computed each time.",
            "Ask the owner for write permission, if that is not meant.",
        )
    problem = access_problem(subject.directory, sharing_of(subject.directory), readonly=False)
    if problem is not None:
        return Finding(Status.PROBLEM, f"{problem.message}.", problem.hint)
    num_cleared = probe(subject.directory / STORE)
    readers = f" {num_cleared} slots of dead readers were cleared." if num_cleared else ""
    return fine(f"This user may write, and got a turn.{readers}")


_SCRIPT = """
import lmdb, sys
with lmdb.open(sys.argv[1], create=False, lib_version=int(sys.argv[2])) as environment:
    num_cleared = environment.reader_check()
    environment.begin(write=True).abort()
print(num_cleared)
"""


def probe(store: Path, *, timeout_seconds: float = _SECONDS) -> int:
    """Take a writer's turn and LMDB's mutex in a store, and return how many slots of dead readers were cleared.

    Raises `StoreLocked` when the turn does not come in time, and `StoreError` when nothing can be written.
    """
    if not (store / READER_TABLE).exists():  # which LMDB would make with whatever permissions the umask leaves
        release(shared_environment(store, readonly=False))
    command = [sys.executable, "-c", _SCRIPT, str(store), str(LMDB_GENERATION)]
    try:
        with store_errors(store), contextlib.ExitStack() as stack:
            stack.callback(give_turn, take_turn(store))
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired:
        raise StoreLocked(
            f"somebody has been writing to {store} for {timeout_seconds:g} s or longer",
            hint="Look for a process that is stopped or hangs, and end it: what it was writing is undone.",
        ) from None
    if done.returncode:
        lines = done.stderr.splitlines() or ["it was killed"]
        raise StoreError(f"nothing can be written to {store}: {lines[-1]}", hint="Mend what the message says.")
    return int(done.stdout)


def store_file(subject: Subject) -> Finding:
    """Check that the store's file is whole and that LMDB can walk all of its pages; what is stored is not read."""
    data = subject.directory / STORE / DATA
    check_length(data)
    check_pages(data, however_many=True)
    return fine("The file of the store is whole.")


def leftovers(subject: Subject) -> Finding:
    """Look for files that killed processes have left and nobody needs."""
    found = list(_leftovers(subject.directory))
    if not found:
        return fine("Nothing was left by processes that were killed.")
    return Finding(
        Status.WARNING,
        f"Left by processes that were killed: {', '.join(map(str, found))}.",
        "Delete them, or run `backprompt-db doctor --fix`.",
        mend=lambda: _remove(found),
    )


def _leftovers(directory: Path) -> list[Path]:
    now = time.time()
    paths = [path for folder in (directory, directory / STORE) for each in _LEFTOVERS for path in folder.glob(each)]
    return [path for path in paths if now - _changed_at(path) > _LEFT_SECONDS]


def _changed_at(path: Path) -> float:
    with contextlib.suppress(OSError):
        return max(each.lstat().st_mtime for each in (path, *path.glob("*")))
    return time.time()  # it has vanished, so somebody is at work on it


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def limit(subject: Subject) -> Finding:
    """Check that the limit is known, and kept."""
    room = room_of(subject.directory)
    if room.config_problem is not None:
        remedy = "Write it anew with `backprompt-db config --max-size SIZE`."
        return Finding(Status.PROBLEM, f"{room.config_problem}.", remedy)
    if room.max_nbytes is None:
        return fine("There is no limit; `backprompt-db config --max-size SIZE` sets one.")
    what = f"{size(room.live_nbytes or 0)} of {size(room.max_nbytes)} are in use."
    if room.fullness is not None and room.fullness > 1:
        return Finding(Status.WARNING, what, "The next write evicts; or run `backprompt-db evict`.")
    return fine(what)


def secret(subject: Subject) -> Finding:
    """Check that the secret is the one that digests are keyed with: the database cannot be opened with another."""
    digest_of(subject.manifest, subject.directory)  # raises what opening the database would raise
    is_keyed = subject.manifest.secret_id is not None
    return fine("Digests are keyed with a secret." if is_keyed else "Digests find damage; they are not keyed.")


def catalog(subject: Subject) -> Finding:
    """Check that there is a catalog, that its schema is known, and that it is whole and unchanged."""
    try:
        open_catalog(subject.directory).close()
    except CatalogTooNew as error:
        return Finding(Status.WARNING, f"{error.message}.", error.hint)
    except CatalogError as error:
        return _to_reindex(subject, Status.WARNING, f"{error.message}.")
    flaws = catalog_flaws(subject.directory / CATALOG)
    if flaws:
        return _to_reindex(subject, Status.PROBLEM, f"The catalog is damaged: {'; '.join(flaws)}.")
    num_changed = _num_changed_rows(subject)
    if num_changed:
        what = f"What {num_changed:,} of its rows remember is not what was written, and is not used."
        return _to_reindex(subject, Status.WARNING, what)
    with open_catalog(subject.directory) as opened:
        tables = opened.misfit_tables()
    if tables:
        what = f"The catalog is damaged: values in {', '.join(tables)} do not belong there."
        return _to_reindex(subject, Status.PROBLEM, what)
    return fine("The catalog is whole.")


def _num_changed_rows(subject: Subject) -> int:
    try:
        digest = digest_of(subject.manifest, subject.directory)
    except FormatError:  # which the check of the secret tells
        return 0
    with open_catalog(subject.directory) as opened:
        return sum(map(len, changed_rows(opened, digest).values()))


def catalog_lag(subject: Subject) -> Finding:
    """Check that the catalog lists what the store holds."""
    try:
        with contextlib.closing(open_store(subject.directory)) as store, open_catalog(subject.directory) as opened:
            found = Counter(difference.is_stored for difference in differences(store, opened))
    except CatalogError:
        return Finding(Status.WARNING, "It cannot be known without a catalog.", "Mend the catalog first.")
    if not found:
        return fine("The catalog lists what the store holds.")
    what = f"{found[True]:,} parts are stored and not listed, {found[False]:,} are listed and not stored."
    return _to_reindex(subject, Status.WARNING, what)


def _to_reindex(subject: Subject, status: Status, what: str) -> Finding:
    return Finding(status, what, "Run `backprompt-db reindex`.", mend=lambda: _reindex(subject))


def _reindex(subject: Subject) -> None:
    with open_existing(subject.directory) as db:
        reindex(db)


def clock(subject: Subject) -> Finding:
    """Check that nothing was made or used in the future."""
    latest = time.time() + _FUTURE_SECONDS
    try:
        [(number,)] = rows(subject.directory / CATALOG, _IN_FUTURE, latest=latest)
    except CatalogError as error:
        what = f"It cannot be known without a catalog: {error.message}."
        return Finding(Status.WARNING, what, "Mend the catalog first.")
    if number:
        return Finding(
            Status.WARNING,
            f"{number:,} representations were made or used in the future: a clock is wrong, or was.",
            "Set the clocks of all machines. Ages count as 0 until then, and such parts are evicted late.",
        )
    return fine("Nothing was made or used in the future.")
