"""One LMDB environment per process and file, whoever opens it, across forks and resized maps.

LMDB's locks belong to the process, so its files must never be opened twice in one, nor an environment be used on the
other side of a fork. `shared_environment` hands the same `Environment` to every opener of the same file, counts them,
and reopens in a child.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from backprompt_db.errors import StoreClosed, StoreCorrupt, StoreLocked, UnsafeLocation
from backprompt_db.store.faults import store_errors

LMDB_GENERATION = 0
"""The LMDB engine whose file format is used: 0.9, which every release of LMDB since 2011 reads."""

MAX_READERS = 2048
_MAP_NBYTES = 1 << 40
_MIN_MAP_NBYTES = 1 << 28
_FILE_MODE = 0o600
_FORK_SECONDS = 10

_META = struct.Struct("<16x II 16x I 92x QQ".replace(" ", ""))
"""Of a meta page: skip the page header; magic, version; skip address and map size; page size; skip two tree roots; last
page, transaction id."""
_META_MAGIC = 0xBEEFC0DE
_MIN_META_NBYTES = 4096


class Environment:
    """An LMDB environment that survives fork and resizing, shared by all of the process that open the same file."""

    def __init__(self, directory: Path, *, readonly: bool) -> None:
        self.directory = directory
        self.readonly = readonly
        self.num_users = 0
        self._idle = threading.Condition()
        self._num_active = 0
        self._file = (0, 0)
        self._num_gates = 0
        self._was_forked_in_use = False
        self._env: lmdb.Environment | None = self._open()
        self._pid = os.getpid()

    @contextmanager
    def transaction(self, *, write: bool = False) -> Iterator[lmdb.Transaction[memoryview]]:
        """Run one transaction; commit at the end, abort on an exception. Values are views that die with it."""
        with store_errors(self.directory):
            transaction = self._begin(write=write)
            try:
                with transaction:
                    yield transaction
            finally:
                self._leave()

    def close(self) -> None:
        """Close the environment when no transaction is running."""
        with self._idle:
            self._wait_until_idle()
            if self._env is not None and not self._was_forked_in_use:
                self._env.close()
            self._env = None

    def before_fork(self) -> None:
        """Wait until no transaction is running, and let none begin.

        A child that closed an environment in use would give up its parent's reader slots, and wait for threads that it
        does not have. The wait is bounded: a write may wait for another process, and a signal handler may fork inside
        a transaction of its own thread.
        """
        self._idle.acquire()
        self._wait_until_idle(timeout=_FORK_SECONDS)

    def after_fork_in_parent(self) -> None:
        """Let transactions begin again."""
        self._idle.release()

    def after_fork_in_child(self) -> None:
        """Let go of the parent's environment; the next transaction opens the child's own."""
        self._idle = threading.Condition()
        self._was_forked_in_use = self._was_forked_in_use or self._num_active > 0
        self._num_active = self._num_gates = 0
        if self._env is not None and not self._was_forked_in_use:
            self._env.close()

    def _begin(self, *, write: bool) -> lmdb.Transaction[memoryview]:
        while True:
            env = self._enter(write=write)
            try:
                return env.begin(write=write, buffers=True)
            except lmdb.MapResizedError:
                self._leave()
                self._adopt_map_size(env)
            except lmdb.ReadersFullError:
                self._leave()
                if not env.reader_check():
                    raise
            except BaseException:
                self._leave()
                raise

    def _enter(self, *, write: bool) -> lmdb.Environment:
        with self._idle:
            self._idle.wait_for(lambda: not self._num_gates)
            if self._env is None:
                raise StoreClosed(f"the store in {self.directory} was closed", hint="Open the database again.")
            if self._was_forked_in_use:
                raise StoreLocked(
                    f"this process was forked while another thread used {self.directory}",
                    hint="Open the database in the child by starting it with multiprocessing's spawn method.",
                )
            if self._pid != os.getpid():
                self._env, self._pid = self._open(), os.getpid()
            if write and self._file != _identity(self.directory, is_new=False):
                raise StoreCorrupt(
                    f"the store in {self.directory} was replaced while it was open",
                    hint="Close every handle of this database in this process, then open it again.",
                )
            self._num_active += 1
            return self._env

    def _leave(self) -> None:
        with self._idle:
            self._num_active -= 1
            self._idle.notify_all()

    def _adopt_map_size(self, env: lmdb.Environment) -> None:
        """Another process enlarged the map: take its size over as soon as no transaction of ours is running."""
        with self._idle:
            self._wait_until_idle()
            env.set_mapsize(0)

    def _wait_until_idle(self, *, timeout: float | None = None) -> None:
        """Wait until no transaction is running; none begins until the caller lets go of the condition."""
        self._num_gates += 1  # without it, busy threads would take turns and never all be idle
        self._idle.wait_for(lambda: not self._num_active, timeout)
        self._num_gates -= 1
        self._idle.notify_all()

    def _open(self) -> lmdb.Environment:
        with store_errors(self.directory):
            env = self._open_largest_map()
            self._file = _identity(self.directory, is_new=True)
            if not self.readonly:
                env.reader_check()
            return env

    def _open_largest_map(self) -> lmdb.Environment:
        map_nbytes = _MAP_NBYTES
        while True:
            try:
                return self._open_map(map_nbytes)
            except lmdb.MemoryError:
                # Address space may be limited (RLIMIT_AS, containers): halve until it fits.
                if map_nbytes <= _MIN_MAP_NBYTES:
                    raise
                map_nbytes //= 2

    def _open_map(self, map_nbytes: int) -> lmdb.Environment:
        return lmdb.Environment(
            os.fsencode(self.directory),
            map_size=map_nbytes,
            readonly=self.readonly,
            lock=not self.readonly or os.access(self.directory / "lock.mdb", os.W_OK),
            create=not self.readonly,
            mode=_FILE_MODE,
            writemap=False,
            sync=True,
            metasync=True,
            readahead=True,
            max_readers=MAX_READERS,
            max_spare_txns=0,
            lib_version=LMDB_GENERATION,
        )


_environments: dict[tuple[int, int], Environment] = {}
_lock = threading.RLock()


def create_files(directory: Path) -> None:
    """Make the directory and an empty environment in it, private to the user whatever the umask."""
    with store_errors(directory):
        directory.mkdir(mode=0o700, exist_ok=True)
        if directory.is_symlink():
            raise UnsafeLocation(f"{directory} is a symbolic link", hint="Delete it, or give another directory.")
        directory.chmod(0o700)
        for name in ("data.mdb", "lock.mdb"):
            descriptor = os.open(directory / name, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE_MODE)
            os.fchmod(descriptor, _FILE_MODE)
            os.close(descriptor)
    release(shared_environment(directory, readonly=False, is_new=True))


def shared_environment(directory: Path, *, readonly: bool, is_new: bool = False) -> Environment:
    """Return this process's one environment for the files in `directory`; `release` it when done.

    Raises `StoreCorrupt` for files that are missing, empty or shorter than they claim (unless `is_new`): LMDB would
    map them all the same, and the first read of a missing page would kill the process.
    """
    directory = directory.absolute()
    with _lock:
        with store_errors(directory):
            identity = _identity(directory, is_new=is_new)
        if identity not in _environments:
            if not is_new:
                check_length(directory / "data.mdb")
            _environments[identity] = Environment(directory, readonly=readonly)
        environment = _environments[identity]
        if environment.readonly and not readonly:
            raise StoreLocked(
                f"this process has {directory} open for reading only",
                hint="Close that handle, then open it for writing.",
            )
        environment.num_users += 1
        return environment


def release(environment: Environment) -> None:
    """Give back an environment; the last user closes it."""
    with _lock:
        environment.num_users -= 1
        if not environment.num_users:
            environment.close()
            for identity in [identity for identity, other in _environments.items() if other is environment]:
                del _environments[identity]


def check_length(data: Path) -> None:
    """Raise `StoreCorrupt` unless the file holds all pages that its newest meta page counts."""
    with store_errors(data), data.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(_MIN_META_NBYTES)
        page_nbytes = _meta(first)[0] if len(first) == _MIN_META_NBYTES else 0
        file.seek(page_nbytes)
        metas = [_meta(page) for page in (first, file.read(_MIN_META_NBYTES)) if len(page) == _MIN_META_NBYTES]
    _, last_page, _ = max(metas, key=lambda meta: meta[2], default=(0, -1, 0))
    if not page_nbytes or (last_page + 1) * page_nbytes > size:
        raise StoreCorrupt(
            f"{data} is not a whole LMDB file: {size} bytes of {max(0, (last_page + 1) * page_nbytes)}",
            hint="Restore it from a backup, or delete the database directory: it will be computed again.",
        )


def _meta(page: bytes) -> tuple[int, int, int]:
    """Return page size, last page and transaction id of a meta page; zeros when it is none of ours."""
    magic, version, page_nbytes, last_page, transaction = _META.unpack_from(page)
    is_ours = magic == _META_MAGIC and version == 1 and 512 <= page_nbytes <= 65536
    return (page_nbytes, last_page, transaction) if is_ours else (0, -1, -1)


def _identity(directory: Path, *, is_new: bool) -> tuple[int, int]:
    try:
        status = (directory / "data.mdb").stat()
    except FileNotFoundError:
        raise _missing(directory) from None
    if not status.st_size and not is_new:
        raise _missing(directory)
    return status.st_dev, status.st_ino


def _missing(directory: Path) -> StoreCorrupt:
    return StoreCorrupt(
        f"{directory / 'data.mdb'} is missing or empty although the database was created",
        hint="Restore it from a backup, or delete the database directory: it will be computed again.",
    )


def _before_fork() -> None:
    _lock.acquire()
    for environment in _environments.values():
        environment.before_fork()


def _after_fork_in_parent() -> None:
    for environment in _environments.values():
        environment.after_fork_in_parent()
    _lock.release()


def _after_fork_in_child() -> None:
    for environment in _environments.values():
        environment.after_fork_in_child()
    _lock.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
