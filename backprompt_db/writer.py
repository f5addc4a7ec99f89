"""The writer: a thread that encodes queued parts and stores them in groups, while the caller goes on."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from backprompt_db.catalog import Catalog, StoredPart
from backprompt_db.codec import encode
from backprompt_db.errors import BackpromptError, CatalogError
from backprompt_db.representation import Arrays, Origin
from backprompt_db.store.contract import Blob, Key, Store

logger = logging.getLogger(__name__)

MAX_QUEUED_NBYTES = 512 << 20
"""Callers wait when more than this is queued."""

_GROUP_NBYTES = 128 << 20
"""A store transaction takes queued parts up to this size, and at least one."""


@dataclass(frozen=True, slots=True)
class NewPart:
    """A part that was computed and is to be stored."""

    key: Key
    arrays: Arrays
    origin: Origin

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


class Writer:
    """Stores queued parts on a thread of its own, several to a transaction; the catalog's rows follow, best effort.

    What is queued can be read with `get`, so a caller finds at once what it just put.
    """

    def __init__(self, store: Store, catalog: Callable[[], Catalog | None]) -> None:
        self._store = store
        self._catalog = catalog
        self.num_stored = 0
        self.num_stored_nbytes = 0
        self.num_failed = 0
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._queue: dict[Key, NewPart] = {}
        self._queued_nbytes = 0
        self._failure: BackpromptError | None = None
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def get(self, key: Key) -> Arrays | None:
        """Return the arrays of a part that is still queued; None for any other."""
        part = self._queue.get(key) if self._pid == os.getpid() else None
        return None if part is None else part.arrays

    def put(self, parts: Sequence[NewPart]) -> None:
        """Queue parts; waits while more than `MAX_QUEUED_NBYTES` are queued. Their arrays must not change any more."""
        self._after_fork()
        with self._changed:
            self._changed.wait_for(lambda: self._queued_nbytes <= MAX_QUEUED_NBYTES)
            for part in parts:
                if part.key not in self._queue:
                    self._queue[part.key] = part
                    self._queued_nbytes += part.nbytes
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="backprompt-db writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything queued is stored. Raises the first failure since the last flush."""
        self._after_fork()
        with self._changed:
            self._changed.wait_for(lambda: not self._queue)
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Store what is queued and end the thread."""
        self._after_fork()
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _after_fork(self) -> None:
        # The parent's thread does not exist in a child, and what it had queued is the parent's to write.
        if self._pid != os.getpid():
            self._reset()

    def _run(self) -> None:
        while group := self._next_group():
            self._store_group(group)
            with self._changed:
                for part in group:
                    del self._queue[part.key]
                    self._queued_nbytes -= part.nbytes
                self._changed.notify_all()

    def _next_group(self) -> list[NewPart]:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closing)
            group, nbytes = list[NewPart](), 0
            for part in self._queue.values():
                if group and nbytes + part.nbytes > _GROUP_NBYTES:
                    break
                group.append(part)
                nbytes += part.nbytes
            return group

    def _store_group(self, group: list[NewPart]) -> None:
        try:
            blobs = [Blob(part.key, encode(part.key.part, part.arrays, part.origin)) for part in group]
            new = set(self._store.put(blobs))
        except Exception as error:  # noqa: BLE001 - a failing cache never fails the computation
            self._fail(error, len(group))
            return
        self.num_stored += len(new)
        sizes = {blob.key: len(blob.data) for blob in blobs if blob.key in new}
        self.num_stored_nbytes += sum(sizes.values())
        stored = [StoredPart(*part.key, sizes[part.key], part.origin) for part in group if part.key in new]
        self._record(stored)

    def _record(self, stored: list[StoredPart]) -> None:
        catalog = self._catalog() if stored else None
        if catalog is None:
            return
        try:
            catalog.record(stored, at=time.time())
        except CatalogError as error:
            logger.warning("the catalog missed %d parts (`backprompt-db reindex` adds them): %s", len(stored), error)

    def _fail(self, error: Exception, num_parts: int) -> None:
        if not isinstance(error, BackpromptError):
            error = BackpromptError(f"writing failed: {error!r}", hint="The results are right but were not stored.")
        if not self.num_failed:
            logger.warning("parts could not be stored, computation goes on: %s", error)
        self.num_failed += num_parts
        self._failure = self._failure or error
