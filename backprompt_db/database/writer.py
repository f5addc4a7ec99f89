"""The writer: encodes queued parts on a thread of its own, while the caller goes on, and commits them in groups.

A group is stored in one transaction, then recorded in the catalog; where it would not fit, room is made for it first.
"""

from __future__ import annotations

import atexit
import logging
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backprompt_db.codec.blob import encode_pieces
from backprompt_db.codec.fidelity import Fidelity, reduce
from backprompt_db.database.catalogs import Catalogs
from backprompt_db.database.counters import Tally
from backprompt_db.database.eviction import Evictor
from backprompt_db.errors import BackpromptError, StoreClosed, StoreFull
from backprompt_db.prompt.representation import Arrays, Origin
from backprompt_db.store.contract import Blob, Key, Store, needs_of, replaces
from backprompt_db.system.platform import register_at_fork, step_back

if TYPE_CHECKING:
    from backprompt_db.catalog.catalog import Catalog

logger = logging.getLogger(__name__)

MAX_QUEUED_NBYTES = 512 << 20
"""Callers wait when more than this is queued."""

_GROUP_NBYTES = 128 << 20
"""A store transaction takes queued parts up to this size, and at least one."""

_GROUPS_PER_LIMIT = 16
"""No group is larger than this share of what may be live: room is made in small steps."""

_NUM_TRIES = 8
"""How often room is made for a group: other processes may take it, without making any."""

_SECONDS_BETWEEN_COUNTS = 1.0
"""How often the catalog is told what was counted, while parts are stored."""

_RECORD_NBYTES = 128
"""What a small part takes up beside its bytes."""

_PRIORITY = 10
"""The niceness of the thread that writes."""

_LOOK_SECONDS = 1.0
"""How often those who wait for the thread look whether it still lives."""

_OVERHEAD_NBYTES = 4096
"""What a part costs beside its arrays, roughly: millions of tiny ones must count for something."""


@dataclass(frozen=True, slots=True)
class NewPart:
    """A part that was computed and is to be stored."""

    key: Key
    arrays: Arrays
    origin: Origin

    @property
    def nbytes(self) -> int:
        """Bytes that the part takes up while it is queued: its arrays and what surrounds them."""
        return sum(array.nbytes for array in self.arrays.values()) + _OVERHEAD_NBYTES


class CatalogMissed(Exception):
    """Parts were stored, and could not be recorded; the cause says why, unless there is no catalog."""

    def __init__(self, new: set[Key]) -> None:
        super().__init__(new)
        self.new = new


class Writer:
    """Keeps the store and its catalog in step and below the limit. For any number of threads and processes.

    Parts that are `put` are stored on a thread of its own, several to a transaction; until then `get` finds them.
    Blobs that come from elsewhere are stored at once with `commit`.
    """

    def __init__(self, store: Store, catalogs: Catalogs, evictor: Evictor, *, fidelity: Fidelity, tally: Tally) -> None:
        self._store = store
        self._catalogs = catalogs
        self._evictor = evictor
        self._fidelity = fidelity
        self._tally = tally
        self._has_failed = False
        self._tell_at = 0.0
        self._reset()
        _writers.add(self)

    def _reset(self) -> None:
        """Begin with nothing queued. A child process does too: what its parent had queued is the parent's to write."""
        self._mutex = threading.RLock()  # taken by itself: a condition's own methods may be interrupted in between
        self._changed = threading.Condition(self._mutex)
        self._queue: dict[Key, NewPart] = {}
        self._queued_nbytes = 0
        self._num_queued = 0
        self._num_done = 0
        self._awaited: deque[tuple[int, Callable[[], None]]] = deque()
        """Whom to tell when how many are done."""
        self._failure: BackpromptError | None = None
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def max_group_nbytes(self, nbytes: int) -> int:
        """Return how much to store at once: `nbytes`, but no more than a small share of the limit."""
        max_live_nbytes = self._evictor.max_live_nbytes
        return nbytes if max_live_nbytes is None else min(nbytes, max_live_nbytes // _GROUPS_PER_LIMIT)

    def commit(self, blobs: Sequence[Blob], origins: Mapping[Key, Origin]) -> set[Key]:
        """Store and record blobs and return the keys that were new. Where they would not fit, room is made for them.

        Raises the `StoreError` that fits, and then nothing was stored, or `CatalogMissed`, and then everything was.
        """
        try:
            return self._store_and_record(blobs, origins)
        except StoreFull as error:
            if _is_disk_full(error):
                raise
        return self._make_room_and_commit(blobs, origins)

    def get(self, key: Key) -> Arrays | None:
        """Return the arrays of a part that is still queued; None for any other."""
        part = self._queue.get(key)
        return None if part is None else part.arrays

    def put(self, parts: Sequence[NewPart]) -> None:
        """Queue parts; waits while more than `MAX_QUEUED_NBYTES` are queued. Their arrays must not change any more.

        One that has grown takes the place of the one that is queued under its key.
        Raises `StoreClosed` after `close`.
        """
        self._wait_until(lambda: self._queued_nbytes <= MAX_QUEUED_NBYTES or self._is_closing)
        with self._mutex:
            if self._is_closing:
                raise StoreClosed("the database was closed", hint="Open it again with backprompt_db.open(...).")
            for part in parts:
                queued = self._queue.get(part.key)
                nbytes, taken_nbytes = part.nbytes, 0 if queued is None else queued.nbytes
                is_taken = queued is not None and not replaces(part.key, nbytes, taken_nbytes)
                if not is_taken:  # nothing is called from here on: an interrupt cannot come in between
                    self._queue[part.key] = part
                    self._queued_nbytes += nbytes - taken_nbytes
                    self._num_queued += queued is None
            self._changed.notify_all()
            has_thread = self._has_thread()
        if not has_thread:
            self._run_once()

    def flush(self) -> None:
        """Wait until everything queued by now is stored. Raises the first failure since the last flush."""
        goal = self._num_queued
        self._wait_until(lambda: self._num_done >= goal)
        with self._mutex:
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def when_done(self, then: Callable[[], None]) -> None:
        """Call `then`, which must not raise, as soon as everything queued by now is stored or given up."""
        with self._mutex:
            self._awaited.append((self._num_queued, then))
        self._tell()

    def close(self) -> None:
        """Store what is queued and end the thread."""
        with self._mutex:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        while self._queue:  # the thread has died
            self._run_once()

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so. A thread that dies meanwhile is started again, or its work is done here."""
        while True:
            with self._mutex:
                if self._changed.wait_for(is_so, timeout=_LOOK_SECONDS):
                    return
                has_thread = self._has_thread()
            if not has_thread:
                self._run_once()

    def _has_thread(self) -> bool:
        """Whether the thread lives, or could be started just now."""
        return (self._thread is not None and self._thread.is_alive()) or self._start_thread()

    def _start_thread(self) -> bool:
        self._thread = None
        thread = threading.Thread(target=self._run, name="backprompt-db writer", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads: a limit was reached, or the interpreter is shutting down
            return False
        self._thread = thread
        return True

    def _run(self) -> None:
        _yield_to_others()
        self._evictor.begin()
        while self._run_once():
            pass

    def _run_once(self) -> bool:
        """Store the next group; False when there is none and there will be none."""
        group: list[NewPart] = []
        try:
            group = self._next_group()
            self._store_group(group)
        except BaseException as error:  # nobody may wait for ever for what cannot be stored
            with self._mutex:
                group = group or list(self._queue.values())
            self._fail(error, len(group))
            if not isinstance(error, Exception):
                raise
        finally:
            self._finish(group)
        return bool(group)

    def _finish(self, group: Sequence[NewPart]) -> None:
        """Take a group that was stored, or given up, out of the queue."""
        with self._mutex:
            for part in group:
                # Without a thread, several callers may have stored the same group. What has grown meanwhile stays.
                if self._queue.get(part.key) is part:
                    del self._queue[part.key]
                    self._queued_nbytes -= part.nbytes
                    self._num_done += 1
            self._changed.notify_all()
        self._tell()

    def _tell(self) -> None:
        with self._mutex:
            due = []
            while self._awaited and self._awaited[0][0] <= self._num_done:
                due.append(self._awaited.popleft()[1])
        for then in due:
            then()

    def _next_group(self) -> list[NewPart]:
        with self._mutex:
            self._changed.wait_for(lambda: self._queue or self._is_closing or self._thread is None)
            group, nbytes = list[NewPart](), 0
            max_nbytes = self.max_group_nbytes(_GROUP_NBYTES)
            for part in self._queue.values():
                if group and nbytes + part.nbytes > max_nbytes:
                    break
                group.append(part)
                nbytes += part.nbytes
            return group

    def _store_group(self, group: list[NewPart]) -> None:
        blobs = [blob for part in group if (blob := self._encode(part)) is not None]
        origins = {part.key: part.origin for part in group}
        try:
            if blobs:
                self.commit(blobs, origins)
        except CatalogMissed as error:
            if error.__cause__ is not None:  # that there is no catalog was logged
                logger.warning("the catalog missed %d parts (`reindex` adds them): %s", len(blobs), error.__cause__)
        except Exception as error:  # noqa: BLE001 - a failing cache never fails the computation
            self._fail(error, len(blobs))

    def _encode(self, part: NewPart) -> Blob | None:
        try:
            arrays = reduce(part.key.part, part.arrays, self._fidelity)
            return Blob(part.key, encode_pieces(part.key.part, arrays, part.origin), needs_of(part.key, part.origin))
        except Exception as error:  # noqa: BLE001 - one part that has no blob must not cost the others of its group
            self._fail(error, 1)
            return None

    def _fail(self, error: BaseException, num_parts: int) -> None:
        if not isinstance(error, BackpromptError):
            error = BackpromptError(f"writing failed: {error!r}", hint="The results are right but were not stored.")
        self._failure = self._failure or error
        if not self._has_failed:
            logger.warning("parts could not be stored, computation goes on: %s", error)
        self._has_failed = True
        self._tally.add("num_write_failures", num_parts)
        self._tally.report("write-failure", str(error))

    def _make_room_and_commit(self, blobs: Sequence[Blob], origins: Mapping[Key, Origin]) -> set[Key]:
        nbytes = sum(blob.nbytes + _RECORD_NBYTES for blob in blobs)
        with self._evictor.alone():  # until the room is used: several who make room would take each other's
            for num_tries in range(1, _NUM_TRIES + 1):
                # Pages are not filled to the brim.
                self._evictor.make_room(nbytes, spare_nbytes=(num_tries - 1) * nbytes // _NUM_TRIES)
                try:
                    return self._store_and_record(blobs, origins)
                except StoreFull as error:
                    if _is_disk_full(error) or num_tries == _NUM_TRIES:
                        raise
        raise AssertionError("the last try returns or raises")

    def _store_and_record(self, blobs: Sequence[Blob], origins: Mapping[Key, Origin]) -> set[Key]:
        with self._evictor.journal.writing([blob.key for blob in blobs]):
            new = set(self._store.put(blobs, max_nbytes=self._evictor.max_live_nbytes))
            self._count(blobs, new)
            self._record([blob for blob in blobs if blob.key in new], origins)
        return new

    def _count(self, blobs: Sequence[Blob], new: set[Key]) -> None:
        self._tally.add("num_stored", len(new))
        self._tally.add("num_stored_nbytes", sum(blob.nbytes for blob in blobs if blob.key in new))
        self._tally.add("num_orphaned", sum(not self._store.has(blob.key) for blob in blobs if blob.key not in new))

    def _record(self, blobs: Sequence[Blob], origins: Mapping[Key, Origin]) -> None:
        if not blobs:
            return
        catalog = self._catalogs.own
        if catalog is None and self._evictor.journal.is_shared:  # a process that has a catalog will record them
            raise CatalogMissed({blob.key for blob in blobs})
        try:
            if catalog is not None:
                from backprompt_db.catalog.records import StoredPart

                stored = [StoredPart(*blob.key, blob.nbytes, origins[blob.key]) for blob in blobs]
                catalog.record(stored, at=time.time())
                self._tell_counts(catalog)
        except Exception as error:  # no hit needs the catalog
            raise CatalogMissed({blob.key for blob in blobs}) from error

    def _tell_counts(self, catalog: Catalog) -> None:
        """Tell the catalog what was counted, but not after each of many groups: it takes a transaction of its own."""
        now = time.monotonic()
        if now >= self._tell_at:
            self._tell_at = now + _SECONDS_BETWEEN_COUNTS
            self._tally.record(catalog)


def _is_disk_full(error: StoreFull) -> bool:
    return error.__cause__ is not None


def _yield_to_others() -> None:
    """Give this thread alone a low priority: it runs when processors are idle, or a tenth of the time.

    A model's pass waits for its slowest thread, so what the writer takes from one of its threads is lost to all.
    """
    step_back(_PRIORITY)


_writers: weakref.WeakSet[Writer] = weakref.WeakSet()


@atexit.register
def _finish_all() -> None:
    """At interpreter exit, after databases were closed, wait for the queues of those that nobody holds any more."""
    for writer in list(_writers):
        writer.close()


def at_end_of_forked_process(finish: Callable[[], None]) -> None:
    """Call `finish` when the process that is being forked ends: one of multiprocessing does not run `atexit`."""
    util = sys.modules.get("multiprocessing.util")
    if util is not None:  # in time: it forgets its parent's finalisers, then calls what is registered here
        util.register_after_fork(finish, lambda finish: util.Finalize(None, finish, exitpriority=0))


def _after_fork_in_child() -> None:
    # The parent's thread does not exist here, and one of its threads may have held a writer's lock.
    for writer in list(_writers):
        writer._reset()
    at_end_of_forked_process(_finish_all)


register_at_fork(after_in_child=_after_fork_in_child)
