"""What every store promises. `tests/support/store_contract.py` tests each store against these promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from backprompt_db.errors import StoreFull
from backprompt_db.prompt.ids import Address
from backprompt_db.prompt.representation import Origin, Part
from backprompt_db.views.formatting import size


class Key(NamedTuple):
    """The name of one blob: which part of which representation."""

    address: Address
    part: Part


class Blob(NamedTuple):
    """One part as bytes, with its key."""

    key: Key
    data: bytes | Sequence[bytes | memoryview]
    """The bytes, or pieces that follow one another: so arrays need not be copied behind their header."""
    needs: tuple[Key, ...] = ()
    """The blob is of use only beside these: it is left out unless they are in the store, or earlier in the same put."""

    @property
    def pieces(self) -> Sequence[bytes | memoryview]:
        """The bytes in pieces."""
        return [self.data] if isinstance(self.data, bytes) else self.data

    @property
    def nbytes(self) -> int:
        """How many bytes the part has."""
        return sum(memoryview(piece).nbytes for piece in self.pieces)


def needs_of(key: Key, origin: Origin) -> tuple[Key, ...]:
    """Return the parts without which nobody can use this one: for keys and values, those of its direct parents."""
    return tuple(Key(each, Part.KV) for each in origin.parent_addresses) if key.part is Part.KV else ()


def grows(key: Key) -> bool:
    """Whether what a key names becomes more with time: a tree of continuations does, everything else stays."""
    return key.part is Part.CONTINUATIONS


def replaces(key: Key, nbytes: int, taken_nbytes: int) -> bool:
    """Whether a blob takes the place of a smaller one under its key: it has grown."""
    return grows(key) and nbytes > taken_nbytes


class Usage(NamedTuple):
    """How much room a store takes."""

    live_nbytes: int
    """How many bytes the stored blobs take, with everything around them."""
    file_nbytes: int
    """How large the file is. What is not live in it will be used again."""


def beyond_limit(max_nbytes: int) -> StoreFull:
    """Return the error for parts with which more than the limit would be live."""
    return StoreFull(
        f"more than {size(max_nbytes)} would be in use",
        hint="Evict or unpin something, or raise the limit: `backprompt-db config --max-size SIZE`.",
    )


class Store(Protocol):
    """Blobs under keys. A blob is stored entirely or not at all, and is read back exactly or is a miss.

    Methods may be called from any thread. Every method of a closed store raises `StoreClosed`; other failures raise
    the `StoreError` that fits.
    """

    def get(self, key: Key) -> memoryview | None:
        """Return a verified, writable copy of a blob; None for a miss.

        A blob whose bytes do not match their digest is a miss: it is counted in `num_quarantined` and removed.
        """

    def scan(self, key: Key, take: Callable[[memoryview], None]) -> bool:
        """Give a blob's verified bytes to `take`, piece by piece, without a copy; False for a miss or a damaged blob.

        A piece is read-only and dies when `take` returns. When a piece is damaged, those that came before are void:
        the blob is treated as in `get`.
        """

    def has(self, key: Key) -> bool:
        """Whether a blob is stored under `key`; its bytes are not verified."""

    def size(self, key: Key) -> int | None:
        """Return how many bytes a blob has, None where there is none; nothing is verified, and nothing counted."""

    def put(self, blobs: Sequence[Blob], *, max_nbytes: int | None = None) -> list[Key]:
        """Store all of `blobs` in one transaction and return the keys that were new, each once.

        The first writer wins: a key that is taken keeps its blob, unless the new one `replaces` it: then it is new. A
        blob is left out when something that it `needs` is not there. When this returns, the blobs are on disk. Raises
        `StoreFull`, and stores nothing, when more than `max_nbytes` would be live after it.
        """

    def delete(self, keys: Iterable[Key]) -> int:
        """Remove blobs in one transaction; return how many there were. Absent keys are ignored."""

    def keys(self) -> Iterator[tuple[Key, int]]:
        """Yield every key and its blob's size in bytes, ascending; keys put or deleted meanwhile may be missed."""

    def usage(self) -> Usage:
        """Return how much room everything takes, in a time that does not grow with it."""

    def compact(self) -> None:
        """Give back the room of what was deleted, and leave nothing of it behind, beside those who read and write."""

    @property
    def num_quarantined(self) -> int:
        """How many damaged blobs this handle has met."""

    def close(self) -> None:
        """Release the store. Closing twice is allowed."""


def lacks(store: Store, key: Key, nbytes: int) -> bool:
    """Whether a store has nothing under a key, or less of what grows than a blob of so many bytes."""
    taken_nbytes = store.size(key)
    return taken_nbytes is None or replaces(key, nbytes, taken_nbytes)
