"""Reconciling: where the store and the catalog disagree about which parts there are, the store is right."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from backprompt_db.codec.blob import read_origin
from backprompt_db.store.contract import Key
from backprompt_db.system.failpoints import reach

if TYPE_CHECKING:
    from backprompt_db.catalog.catalog import Catalog
    from backprompt_db.catalog.records import StoredPart
    from backprompt_db.store.contract import Store


class Difference(NamedTuple):
    """A part that only the store or only the catalog has."""

    key: Key
    nbytes: int | None
    """Its size in the store; None when only the catalog has it."""

    @property
    def is_stored(self) -> bool:
        """True in the store but not in the catalog; False in the catalog but not in the store."""
        return self.nbytes is not None


def differences(store: Store, catalog: Catalog) -> Iterator[Difference]:
    """Yield the parts that only one of the two has, by address, in memory that does not grow with their number.

    Parts that are stored or deleted meanwhile may appear or not.
    """
    stored = (Difference(*found) for found in store.keys())
    recorded = (Difference(key, None) for key in _recorded_keys(catalog))
    merged = heapq.merge(stored, recorded, key=lambda found: _order(found.key))
    for _, found in itertools.groupby(merged, key=itemgetter(0)):
        sides = list(found)
        if len(sides) == 1:
            yield sides[0]


def _recorded_keys(catalog: Catalog) -> Iterator[Key]:
    """Yield the catalog's keys in the store's order: it has the parts of an address in another one."""
    keys = itertools.starmap(Key, catalog.keys())
    for _, parts in itertools.groupby(keys, key=itemgetter(0)):
        yield from sorted(parts, key=_order)


def _order(key: Key) -> tuple[bytes, bytes]:
    return key.address, key.part.value


_PARTS_PER_TRANSACTION = 5_000
"""The more, the fewer pages of the catalog are written several times, and the longer others wait to write."""


_CHARACTERS_PER_TRANSACTION = 16 << 20
"""How many characters of texts are in memory until they are recorded."""


@dataclass(frozen=True, slots=True)
class Reindexing:
    """What a reindexing changed."""

    num_added: int
    """Parts that were in the store but not in the catalog."""
    num_forgotten: int
    """Parts that were in the catalog but not in the store."""
    num_unreadable: int
    """Parts in the store that cannot be used, and are not entered."""
    moved_aside: Path | None = None
    """Where a damaged catalog was moved to; None when the catalog could be kept."""
    num_changed_rows: int = 0
    """Rows of what the catalog remembers that were not what was written, and are forgotten."""


def reconcile(store: Store, catalog: Catalog) -> Reindexing:
    """Record what the catalog lacks, and forget what the store lacks. The catalog must not be damaged."""
    num_added = num_forgotten = num_unreadable = 0
    for batch in _batches(differences(store, catalog)):
        missing = {key: nbytes for key, nbytes in batch if nbytes is not None}
        added = _add(store, catalog, missing)
        num_forgotten += _forget(store, catalog, [found.key for found in batch if not found.is_stored])
        num_added += added
        num_unreadable += len(missing) - added
        reach("reindex.batch")
    return Reindexing(num_added, num_forgotten, num_unreadable)


def _add(store: Store, catalog: Catalog, sizes: Mapping[Key, int]) -> int:
    num_added = 0
    for parts in _by_length(_read(store, sizes)):
        catalog.record(parts, at=time.time())
        # A part that was evicted after it was read may have been forgotten before it was recorded.
        _forget(store, catalog, [Key(part.address, part.part) for part in parts])
        num_added += len(parts)
    return num_added


def _read(store: Store, sizes: Mapping[Key, int]) -> Iterator[StoredPart]:
    from backprompt_db.catalog.records import StoredPart

    for key, nbytes in sizes.items():
        origin = read_origin(store, key)
        if origin is not None:
            yield StoredPart(*key, nbytes, origin)


def _by_length(parts: Iterable[StoredPart]) -> Iterator[list[StoredPart]]:
    """Divide parts into lists, each with texts of about as many characters as may be in memory, or fewer."""
    some: list[StoredPart] = []
    num_characters = 0
    for part in parts:
        some.append(part)
        num_characters += len(part.origin.text)
        if num_characters >= _CHARACTERS_PER_TRANSACTION:
            yield some
            some, num_characters = [], 0
    if some:
        yield some


def _forget(store: Store, catalog: Catalog, keys: list[Key]) -> int:
    gone = [key for key in keys if not store.has(key)]
    catalog.forget(gone)
    return len(gone)


def _batches(found: Iterable[Difference]) -> Iterator[list[Difference]]:
    remaining = iter(found)
    while batch := list(islice(remaining, _PARTS_PER_TRANSACTION)):
        yield batch
