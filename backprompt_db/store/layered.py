"""A store in front of another one, which is only read: what one person adds to what a team has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from backprompt_db.errors import StoreError
from backprompt_db.store.contract import Blob, Key, Store, Usage, grows, replaces

_Found = TypeVar("_Found")


class LayeredStore:
    """A `Store` that finds in `base` what is not in `own`, and writes to `own` alone.

    `keys`, `usage` and `delete` are about `own` alone, and so is all maintenance. A blob that cannot be read from the
    base, or is damaged there, counts as missing from then on: it is computed again and stored here, in front.
    """

    def __init__(self, own: Store, base: Store) -> None:
        self.own = own
        self._base = base
        self._unusable: set[Key] = set()
        self.num_base_hits = 0

    @property
    def num_quarantined(self) -> int:
        """How many damaged blobs both stores have met."""
        return self.own.num_quarantined + self._base.num_quarantined

    def get(self, key: Key) -> memoryview | None:
        """Return a verified, writable copy of a blob; None for a miss in both."""
        found = None if self._has_grown_below(key) else self.own.get(key)
        return found if found is not None else self._from_base(key, self._base.get)

    def scan(self, key: Key, take: Callable[[memoryview], None]) -> bool:
        """Give a blob's verified bytes to `take`, piece by piece, from whichever store has it."""
        num_quarantined = self.own.num_quarantined
        if not self._has_grown_below(key) and self.own.scan(key, take):
            return True
        if self.own.num_quarantined > num_quarantined:  # `take` already has pieces: those of the base must not follow
            return False
        return bool(self._from_base(key, lambda key: self._base.scan(key, take) or None))

    def has(self, key: Key) -> bool:
        """Whether a blob is stored in either."""
        return self.own.has(key) or self._base_has(key)

    def size(self, key: Key) -> int | None:
        """Return how many bytes a blob has, in whichever store has it."""
        nbytes = None if self._has_grown_below(key) else self.own.size(key)
        return self._base.size(key) if nbytes is None and self._base_has(key) else nbytes

    def put(self, blobs: Sequence[Blob], *, max_nbytes: int | None = None) -> list[Key]:
        """Store blobs here; what they need may be in the base, and what is no more than is there is left out."""
        return self.own.put([self._freed(blob) for blob in blobs if not self._is_below(blob)], max_nbytes=max_nbytes)

    def delete(self, keys: Iterable[Key]) -> int:
        """Remove blobs here. A blob that only the base has stays there, and is not found any more."""
        gone = list(keys)
        self._unusable.update(key for key in gone if not self.own.has(key))
        return self.own.delete(gone)

    def keys(self) -> Iterator[tuple[Key, int]]:
        """Yield the keys that are stored here."""
        return self.own.keys()

    def usage(self) -> Usage:
        """Return how much room is taken here."""
        return self.own.usage()

    def compact(self) -> None:
        """Give back the room of deleted blobs here."""
        self.own.compact()

    def close(self) -> None:
        """Release both."""
        try:
            self.own.close()
        finally:
            self._base.close()

    def _base_has(self, key: Key) -> bool:
        try:
            return key not in self._unusable and self._base.has(key)
        except StoreError:
            return False

    def _from_base(self, key: Key, read: Callable[[Key], _Found | None]) -> _Found | None:
        if key in self._unusable:
            return None
        num_quarantined = self._base.num_quarantined
        try:
            found = read(key)
        except StoreError:
            self._unusable.add(key)
            return None
        if found is not None:
            self.num_base_hits += 1
        elif self._base.num_quarantined > num_quarantined:
            self._unusable.add(key)
        return found

    def _has_grown_below(self, key: Key) -> bool:
        """Whether the base has more under a key than what is here."""
        own_nbytes = self.own.size(key) if grows(key) else None
        if own_nbytes is None or not self._base_has(key):
            return False
        return replaces(key, self._base.size(key) or 0, own_nbytes)

    def _is_below(self, blob: Blob) -> bool:
        """Whether the base has as much as a blob that grows, or more."""
        if not grows(blob.key) or not self._base_has(blob.key):
            return False
        return not replaces(blob.key, blob.nbytes, self._base.size(blob.key) or 0)

    def _freed(self, blob: Blob) -> Blob:
        """Return the blob without those of its needs that the base has."""
        return blob._replace(needs=tuple(need for need in blob.needs if not self._base_has(need)))


def own_store(store: Store) -> Store:
    """Return the store that is written to: of a layered one, the one in front."""
    return store.own if isinstance(store, LayeredStore) else store
