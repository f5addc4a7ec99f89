"""One LMDB environment per process and file, whoever opens it.

LMDB's locks belong to the process, so its files must never be opened twice in one, nor an environment be used on the
other side of a fork. `shared_environment` hands the same `Environment` to every opener of the same file, counts them,
and has it reopened in a child.
"""

from __future__ import annotations

import threading
from pathlib import Path

from backprompt_db.store.environment import Environment, identity_of, missing
from backprompt_db.store.lmdb_errors import store_errors
from backprompt_db.store.lmdb_pages import check_length, check_pages
from backprompt_db.system.platform import register_at_fork

_environments: list[Environment] = []
_lock = threading.RLock()


def shared_environment(directory: Path, *, readonly: bool, is_new: bool = False) -> Environment:
    """Return this process's one environment for the files in `directory`; `release` it when done.

    Raises `StoreCorrupt` for files that are missing, empty, damaged or shorter than they claim (unless `is_new`): LMDB
    would map them all the same, and the first read of a missing page would kill the process.
    """
    directory = directory.absolute()
    with _lock, store_errors(directory):
        environment = _open_already(directory)
        if environment is None:
            if not is_new:
                _check_presence(directory)
                check_length(directory / "data.mdb")
                check_pages(directory / "data.mdb")
            environment = Environment(directory, readonly=readonly)
            _environments.append(environment)
        elif not readonly:
            environment.make_writable()
        environment.num_users += 1
        return environment


def _open_already(directory: Path) -> Environment | None:
    """Return the environment of the files in a directory, by whatever path it was opened.

    Compared are the lock files too: they stay when a compaction replaces the other.
    """
    data, lock = (identity_of(directory / name) for name in ("data.mdb", "lock.mdb"))
    for environment in _environments:
        if data == environment.data_identity or (lock is not None and lock == environment.lock_identity):
            environment.follow()
            return environment
    return None


def release(environment: Environment) -> None:
    """Give back an environment; the last user closes it."""
    with _lock:
        environment.num_users -= 1
        if not environment.num_users:
            environment.close()
            _environments.remove(environment)


def _check_presence(directory: Path) -> None:
    try:
        is_empty = not (directory / "data.mdb").stat().st_size
    except FileNotFoundError:
        raise missing(directory) from None
    if is_empty:
        raise missing(directory)


def _before_fork() -> None:
    _lock.acquire()
    for environment in _environments:
        environment.before_fork()


def _after_fork_in_parent() -> None:
    for environment in _environments:
        environment.after_fork_in_parent()
    _lock.release()


def _after_fork_in_child() -> None:
    for environment in _environments:
        environment.after_fork_in_child()
    _lock.release()


register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
