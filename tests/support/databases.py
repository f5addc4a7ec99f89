"""Parts to put into databases, and stores that misbehave on demand."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np

from backprompt_db.database.writer import NewPart
from backprompt_db.errors import StoreError
from backprompt_db.prompt.ids import Address, TokenizerId, WeightsId
from backprompt_db.prompt.representation import Array, Arrays, Origin, Part
from backprompt_db.prompt.text import Text
from backprompt_db.store.contract import Blob, Key
from backprompt_db.store.memory import MemoryStore
from tests.support.blobs import chain


def origin(text: str, *, namespace: str = "") -> Origin:
    (segment,) = Text(text).segments(namespace)
    weights, tokenizer = WeightsId(b"w" * 32), TokenizerId(b"t" * 32)
    return Origin(text, segment.parent_ids, None, weights, tokenizer, 1, 0.5, namespace)


def logits(text: str, num_values: int = 8) -> Array:
    """Values that only this text has."""
    return Array.from_numpy(np.arange(num_values, dtype=np.float32) + len(text) + sum(map(ord, text)))


def new_part(text: str, *, num_values: int = 8, namespace: str = "") -> NewPart:
    where = origin(text, namespace=namespace)
    return NewPart(Key(where.address, Part.LOGITS), {"logits": logits(text, num_values)}, where)


def continuations(text: str, num_tokens: int) -> NewPart:
    """So many tokens that may follow a text."""
    where = origin(text)
    return NewPart(Key(where.address, Part.CONTINUATIONS), chain(range(num_tokens)), where)


def address(text: str, *, namespace: str = "") -> Address:
    return origin(text, namespace=namespace).address


def wanted(*texts: str, namespace: str = "") -> dict[Address, Iterable[Part]]:
    return {address(text, namespace=namespace): [Part.LOGITS] for text in texts}


def values(found: dict[Key, Arrays]) -> dict[Address, bytes]:
    return {key.address: bytes(arrays["logits"].data) for key, arrays in found.items()}


def expected(*texts: str, num_values: int = 8) -> dict[Address, bytes]:
    return {address(text): bytes(logits(text, num_values).data) for text in texts}


class FaultyStore(MemoryStore):
    """A store that fails with `error` while it is set, and that writes only while `may_write` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None
        self.may_write = threading.Event()
        self.may_write.set()
        self.puts: list[int] = []

    def get(self, key: Key) -> memoryview | None:
        self._fail_if_told()
        return super().get(key)

    def has(self, key: Key) -> bool:
        self._fail_if_told()
        return super().has(key)

    def put(self, blobs: Sequence[Blob], *, max_nbytes: int | None = None) -> list[Key]:
        self.may_write.wait(30)
        self._fail_if_told()
        self.puts.append(len(blobs))
        return super().put(blobs, max_nbytes=max_nbytes)

    def delete(self, keys: Iterable[Key]) -> int:
        self._fail_if_told()
        return super().delete(keys)

    def _fail_if_told(self) -> None:
        if self.error is not None:
            raise self.error


BROKEN = StoreError("the store is broken", hint="Wait.")
