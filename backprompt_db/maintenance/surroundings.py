"""Examinations of what a database runs on: libraries, filesystem, space."""

from __future__ import annotations

import platform
import shutil
import sqlite3
from importlib.metadata import PackageNotFoundError, version

from backprompt_db.errors import UnsafeLocation
from backprompt_db.filesystem import filesystem_of, require_local
from backprompt_db.maintenance.findings import Finding, Status, Subject, fine
from backprompt_db.maintenance.room import room_of

_NEEDED_TO_COMPUTE = ("torch", "transformers", "tokenizers")
_NEEDED = ("backprompt-db", "lmdb", "sqlalchemy", "safetensors", "numpy", "xxhash", "blake3")
_LITTLE_NBYTES = 1 << 30


def python(_: Subject) -> Finding:
    """Which interpreter and machine this is."""
    return fine(f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}.")


def libraries(_: Subject) -> Finding:
    """Which libraries there are. Nothing is imported for that."""
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
    """Whether the filesystem is one whose locks and maps work between all who use it."""
    try:
        require_local(subject.directory)
    except UnsafeLocation as error:
        return Finding(Status.PROBLEM, f"{error.message}.", error.hint)
    return fine(f"{subject.directory} is on {filesystem_of(subject.directory)}.")


def free_space(subject: Subject) -> Finding:
    """Whether the disk has room up to the limit."""
    free, room = shutil.disk_usage(subject.directory).free, room_of(subject.directory)
    to_come = None if room.max_nbytes is None else room.max_nbytes - (room.live_nbytes or 0)
    what = f"{free:,} bytes are free" + ("." if to_come is None else f", {max(0, to_come):,} may still be added.")
    if free < min(_LITTLE_NBYTES, _LITTLE_NBYTES if to_come is None else to_come):
        return Finding(
            Status.WARNING, what, "Free some space, or lower the limit: `backprompt-db config --max-size SIZE`."
        )
    return fine(what)
