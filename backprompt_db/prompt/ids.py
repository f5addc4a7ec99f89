"""Segment ids and addresses, format 1: the names of all values.

Both are SHA-256 digests of what a representation is computed *from*, so the same piece of text after the same pieces of
text, under the same model and tokenizer, has the same address in every process on every machine. The byte layouts below
are final for format 1; tests compare them with the golden vectors in `tests/data/golden_keys.json`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple, NewType

from backprompt_db.errors import InvalidText, PromptError

SegmentId = NewType("SegmentId", bytes)
"""32 bytes that name a piece of text in its place."""

WeightsId = NewType("WeightsId", bytes)
"""32 bytes that name everything about a model that changes its numbers."""

TokenizerId = NewType("TokenizerId", bytes)
"""32 bytes that name everything about a tokenizer that changes its tokens."""

Address = NewType("Address", bytes)
"""32 bytes that name one representation in every store."""


class ModelIds(NamedTuple):
    """The ids of one model and one tokenizer: what, with a segment's id, names a representation."""

    weights_id: WeightsId
    tokenizer_id: TokenizerId

    def __repr__(self) -> str:
        return f"ModelIds({self.weights_id.hex()[:_NUM_DIGITS]}, {self.tokenizer_id.hex()[:_NUM_DIGITS]})"


_NUM_DIGITS = 12
"""How many digits of an id people are shown."""

ID_NBYTES = 32

_SEGMENT = b"backprompt-db/segment/1\0"
_NAMESPACE = b"backprompt-db/namespace/1\0"
_ADDRESS = b"backprompt-db/address/1\0"
_TOKENIZER = b"backprompt-db/tokenizer/1\0"

_MAX_START = 2**63 - 1


def segment_id(string: str, *, parents: Iterable[SegmentId] = (), start: int | None = None) -> SegmentId:
    """Return the id of `string` placed directly after `parents`.

    The order of `parents` does not matter and repeated parents count once. `start` is the explicit position id of the
    first token, `None` where it follows from the parents.

    Raises `InvalidText` for a lone surrogate and `PromptError` for a start outside `[0, 2**63)`.
    """
    if start is not None and not (type(start) is int and 0 <= start <= _MAX_START):
        raise PromptError(f"start={start} is not a position id", hint="Give an int of 0 or more.")
    ascending = sorted(set(parents))
    text = utf8(string)
    digest = hashlib.sha256(_SEGMENT)
    digest.update(len(ascending).to_bytes(4, "big"))
    digest.update(b"".join(ascending))
    digest.update((-1 if start is None else start).to_bytes(8, "big", signed=True))
    digest.update(len(text).to_bytes(8, "big"))
    digest.update(text)
    return SegmentId(digest.digest())


def namespace_id(namespace: str) -> SegmentId | None:
    """Return the synthetic parent of every first segment in `namespace`; the default namespace `""` has none."""
    if not namespace:
        return None
    name = utf8(namespace)
    return SegmentId(hashlib.sha256(_NAMESPACE + len(name).to_bytes(8, "big") + name).digest())


def address(segment: SegmentId, weights: WeightsId, tokenizer: TokenizerId) -> Address:
    """Return the address of the representation of `segment` under one model and one tokenizer."""
    return Address(hashlib.sha256(_ADDRESS + segment + weights + tokenizer).digest())


def tokenizer_id(definition: str) -> TokenizerId:
    """Return the id of the tokenizer that is defined by a JSON text, which `compute/tokens.py` writes."""
    return TokenizerId(hashlib.sha256(_TOKENIZER + utf8(definition)).digest())


def utf8(string: str) -> bytes:
    """Encode `string` as UTF-8, without any normalisation; a lone surrogate raises `InvalidText`."""
    try:
        return string.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidText(
            f"the text has a lone surrogate (U+{ord(string[error.start]):04X}) at character {error.start}",
            hint="Decode the source with the right encoding, or replace the character.",
        ) from None
