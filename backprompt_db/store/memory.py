"""A store in a dict, for tests and for runs that leave nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from backprompt_db.errors import StoreClosed
from backprompt_db.store.contract import Blob, Key, Usage, beyond_limit, replaces


class MemoryStore:
    """A `Store` that lives as long as the object."""

    num_quarantined = 0

    def __init__(self) -> None:
        self._blobs: dict[Key, bytes] | None = {}
        self._lock = threading.Lock()
        self._nbytes = 0

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

    def size(self, key: Key) -> int | None:
        """Return how many bytes a blob has, None where there is none."""
        blob = self._open_blobs().get(key)
        return None if blob is None else len(blob)

    def put(self, blobs: Sequence[Blob], *, max_nbytes: int | None = None) -> list[Key]:
        """Store the blobs whose keys are free, or that replace smaller ones, all at once; return those keys."""
        with self._lock:
            stored = self._open_blobs()
            new: dict[Key, bytes] = {}
            for blob in blobs:
                taken = new.get(blob.key, stored.get(blob.key))
                is_new = taken is None or replaces(blob.key, blob.nbytes, len(taken))
                if is_new and all(need in stored or need in new for need in blob.needs):
                    new[blob.key] = b"".join(blob.pieces)
            nbytes = self._nbytes + sum(len(data) - len(stored.get(key, b"")) for key, data in new.items())
            if max_nbytes is not None and nbytes > max_nbytes:
                raise beyond_limit(max_nbytes)
            stored.update(new)
            self._nbytes = nbytes
        return list(new)

    def delete(self, keys: Iterable[Key]) -> int:
        """Remove blobs; return how many there were."""
        gone = set(keys)  # before the lock: the keys may come from `keys()`
        with self._lock:
            stored = self._open_blobs()
            sizes = [len(stored.pop(key)) for key in gone if key in stored]
            self._nbytes -= sum(sizes)
            return len(sizes)

    def keys(self) -> Iterator[tuple[Key, int]]:
        """Yield every key and its blob's size in bytes, ascending."""
        with self._lock:
            sizes = [(key, len(blob)) for key, blob in self._open_blobs().items()]
        yield from sorted(sizes, key=lambda size: (size[0].address, size[0].part.value))

    def usage(self) -> Usage:
        """Return the sum of the blobs' sizes."""
        nbytes = self._nbytes
        return Usage(nbytes, nbytes)

    def compact(self) -> None:
        """Do nothing: nothing is left of what was deleted."""

    def close(self) -> None:
        """Forget everything."""
        self._blobs = None

    def _open_blobs(self) -> dict[Key, bytes]:
        if self._blobs is None:
            raise StoreClosed("the store was closed", hint="Open the database again.")
        return self._blobs
