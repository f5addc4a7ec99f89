"""Reads keys and values in one pass: from the memory map of the store's file to where a model reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from backprompt_db.codec.blob import ArrayPlace, header_nbytes, kv_places
from backprompt_db.errors import BlobFormat

_Rows: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class KVSpan:
    """The place for the keys and values of one segment: `[num_layers, num_kv_heads, T, head_dim]` of a larger buffer.

    Both have the model's dtype; uint16 stands for bfloat16, which NumPy does not know.
    """

    keys: npt.NDArray[Any]
    values: npt.NDArray[Any]

    @property
    def num_tokens(self) -> int:
        """How many tokens the place is for."""
        return int(self.keys.shape[2])


class KVReader:
    """Copies the pieces of one stored kv part into a span as they come, and keeps nothing but the header until then."""

    def __init__(self, span: KVSpan, dtype: str) -> None:
        self._span = span
        self._dtype = dtype
        self._header = b""
        self._places: list[tuple[ArrayPlace, _Rows]] | None = None
        self._position = 0

    def take(self, piece: memoryview) -> None:
        """Copy the next piece of the blob into the span. Raises `BlobFormat` for a part that does not fit there.

        The size of every piece but the last is a multiple of 8 bytes.
        """
        if self._places is None:
            piece = self._read_header(piece)
        for place, rows in self._places or ():
            first = max(self._position, place.begin)
            last = min(self._position + piece.nbytes, place.end)
            if (last - first) % rows.itemsize and first < last:
                raise _not_whole("it ends inside a number")
            if first < last:
                values = np.frombuffer(piece[first - self._position : last - self._position], dtype=rows.dtype)
                _put(rows, (first - place.begin) // rows.itemsize, values)
        self._position += piece.nbytes

    def finish(self) -> None:
        """Check that the part is complete. Raises `BlobFormat` when its bytes are too few or too many.

        Such a part was stored that way, since its pieces matched their digests: reading it again would not help.
        """
        if self._places is None:
            raise _not_whole(f"it ends after {len(self._header)} bytes, inside its header")
        end = max(place.end for place, _ in self._places)
        if self._position != end:
            raise _not_whole(f"it has {self._position} bytes of keys and values, not {end}")

    def _read_header(self, piece: memoryview) -> memoryview:
        """Collect the header, which may be longer than a piece; return the array bytes that follow it in this piece."""
        self._header += piece
        nbytes = header_nbytes(self._header)
        if len(self._header) < nbytes:
            return piece[:0]
        rest = memoryview(self._header)[nbytes:]
        places = kv_places(memoryview(self._header)[:nbytes])
        self._header = b""
        self._places = [
            (places[name], self._rows(places[name], target))
            for name, target in (("keys", self._span.keys), ("values", self._span.values))
        ]
        return rest

    def _rows(self, place: ArrayPlace, target: npt.NDArray[Any]) -> _Rows:
        """Return a view of a target with one row for each layer and head, which the stored bytes fill row after row."""
        if place.shape != target.shape or place.dtype != self._dtype:
            raise BlobFormat(
                f"the stored part is {place.dtype} {list(place.shape)}, not {self._dtype} {list(target.shape)}",
                hint="It counts as a miss and will be computed again.",
            )
        num_layers, num_heads, num_tokens, head_dim = target.shape
        shape = num_layers * num_heads, num_tokens * head_dim
        return np.lib.stride_tricks.as_strided(target, shape, (target.strides[1], target.itemsize))


def _not_whole(reason: str) -> BlobFormat:
    return BlobFormat(f"a stored part is malformed: {reason}", hint="It counts as a miss and will be computed again.")


def _put(rows: _Rows, begin: int, values: npt.NDArray[Any]) -> None:
    """Copy `values` into `rows`, seen as one sequence, from element `begin` on: a part, whole rows, a part."""
    row, column = divmod(begin, rows.shape[1])
    if column:
        head = values[: rows.shape[1] - column]
        rows[row, column : column + len(head)] = head
        values, row = values[len(head) :], row + 1
    num_whole = len(values) // rows.shape[1]
    whole, tail = np.split(values, [num_whole * rows.shape[1]])
    rows[row : row + num_whole] = whole.reshape(num_whole, rows.shape[1])
    if len(tail):
        rows[row + num_whole, : len(tail)] = tail
