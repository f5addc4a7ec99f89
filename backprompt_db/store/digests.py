"""What chunks are digested with: XXH3-128, which finds damage, or keyed BLAKE3, which finds forgery too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import xxhash

DIGEST_NBYTES = 16

Digest: TypeAlias = Callable[..., bytes]
"""Gives the 16 bytes that stand for the concatenation of its arguments, `bytes` or views of them."""

_CONTEXT = "backprompt-db 2026 secret of a database, format 1"
"""BLAKE3 derives the key from the secret for this use alone."""


def xxh3_128(*pieces: bytes | memoryview) -> bytes:
    """Return the XXH3-128 of the concatenated pieces, big-endian."""
    if len(pieces) == 1:
        return xxhash.xxh3_128_digest(pieces[0])
    state = xxhash.xxh3_128()
    for piece in pieces:
        state.update(piece)
    return state.digest()


def keyed_blake3(secret: bytes) -> Digest:
    """Return the digest that only those who know the secret can make: BLAKE3 with a derived key, its first 16 bytes."""
    import blake3

    key = blake3.blake3(secret, derive_key_context=_CONTEXT).digest()

    def digest(*pieces: bytes | memoryview) -> bytes:
        state = blake3.blake3(key=key)
        for piece in pieces:
            state.update(piece)
        return state.digest(DIGEST_NBYTES)

    return digest
