"""A store in a dict: for tests, and for runs that shall leave nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from backprompt_db.errors import StoreClosed
from backprompt_db.store.contract import Blob, Key


class MemoryStore:
    """A `Store` that lives as long as the object."""

    num_quarantined = 0

    def __init__(self) -> None:
        self._blobs: dict[Key, bytes] | None = {}
        self._lock = threading.Lock()

    def get(self, key: Key) -> memoryview | None:
        """Return a writable copy of a blob; None for a miss."""
        blob = self._open_blobs().get(key)
        return None if blob is None else memoryview(bytearray(blob))

    def scan(self, key: Key, take: Callable[[memoryview], None]) -> bool:
        """Give a blob's bytes to `take`; False for a miss."""
        blob = self._open_blobs().get(key)
        if blob is not None:
            take(memoryview(blob))
        return blob is not None

    def has(self, key: Key) -> bool:
        """Whether a blob is stored under `key`."""
        return key in self._open_blobs()

    def put(self, blobs: Sequence[Blob]) -> list[Key]:
        """Store the blobs whose keys are free, all at once; return those keys."""
        with self._lock:
            stored = self._open_blobs()
            new: dict[Key, bytes] = {}
            for blob in blobs:
                if blob.key not in stored:
                    new.setdefault(blob.key, b"".join(blob.pieces))
            stored.update(new)
        return list(new)

    def delete(self, keys: Iterable[Key]) -> int:
        """Remove blobs; return how many there were."""
        gone = set(keys)  # before the lock: they may come from `keys()`
        with self._lock:
            stored = self._open_blobs()
            return sum(stored.pop(key, None) is not None for key in gone)

    def keys(self) -> Iterator[tuple[Key, int]]:
        """Yield every key and its blob's size in bytes, ascending."""
        with self._lock:
            sizes = [(key, len(blob)) for key, blob in self._open_blobs().items()]
        yield from sorted(sizes, key=lambda size: (size[0].address, size[0].part.value))

    def close(self) -> None:
        """Forget everything."""
        self._blobs = None

    def _open_blobs(self) -> dict[Key, bytes]:
        if self._blobs is None:
            raise StoreClosed("the store was closed", hint="Open the database again.")
        return self._blobs
