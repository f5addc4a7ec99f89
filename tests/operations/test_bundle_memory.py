"""Bundles larger than memory: they are written and read a batch at a time."""

from __future__ import annotations

import contextlib
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from backprompt_db.codec.blob import encode
from backprompt_db.database.database import Database
from backprompt_db.operations.bundles.transfer import export_bundle, import_bundle
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key
from backprompt_db.store.memory import MemoryStore
from tests.support.blobs import array
from tests.support.bundles import chain


class _Zeros(MemoryStore):
    """Large logits of zeros, made when they are read, none of which is kept when it is put."""

    def __init__(self, num_parts: int) -> None:
        super().__init__()
        self._origins = {origin.address: origin for text in range(num_parts) for origin in chain(str(text))}

    def keys(self) -> Iterator[tuple[Key, int]]:
        return ((Key(address, Part.LOGITS), LARGE_NBYTES) for address in sorted(self._origins))

    def has(self, key: Key) -> bool:
        return key.part is Part.LOGITS and key.address in self._origins

    def get(self, key: Key) -> memoryview | None:
        if not self.has(key):
            return None
        logits = {"logits": array("F32", LARGE_NBYTES // 4)}
        return memoryview(encode(Part.LOGITS, logits, self._origins[key.address]))

    def put(self, blobs: Any, *, max_nbytes: int | None = None) -> list[Key]:
        return [blob.key for blob in blobs]


LARGE_NBYTES = 8 << 20


@contextlib.contextmanager
def piped(write: Callable[[BinaryIO], object]) -> Iterator[BinaryIO]:
    """The other end of a pipe that something is written to meanwhile."""
    reading, writing = os.pipe()

    def run() -> None:
        with os.fdopen(writing, "wb", buffering=0) as stream:
            write(stream)

    thread = threading.Thread(target=run)
    thread.start()
    with os.fdopen(reading, "rb", buffering=0) as stream:
        yield stream
    thread.join()


def test_memory_holds_a_batch_and_not_the_bundle() -> None:
    num_parts = 50
    source = Database(_Zeros(num_parts), directory=None)
    target = Database(_Zeros(0), directory=None)
    tracemalloc.start()
    with piped(lambda stream: export_bundle(source, stream)) as stream:
        done = import_bundle(target, stream)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert done.num_orphaned == 0
    assert done.num_stored == num_parts
    assert peak < num_parts * LARGE_NBYTES // 2
