"""Examinations of what is in a database: whether it can be written, leftovers, limit, secret, catalog, clock."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from backprompt_db.errors import CatalogError, CatalogTooNew
from backprompt_db.maintenance.differences import differences
from backprompt_db.maintenance.existing import CATALOG, STORE, open_catalog, open_existing, open_store
from backprompt_db.maintenance.findings import Finding, Status, Subject, fine
from backprompt_db.maintenance.integrity import catalog_flaws
from backprompt_db.maintenance.probe import probe
from backprompt_db.maintenance.reindex import reindex
from backprompt_db.maintenance.room import room_of
from backprompt_db.secret import digest_of

_LEFTOVERS = (".compact-*", ".*.json.*", ".CACHEDIR.TAG.*")
_LEFT_SECONDS = 3600
"""What nobody has changed for so long, nobody is at work on."""

_FUTURE_SECONDS = 60
"""By how much clocks of several machines may differ."""
_IN_FUTURE = "SELECT count(*) FROM representations WHERE created_at > ? OR last_used_at > ?"


def writing(subject: Subject) -> Finding:
    """Whether this user can write, and gets a turn."""
    if not os.access(subject.directory, os.W_OK) or not os.access(subject.directory / STORE / "data.mdb", os.W_OK):
        return Finding(
            Status.WARNING,
            "This user may only read: what is missing is computed each time.",
            "Ask the owner for write permission, if that is not meant.",
        )
    num_cleared = probe(subject.directory / STORE)
    readers = f" {num_cleared} slots of dead readers were cleared." if num_cleared else ""
    return fine(f"This user may write, and got a turn.{readers}")


def leftovers(subject: Subject) -> Finding:
    """Whether killed processes have left files that nobody needs."""
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
    return time.time()  # it is gone, and so somebody is at work


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def limit(subject: Subject) -> Finding:
    """Whether the limit is known, and kept."""
    room = room_of(subject.directory)
    if room.config_problem is not None:
        remedy = "Write it anew with `backprompt-db config --max-size SIZE`."
        return Finding(Status.PROBLEM, f"{room.config_problem}.", remedy)
    if room.max_nbytes is None:
        return fine("There is no limit; `backprompt-db config --max-size SIZE` sets one.")
    what = f"{room.live_nbytes or 0:,} of {room.max_nbytes:,} bytes are in use."
    if room.fullness is not None and room.fullness > 1:
        return Finding(Status.WARNING, what, "The next write evicts; or run `backprompt-db evict`.")
    return fine(what)


def secret(subject: Subject) -> Finding:
    """Whether the secret is the one that digests are keyed with; nobody can open the database otherwise."""
    digest_of(subject.manifest, subject.directory)  # which says what is wrong, as for one who opens it
    is_keyed = subject.manifest.secret_id is not None
    return fine("Digests are keyed with a secret." if is_keyed else "Digests find damage; they are not keyed.")


def catalog(subject: Subject) -> Finding:
    """Whether the catalog is there, of a schema that is known, and whole."""
    try:
        open_catalog(subject.directory).close()
    except CatalogTooNew as error:
        return Finding(Status.WARNING, f"{error.message}.", error.hint)
    except CatalogError as error:
        return _to_reindex(subject, Status.WARNING, f"{error.message}.")
    flaws = catalog_flaws(subject.directory / CATALOG)
    if flaws:
        return _to_reindex(subject, Status.PROBLEM, f"The catalog is damaged: {'; '.join(flaws)}.")
    return fine("The catalog is whole.")


def catalog_lag(subject: Subject) -> Finding:
    """Whether the catalog lists what the store holds."""
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
    """Whether something was made or used in the future."""
    latest = time.time() + _FUTURE_SECONDS
    uri = f"{(subject.directory / CATALOG).absolute().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            [(number,)] = connection.execute(_IN_FUTURE, (latest, latest))
    except sqlite3.Error as error:
        return Finding(Status.WARNING, f"It cannot be known without a catalog: {error}.", "Mend the catalog first.")
    if number:
        return Finding(
            Status.WARNING,
            f"{number:,} representations were made or used in the future: a clock is wrong, or was.",
            "Set the clocks of all machines. Ages count as 0 until then, and such parts are evicted late.",
        )
    return fine("Nothing was made or used in the future.")
