"""Where blobs go: into the store, within the limit, and into the catalog."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from backprompt_db.collector import Collector
from backprompt_db.counting import Tally
from backprompt_db.errors import StoreFull
from backprompt_db.representation import Origin
from backprompt_db.store.contract import Blob, Key, Store

if TYPE_CHECKING:
    from backprompt_db.catalog import Catalog

_GROUPS_PER_LIMIT = 16
"""No group is larger than this share of what may be live: room is made in small steps."""

_NUM_TRIES = 8
"""How often room is made for a group: others, who need not make any, may take it."""

_SECONDS_BETWEEN_COUNTS = 1.0
"""How often the catalog is told what was counted, while parts are stored."""

_RECORD_NBYTES = 128
"""What a small part takes up beside its bytes."""


class CatalogMissed(Exception):
    """Parts were stored, and could not be recorded; the cause says why, unless there is no catalog."""

    def __init__(self, new: set[Key]) -> None:
        super().__init__(new)
        self.new = new


class Storage:
    """A store and its catalog, kept in step and below the limit. For any number of threads and processes."""

    def __init__(
        self, store: Store, catalog: Callable[[], Catalog | None], collector: Collector, *, tally: Tally
    ) -> None:
        self.collector = collector
        self._store = store
        self._catalog = catalog
        self._tally = tally
        self._tell_at = 0.0

    def max_group_nbytes(self, nbytes: int) -> int:
        """Return how much to store at once: `nbytes`, but only a small share of what may be live at all."""
        max_live_nbytes = self.collector.max_live_nbytes
        return nbytes if max_live_nbytes is None else min(nbytes, max_live_nbytes // _GROUPS_PER_LIMIT)

    def keep(self, blobs: Sequence[Blob], origins: Mapping[Key, Origin]) -> set[Key]:
        """Store and record blobs and return the keys that were new. Where they would not fit, room is made for them.

        Raises the `StoreError` that fits, and then nothing was stored, or `CatalogMissed`, and then everything was.
        """
        try:
            return self._store_and_record(blobs, origins)
        except StoreFull as error:
            if _is_disk_full(error):
                raise
        return self._make_room_and_keep(blobs, origins)

    def _make_room_and_keep(self, blobs: Sequence[Blob], origins: Mapping[Key, Origin]) -> set[Key]:
        nbytes = sum(blob.nbytes + _RECORD_NBYTES for blob in blobs)
        with self.collector.alone():  # until the room is used: of several who make room, each would take the others'
            for num_tries in range(1, _NUM_TRIES + 1):
                # Pages are not filled to the brim.
                self.collector.make_room(nbytes, spare_nbytes=(num_tries - 1) * nbytes // _NUM_TRIES)
                try:
                    return self._store_and_record(blobs, origins)
                except StoreFull as error:
                    if _is_disk_full(error) or num_tries == _NUM_TRIES:
                        raise
        raise AssertionError("the last try returns or raises")

    def _store_and_record(self, blobs: Sequence[Blob], origins: Mapping[Key, Origin]) -> set[Key]:
        with self.collector.pending.writing([blob.key for blob in blobs]):
            new = set(self._store.put(blobs, max_nbytes=self.collector.max_live_nbytes))
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
        catalog = self._catalog()
        if catalog is None and self.collector.pending.is_shared:  # a process that has a catalog will enter them
            raise CatalogMissed({blob.key for blob in blobs})
        try:
            if catalog is not None:
                from backprompt_db.catalog import StoredPart

                stored = [StoredPart(*blob.key, blob.nbytes, origins[blob.key]) for blob in blobs]
                catalog.record(stored, at=time.time())
                self._tell_counts(catalog)
        except Exception as error:  # no hit needs the catalog
            raise CatalogMissed({blob.key for blob in blobs}) from error

    def _tell_counts(self, catalog: Catalog) -> None:
        """Tell what was counted, but not with each of many groups: it takes a transaction of its own."""
        now = time.monotonic()
        if now >= self._tell_at:
            self._tell_at = now + _SECONDS_BETWEEN_COUNTS
            self._tally.record(catalog)


def _is_disk_full(error: StoreFull) -> bool:
    return error.__cause__ is not None
