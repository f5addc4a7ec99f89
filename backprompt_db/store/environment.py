"""The LMDB environments of a process: one for each file, whoever opens it.

LMDB's locks belong to the process. So its files must never be opened twice in one process, nor an environment be used
on the other side of a fork. `shared_environment` hands the same `Environment` to every opener of the same file and
counts them. An `Environment` is reopened in a forked child, follows a map that others have resized, and goes over to
the new file when a compaction has replaced the old one.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lmdb

from backprompt_db.errors import StoreClosed, StoreCorrupt, StoreLocked
from backprompt_db.store.contract import Usage
from backprompt_db.store.files import DATA, READER_TABLE, Identity, identity_of, make_reader_table
from backprompt_db.store.lmdb_errors import RESTORE, store_errors
from backprompt_db.store.lmdb_file import CheckedFile
from backprompt_db.store.lmdb_free import FreeLists
from backprompt_db.store.lmdb_meta import NUM_META_PAGES, newest_meta
from backprompt_db.store.lmdb_pages import check_length, check_pages
from backprompt_db.store.lmdb_trees import CheckedTree
from backprompt_db.store.transaction import CheckedTransaction
from backprompt_db.store.turns import give_turn, prepare_turns, take_turn
from backprompt_db.system.locks import is_locked, wait_for
from backprompt_db.system.platform import register_at_fork

LMDB_GENERATION = 0
"""The LMDB engine whose file format is used: 0.9, which every release of LMDB since 2011 reads."""

MAX_READERS = 2048
_MAP_NBYTES = 1 << 40
_MIN_MAP_NBYTES = 1 << 28
_FORK_SECONDS = 10
_LOOK_SECONDS = 0.1

_LOCK_HEADER_NBYTES, _READER_NBYTES = 192, 64
"""Sizes in LMDB's lock file: the header, which has room for one reader, and each further reader."""

_LIFE_BYTE = 0
"""The byte of lock.mdb that every process locks while it has the environment open, unless without locks."""


class Environment:
    """An LMDB environment that survives fork and resizing, shared by all of the process that open the same file."""

    def __init__(self, directory: Path, *, readonly: bool) -> None:
        self.directory = directory
        self.readonly = readonly
        self.num_users = 0
        self.data_identity: Identity | None = None
        self.lock_identity: Identity | None = None
        self._mutex = threading.RLock()  # held outside the condition: its own methods may be interrupted halfway
        self._idle = threading.Condition(self._mutex)
        self._active = set[object]()  # not a number: an interrupt could come before it is counted down
        self._num_gates = 0
        self._was_forked_in_use = False
        self._newest_tree: CheckedTree | None = None
        self._is_lockless = False
        self._data = directory / DATA
        self._lock_name = str(directory / READER_TABLE)  # a str: making a Path takes longer than asking for a lock
        self._env: lmdb.Environment | None = self._open()
        self._pid = os.getpid()

    @contextmanager
    def transaction(self, *, write: bool = False) -> Iterator[CheckedTransaction]:
        """Run one transaction; commit at the end, abort on an exception. Values are views that die with it."""
        use, turn = object(), list[int]()
        with store_errors(self.directory):
            try:
                transaction, turn = self._begin(use, write=write)
                with transaction:
                    try:
                        tree = self._tree(transaction.id(), write=write)
                        yield CheckedTransaction(transaction, tree, is_writing=write)
                    finally:
                        if self._is_lockless:
                            self._check_overtaken(transaction)
                if write:
                    self._lengthen()
            finally:
                self._active.discard(use)  # first: an interrupt could prevent any call of ours
                self._leave(use, turn)

    def usage(self) -> Usage:
        """Return the bytes of the pages in use, and of the file."""
        with store_errors(self.directory):
            use = object()
            try:
                env = self._enter(use, write=False)
                self._file.require_uncut()
                stat = env.stat()
                nbytes = self._data.stat().st_size
            finally:
                self._active.discard(use)
                self._leave(use)
        return Usage(live_nbytes(stat), nbytes)

    def copy_to(self, directory: Path) -> None:
        """Write a copy without free pages to a directory. Only inside a transaction of the same thread."""
        assert self._env is not None  # noqa: S101 - a transaction is running
        self._env.copy(str(directory), compact=True)

    def make_writable(self) -> None:
        """Open for writing what was open for reading."""
        with self._mutex, store_errors(self.directory):
            self._wait_until_idle()
            if self.readonly:
                self.readonly = False
                if not self._is_inherited():
                    self._reopen()

    def follow(self) -> None:
        """Go over to the file that a compaction has put in the place of the one that is open, if one has.

        Raises `StoreCorrupt` for any other file, and where there is none.
        """
        with self._mutex, store_errors(self.directory):
            if self._is_inherited() or self._is_current():
                return
            self._wait_until_idle()
            if self._is_current():  # by now: another thread did it
                return
            if not self._was_compacted():
                raise StoreCorrupt(
                    f"the store in {self.directory} was replaced while it was open",
                    hint="Close every handle of this database in this process, then open it again.",
                )
            self._reopen()

    def close(self) -> None:
        """Close the environment when no transaction is running."""
        with self._mutex:
            self._wait_until_idle()
            if self._env is not None and not self._was_forked_in_use:
                self._close(self._env)
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
        """Drop the parent's environment; the next transaction opens one of the child's own."""
        self._mutex = threading.RLock()
        self._idle = threading.Condition(self._mutex)
        self._was_forked_in_use = self._was_forked_in_use or bool(self._active)
        self._active, self._num_gates = set(), 0
        if self._env is not None and not self._was_forked_in_use:
            self._close(self._env)

    def _close(self, env: lmdb.Environment) -> None:
        env.close()
        self._file.close()

    def _is_inherited(self) -> bool:
        """Whether what is open is that of the process that forked this one, which opens its own when it is used."""
        return self._pid != os.getpid()

    def _begin(self, use: object, *, write: bool) -> tuple[lmdb.Transaction[memoryview], list[int]]:
        """Return a transaction, and its turn among the writers."""
        while True:
            env = self._enter(use, write=write)
            turn = list[int]()
            try:
                turn = take_turn(self.directory) if write else []
                if self._is_lockless:
                    self._check_alone()
                self._file.require_uncut()
                transaction = env.begin(write=write, buffers=True)
                if not write or self._is_current():
                    return transaction, turn
                transaction.abort()  # the file was compacted while this waited for its turn to write
                self._leave(use, turn)
            except lmdb.MapResizedError:
                self._leave(use, turn)
                self._adopt_map_size(env)
            except lmdb.ReadersFullError:
                self._leave(use, turn)
                if not env.reader_check():
                    raise
            except BaseException:
                self._leave(use, turn)
                raise

    def _tree(self, transaction_id: int, *, write: bool) -> CheckedTree:
        """Return the tree of records as a transaction finds it that has just begun.

        Raises `StoreCorrupt` where it may not write: LMDB would go on from another state than it believes to be there.
        """
        if not write:
            meta, tree = self._file.meta(transaction_id), self._newest_tree
            if tree is None or tree.meta is not meta:
                tree = self._newest_tree = CheckedTree(self._file, meta, meta.records)
            return tree
        meta = self._file.meta(transaction_id - 1)
        free = self._free_lists.at(meta)
        num_pages = self._file.nbytes() // meta.page_nbytes
        is_whole = num_pages > meta.last_page or free.are_all_from(num_pages, meta.last_page)
        if meta.transaction_id != transaction_id - 1 or not is_whole:
            raise self._file.overwritten()
        return CheckedTree(self._file, meta, meta.records, free=free)

    def _lengthen(self) -> None:
        """Make the file as long as LMDB counts: it may count free pages at the end that it never wrote.

        So whoever opens the file finds it whole at once. The caller has its turn among the writers.
        """
        assert self._env is not None  # noqa: S101 - a transaction has just ended
        nbytes = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        with suppress(OSError):  # it is not needed for correctness
            if self._data.stat().st_size < nbytes and self._is_current():
                os.truncate(self._data, nbytes)

    def _check_alone(self) -> None:
        """Raise `StoreLocked` while anybody who may write has the store open.

        A reader that cannot note in the lock file what it reads must be alone: writers would reuse the pages it reads.
        """
        try:
            is_alone = not is_locked(self._lock_name, _LIFE_BYTE)
        except PermissionError:
            is_alone = False
        if not is_alone:
            raise self._not_alone()

    def _check_overtaken(self, transaction: lmdb.Transaction[memoryview]) -> None:
        """Raise `StoreLocked` if somebody has written so much meanwhile that what was read may be wrong.

        A commit leaves the pages of the last two states as they are.
        """
        assert self._env is not None  # noqa: S101 - a transaction is running
        if self._env.info()["last_txnid"] > transaction.id() + 1:
            raise self._not_alone()

    def _not_alone(self) -> StoreLocked:
        return StoreLocked(
            f"{self.directory} is open elsewhere, and you may not write to its lock.mdb, where readers need a place",
            hint="Ask the owner to let you: `backprompt-db config --shared readers`; or wait until nobody has it open.",
        )

    def _enter(self, use: object, *, write: bool) -> lmdb.Environment:
        with self._mutex:
            self._idle.wait_for(lambda: not self._num_gates)
            if self._env is not None:
                self._follow(write=write)
            if self._env is None:
                raise StoreClosed(f"the store in {self.directory} was closed", hint="Open the database again.")
            if self._was_forked_in_use:
                raise StoreLocked(
                    f"this process was forked while another thread used {self.directory}",
                    hint="Open the database in the child by starting it with multiprocessing's spawn method.",
                )
            if self._is_inherited():
                self._env, self._pid = self._open(), os.getpid()
            self._active.add(use)
            return self._env

    def _follow(self, *, write: bool) -> None:
        """Use the newest file. What is read from an older or a deleted one is still right, so readers need not care."""
        if self._is_current():  # nearly always, and `follow` takes longer to find out
            return
        try:
            self.follow()
        except StoreCorrupt:
            if write:
                raise

    def _leave(self, use: object, turn: list[int] | None = None) -> None:
        self._active.discard(use)
        give_turn(turn or [])
        with self._mutex:
            self._idle.notify_all()

    def _adopt_map_size(self, env: lmdb.Environment) -> None:
        """Take over the size of the map, which another process has enlarged, once no transaction of ours is running."""
        with self._mutex:
            self._wait_until_idle()
            env.set_mapsize(0)

    def _wait_until_idle(self, *, timeout: float | None = None) -> None:
        """Wait until no transaction is running; none begins until the caller releases the condition."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        self._num_gates += 1  # without a gate, busy threads would alternate and never all be idle
        try:
            while self._active and (seconds := deadline - time.monotonic()) > 0:
                self._idle.wait(min(seconds, _LOOK_SECONDS))  # a thread that was interrupted notifies nobody
        finally:
            self._num_gates -= 1
            self._idle.notify_all()

    def _is_current(self) -> bool:
        """Whether the file that is open is still the one in the directory."""
        return identity_of(self._data) == self.data_identity

    def _was_compacted(self) -> bool:
        """Whether the file in the directory continues the open one: it has the same lock file and the same count.

        The lock file counts the transactions. A restored backup is behind that count, and another database has another
        lock file.
        """
        if identity_of(self.directory / READER_TABLE) != self.lock_identity:
            return False
        before = self._last_transaction_id()
        meta = newest_meta(self._data)
        return meta is not None and before <= meta.transaction_id <= self._last_transaction_id() + 1

    def _last_transaction_id(self) -> int:
        assert self._env is not None  # noqa: S101 - called for an open one
        self._file.require_uncut()
        transaction = self._env.begin()
        try:
            return int(transaction.id())
        finally:
            transaction.abort()

    def _reopen(self) -> None:
        if self._env is not None:
            self._close(self._env)
        self._env = self._open()

    def _open(self) -> lmdb.Environment:
        with store_errors(self.directory):
            while True:
                identity = identity_of(self._data)
                if identity is None:
                    raise missing(self.directory)
                if not self.readonly:
                    prepare_turns(self.directory)
                    make_reader_table(self.directory, nbytes=_LOCK_HEADER_NBYTES + (MAX_READERS - 1) * _READER_NBYTES)
                env = self._open_largest_map()
                try:
                    self._file = CheckedFile(self._data)
                except BaseException:
                    env.close()
                    raise
                if identity_of(self._data) == identity == self._file.identity:
                    break
                self._close(env)  # a compaction came in between: nobody knows which of the two files this is
            self._free_lists, self._newest_tree = FreeLists(self._file), None
            self.data_identity, self.lock_identity = identity, identity_of(self.directory / READER_TABLE)
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
        lock = Path(self._lock_name)
        self._is_lockless = self.readonly and not os.access(lock, os.W_OK)
        if not self._is_lockless:  # LMDB would wait without end for who opens the file, or says so
            wait_for(lambda: not is_locked(lock, _LIFE_BYTE, is_alone=True), lock)
        try:
            return lmdb.Environment(
                os.fsencode(self.directory),
                map_size=map_nbytes,
                readonly=self.readonly,
                lock=not self._is_lockless,
                create=not self.readonly,
                writemap=False,
                sync=True,
                metasync=True,
                readahead=True,
                max_readers=MAX_READERS,
                max_spare_txns=0,
                lib_version=LMDB_GENERATION,
            )
        except lmdb.LockError as error:  # another process has locked the byte that stands for our PID
            raise StoreLocked(
                f"{self.directory} is open in another container by a process with the same PID, {os.getpid()}",
                hint="Start both with `--pid=host`, or another program first in one of them, so that the PIDs differ.",
            ) from error


def live_nbytes(stat: Mapping[str, Any]) -> int:
    """Return the bytes of the pages in use, from what LMDB says of its tree."""
    num_pages = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] + NUM_META_PAGES
    return int(num_pages * stat["psize"])


def missing(directory: Path) -> StoreCorrupt:
    """Return the error for a store without its file."""
    return StoreCorrupt(
        f"{directory / DATA} is missing or empty although the database was created",
        hint=RESTORE,
    )


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
                check_length(directory / DATA)
                check_pages(directory / DATA)
            environment = Environment(directory, readonly=readonly)
            _environments.append(environment)
        elif not readonly:
            environment.make_writable()
        environment.num_users += 1
        return environment


def _open_already(directory: Path) -> Environment | None:
    """Return the environment of the files in a directory, by whatever path it was opened.

    The lock files are compared too: a compaction replaces the data file, and the lock file stays.
    """
    data, lock = (identity_of(directory / name) for name in (DATA, READER_TABLE))
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
        is_empty = not (directory / DATA).stat().st_size
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
