"""How a blob lies in LMDB, format 1: one head record, and chunk records when it does not fit into one.

    record key   = address (32 bytes) | part (1 byte) | u32be chunk number, 0 for the head
    head record  = u32be number of chunks | u64be blob length | digest of each chunk (16 bytes each)
                   | the blob itself, when the number of chunks is 0 | digest of (record key | all before)
    chunk record = up to CHUNK_NBYTES bytes of the blob

The head's digest covers its key too, so a record that was moved to another address counts as damaged. Each chunk has a
digest of its own, which a reader verifies while the chunk is in the processor's cache. Blobs are divided because large
values would fragment the file: eviction frees pages, and LMDB reuses only runs that are long enough for a whole value.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import xxhash

from backprompt_db.prompt.ids import ID_NBYTES, Address
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key

CHUNK_NBYTES = (1 << 20) - 16
"""A chunk and its 16-byte LMDB page header fill 256 pages of 4 KiB."""

_FIELDS = struct.Struct(">IQ")
_RECORD_KEY = struct.Struct(f">{ID_NBYTES}scI")
RECORD_KEY_NBYTES = _RECORD_KEY.size

_PARTS = {part.value: part for part in Part}


class Head(NamedTuple):
    """A verified head record."""

    nbytes: int
    chunk_digests: list[bytes]
    """Empty when the blob is inline."""
    inline: memoryview
    """The blob itself when there are no chunks."""


def record_key(key: Key, chunk: int = 0) -> bytes:
    """Return the LMDB key of a blob's head (chunk 0) or of one of its chunks (from 1)."""
    return _RECORD_KEY.pack(key.address, key.part.value, chunk)


def blob_key(record: bytes) -> Key | None:
    """Return the key of the blob that an LMDB record key belongs to; None for a record that is not ours."""
    if len(record) != RECORD_KEY_NBYTES:
        return None
    address, code, _ = _RECORD_KEY.unpack(record)
    return Key(Address(address), _PARTS[code]) if code in _PARTS else None


def records(key: Key, pieces: Sequence[bytes | memoryview], digest: Digest) -> list[tuple[bytes, bytes | memoryview]]:
    """Return the records of a blob that comes in pieces, its head first. Only chunks across two pieces are copied."""
    views = [memoryview(piece).cast("B") for piece in pieces]
    nbytes = sum(view.nbytes for view in views)
    if nbytes <= CHUNK_NBYTES:
        return [(record_key(key), _head(record_key(key), nbytes, [], b"".join(views), digest))]
    chunks = list(_chunks(views))
    head = _head(record_key(key), nbytes, [digest(chunk) for chunk in chunks], b"", digest)
    numbered = ((record_key(key, number), chunk) for number, chunk in enumerate(chunks, start=1))
    return [(record_key(key), head), *numbered]


def _chunks(views: Sequence[memoryview]) -> Iterator[bytes | memoryview]:
    """Divide the bytes of all views into chunks; a chunk that lies within one view is a view of it."""
    begun = bytearray()
    for view in views:
        first = min(CHUNK_NBYTES - len(begun), view.nbytes) if begun else 0
        begun += view[:first]
        if len(begun) == CHUNK_NBYTES:
            yield bytes(begun)
            begun = bytearray()
        if begun:
            continue
        last = first + (view.nbytes - first) // CHUNK_NBYTES * CHUNK_NBYTES
        for begin in range(first, last, CHUNK_NBYTES):
            yield view[begin : begin + CHUNK_NBYTES]
        begun += view[last:]
    if begun:
        yield bytes(begun)


def read_head(record: bytes, value: memoryview, digest: Digest) -> Head | None:
    """Return a head record's content; None when it is damaged, or was written for another key."""
    body, own_digest = value[:-DIGEST_NBYTES], value[-DIGEST_NBYTES:]
    if len(body) < _FIELDS.size or digest(record, body) != own_digest:
        return None
    num_chunks, nbytes = _FIELDS.unpack_from(body)
    rest = body[_FIELDS.size :]
    if not num_chunks:
        return Head(nbytes, [], rest) if nbytes == len(rest) else None
    if len(rest) != num_chunks * DIGEST_NBYTES or num_chunks != -(-nbytes // CHUNK_NBYTES):
        return None
    digests = [bytes(rest[i : i + DIGEST_NBYTES]) for i in range(0, len(rest), DIGEST_NBYTES)]
    return Head(nbytes, digests, rest[:0])


def blob_nbytes(value: memoryview) -> int | None:
    """Return the blob length that an unverified head record claims; None when it is too short to have one."""
    return int(_FIELDS.unpack_from(value)[1]) if len(value) >= _FIELDS.size else None


def _head(record: bytes, nbytes: int, chunk_digests: list[bytes], inline: bytes, digest: Digest) -> bytes:
    body = _FIELDS.pack(len(chunk_digests), nbytes) + (b"".join(chunk_digests) or inline)
    return body + digest(record, body)


DIGEST_NBYTES = 16

Digest: TypeAlias = Callable[..., bytes]
"""A function that returns a digest of 16 bytes for the concatenation of its arguments, `bytes` or views."""

_CONTEXT = "backprompt-db 2026 secret of a database, format 1"
"""BLAKE3 derives a key for this use alone from the secret and this string."""


def xxh3_128(*pieces: bytes | memoryview) -> bytes:
    """Return the XXH3-128 of the concatenated pieces, big-endian."""
    if len(pieces) == 1:
        return xxhash.xxh3_128_digest(pieces[0])
    state = xxhash.xxh3_128()
    for piece in pieces:
        state.update(piece)
    return state.digest()


def keyed_blake3(secret: bytes) -> Digest:
    """Return a digest that only those who know the secret can make: the first 16 bytes of BLAKE3 with a derived key."""
    import blake3

    key = blake3.blake3(secret, derive_key_context=_CONTEXT).digest()

    def digest(*pieces: bytes | memoryview) -> bytes:
        state = blake3.blake3(key=key)
        for piece in pieces:
            state.update(piece)
        return state.digest(DIGEST_NBYTES)

    return digest
