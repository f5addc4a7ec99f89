"""Reading what a stored part was computed from, without its arrays."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from backprompt_db.codec.blob import decode_origin, header_nbytes
from backprompt_db.errors import BackpromptError, StoreClosed

if TYPE_CHECKING:
    from backprompt_db.prompt.representation import Origin
    from backprompt_db.store.contract import Key, Store


def read_origin(store: Store, key: Key) -> Origin | None:
    """Return what a stored part was computed from; None where there is none that can be used under this key.

    Only the chunks that hold the header are read and verified: of large parts one of many. Raises `StoreClosed`.
    """
    header = _Header()
    try:
        with contextlib.suppress(_Complete):
            if not store.scan(key, header.take):
                return None
        part, origin = decode_origin(memoryview(header.data))
    except StoreClosed:
        raise
    except BackpromptError:
        return None
    return origin if (origin.address, part) == key else None


class _Complete(Exception):
    """There is no need to read on."""


class _Header:
    """The header of a blob, collected from as many pieces as it takes."""

    def __init__(self) -> None:
        self.data = bytearray()

    def take(self, piece: memoryview) -> None:
        while (missing := header_nbytes(bytes(self.data)) - len(self.data)) and piece.nbytes:
            self.data += piece[:missing]
            piece = piece[missing:]
        if not missing:
            raise _Complete
