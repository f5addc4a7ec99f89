"""The evictor: keeps a database below its limit by removing what is worth least.

An eviction begins when a group of parts would not fit below the high water mark, and ends when the low one is reached.
Of all processes one evicts at a time. It asks the catalog what to remove, a batch at a time, and looks again while
nobody writes: what was pinned or built upon meanwhile stays. Blobs go first, in transactions of their own, then the
rows, so an eviction that is killed can be repeated, and goes on where it was.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backprompt_db.codec.blob import read_origin
from backprompt_db.database.catalogs import Catalogs
from backprompt_db.database.config import Limits
from backprompt_db.database.counters import Tally
from backprompt_db.database.journal import WriteJournal, keys_of_entry
from backprompt_db.database.location import EVICTION_LOCK
from backprompt_db.errors import CatalogError, StoreError
from backprompt_db.store.contract import Key, Store, beyond_limit
from backprompt_db.store.files import locked
from backprompt_db.system.failpoints import reach

if TYPE_CHECKING:
    from backprompt_db.catalog.catalog import Catalog
    from backprompt_db.catalog.records import EvictionCandidate, Selection

logger = logging.getLogger(__name__)

_BATCH_NUM_PARTS = 500
_BATCH_NBYTES = 8 << 20
"""Up to so many parts and bytes, and at least one part, are removed in one transaction, while nobody else writes.

Pages that the latest transaction has freed are used again only by the one after the next, so batches are small.
"""

_LISTED_SHARE = 0.3
"""Where less than this share of the live bytes is listed, parts are missing from the list.

The listed sizes are always smaller than the live pages that hold the parts, but only tiny parts take so much more.
"""

_MAX_FILE_SHARE = 1.15
"""A file beyond this share of the limit is compacted: much of it is free, in pieces too small to be used again."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """What an eviction removed."""

    num_parts: int = 0
    nbytes: int = 0
    """The size of the parts; what is given back to be used again may be a little more or less."""

    def __add__(self, other: Eviction) -> Eviction:
        return Eviction(self.num_parts + other.num_parts, self.nbytes + other.nbytes)


class Evictor:
    """Makes room in one database. For any number of threads and processes."""

    def __init__(
        self,
        store: Store,
        catalogs: Catalogs,
        *,
        directory: Path | None,
        limits: Limits,
        tally: Tally,
    ) -> None:
        self.limits = limits
        self.journal = WriteJournal(directory, limits)
        self._store = store
        self._catalogs = catalogs
        self._lock_path = None if directory is None else directory / EVICTION_LOCK
        self._has_looked_for_more = False
        self._tally = tally

    @property
    def max_live_nbytes(self) -> int | None:
        """What may be live after a write, which makes room first if need be; None without a limit."""
        return self._share(self.limits.config.high_water)

    @property
    def low_live_nbytes(self) -> int | None:
        """What is live after room was made; None without a limit."""
        return self._share(self.limits.config.low_water)

    def begin(self) -> None:
        """Do what a process does before its first write: enter what killed ones have left, remove what is expired."""
        try:
            self.catch_up()
            if self.limits.config.ttl_seconds is not None:
                self.evict()
        except Exception as error:  # noqa: BLE001 - the thread that writes must not die of it
            logger.info("nothing was evicted: %s", error)

    def make_room(self, nbytes: int, *, spare_nbytes: int = 0) -> None:
        """Remove parts until `nbytes` more may be live, and if there is as much to remove `spare_nbytes` more.

        Called within `alone`. Raises `StoreFull` where there is no room, `StoreLocked` when others have been writing
        for too long, and `CatalogError` where nobody knows what to remove.
        """
        high, low = self.max_live_nbytes, self.low_live_nbytes
        if high is None or low is None:
            return
        if nbytes > high:  # all that is there would go in vain
            raise beyond_limit(high)
        if self._live_nbytes() + nbytes + spare_nbytes <= high:  # somebody has made room meanwhile
            return
        removed = self._evict(min(low, max(0, high - nbytes - spare_nbytes)), None)
        self._shrink()
        # Where others have taken the room that was made, there is more to be made.
        if not removed.num_parts and self._live_nbytes() + nbytes > high:
            raise beyond_limit(high)

    def evict(self, *, to_nbytes: int | None = None, selection: Selection | None = None) -> Eviction:
        """Remove what is expired, then the least valuable of what is selected until no more than `to_nbytes` are live.

        Raises the same errors as `make_room` and `alone`.
        """
        with self.alone():
            return self._evict(self._live_nbytes() if to_nbytes is None else to_nbytes, selection)

    def catch_up(self) -> None:
        """Record what killed processes have stored and not recorded: it may build on what would be removed."""
        if not self.journal.entries():
            return
        catalog = self._required_catalog()
        with self.journal.nobody_writing():
            found = {entry: keys_of_entry(entry) for entry in self.journal.entries()}
            done = {entry: keys for entry, keys in found.items() if keys is not None}  # others are for other users
            # In one transaction: writers wait, and each transaction waits for the disk.
            self._record(catalog, {key for keys in done.values() for key in keys})
            for entry in done:
                with contextlib.suppress(OSError):
                    entry.unlink()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let nobody else evict in the block. Raises `StoreLocked` when somebody has been at it for too long."""
        if self._lock_path is None:
            yield
            return
        with locked(self._lock_path, mode=self.limits.modes.writers):
            yield

    def _share(self, share: float) -> int | None:
        max_nbytes = self.limits.config.max_nbytes
        return None if max_nbytes is None else int(share * max_nbytes)

    def _evict(self, goal_nbytes: int, selection: Selection | None) -> Eviction:
        self.catch_up()
        self._look_for_more()
        total = Eviction()
        while candidates := self._candidates(max(0, self._live_nbytes() - goal_nbytes), selection):
            removed = [self._remove(batch) for batch in _batches(candidates)]
            if not any(each.num_parts for each in removed):  # others have removed them, or built on them
                break
            total = sum(removed, total)
        return total

    def _look_for_more(self) -> None:
        """Record what is stored and not listed, when that is most of it: the catalog was deleted or replaced.

        Otherwise what is listed would be removed again and again, to make room beside what nobody knows of. Done once,
        because it takes time.
        """
        if self._has_looked_for_more:
            return
        self._has_looked_for_more = True
        catalog = self._required_catalog()
        listed_nbytes = sum(catalog.totals().nbytes.values())
        if listed_nbytes < _LISTED_SHARE * self._live_nbytes():
            from backprompt_db.database.reconcile import reconcile

            reconcile(self._store, catalog)

    def _shrink(self) -> None:
        max_file_nbytes = self._share(_MAX_FILE_SHARE)
        if max_file_nbytes is not None and self._store.usage().file_nbytes > max_file_nbytes:
            try:
                self._store.compact()
            except StoreError as error:  # no room for a copy: the file stays as it is
                logger.info("the store could not be compacted: %s", error)

    def _candidates(self, excess_nbytes: int, selection: Selection | None) -> Sequence[EvictionCandidate]:
        config = self.limits.config
        return self._required_catalog().eviction_order(
            excess_nbytes,
            at=time.time(),
            grace_seconds=config.grace_seconds,
            ttl_seconds=config.ttl_seconds,
            selection=selection,
        )

    def _remove(self, candidates: Sequence[EvictionCandidate]) -> Eviction:
        catalog = self._required_catalog()
        with self.journal.nobody_writing():
            removable = catalog.removable(candidate.key for candidate in candidates)
            gone = [candidate for candidate in candidates if candidate.key in removable]
            self._store.delete(Key(*candidate.key) for candidate in gone)
            reach("collect.deleted")
            catalog.evict([candidate.key for candidate in gone], at=time.time())
        removed = Eviction(len(gone), sum(candidate.nbytes for candidate in gone))
        self._tally.add("num_evicted", removed.num_parts)
        self._tally.add("num_evicted_nbytes", removed.nbytes)
        return removed

    def _record(self, catalog: Catalog, keys: Iterable[Key]) -> None:
        from backprompt_db.catalog.records import StoredPart

        sizes = {key: nbytes for key in keys if (nbytes := self._store.size(key)) is not None}
        origins = {key: read_origin(self._store, key) for key in sizes}
        parts = [StoredPart(*key, sizes[key], origin) for key, origin in origins.items() if origin is not None]
        catalog.record(parts, at=time.time())

    def _required_catalog(self) -> Catalog:
        catalog = self._catalogs.own
        if catalog is None:
            raise CatalogError(
                "without the catalog nobody knows what to remove", hint="Mend it with `backprompt-db reindex`."
            )
        return catalog

    def _live_nbytes(self) -> int:
        return self._store.usage().live_nbytes


def _batches(candidates: Sequence[EvictionCandidate]) -> Iterator[list[EvictionCandidate]]:
    batch: list[EvictionCandidate] = []
    nbytes = 0
    for candidate in candidates:
        if batch and (len(batch) == _BATCH_NUM_PARTS or nbytes + candidate.nbytes > _BATCH_NBYTES):
            yield batch
            batch, nbytes = [], 0
        batch.append(candidate)
        nbytes += candidate.nbytes
    if batch:
        yield batch
