"""Reading one stored part with every check that there is: of its digest, its format and its place."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from backprompt_db.codec.blob import decode, decode_origin
from backprompt_db.errors import BackpromptError, FormatTooNew, StoreClosed, StoreError
from backprompt_db.prompt.ids import Address
from backprompt_db.prompt.representation import Arrays, Origin, Part
from backprompt_db.store.contract import Key, Store


class Kind(enum.Enum):
    """What can be wrong with a part. The value is its name in listings and JSON."""

    DAMAGED = "damaged"
    """Its bytes do not match their digest; a store that may be written to has removed it."""
    MALFORMED = "malformed"
    """Its digest matches, but it is not what the format prescribes."""
    MISPLACED = "misplaced"
    """It was computed from something else than its key says."""
    TOO_NEW = "too-new"
    """A newer version of backprompt-db wrote it."""
    UNREADABLE = "unreadable"
    """The store failed to read it."""
    UNRECORDED = "unrecorded"
    """It is in the store but not in the catalog."""
    MISSING = "missing"
    """It is in the catalog but not in the store."""
    INCOMPLETE = "incomplete"
    """Its head and its chunks do not fit together."""
    ORPHANED = "orphaned"
    """Chunks without a head, which only take up room."""
    FOREIGN = "foreign"
    """A record that belongs to no part at all."""
    DIFFERENT = "different"
    """The model computes something else."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with one part; a foreign record has neither address nor part."""

    address: Address | None
    part: Part | None
    kind: Kind
    detail: str


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """What was found under one key of a store; neither arrays nor problem when nothing is there."""

    key: Key
    nbytes: int = 0
    arrays: Arrays | None = None
    origin: Origin | None = None
    problem: Problem | None = None


def inspect(store: Store, key: Key) -> Inspection:
    """Read and check one part. Raises `StoreClosed`; every other failure is the inspection's problem."""
    num_quarantined = store.num_quarantined
    try:
        blob = store.get(key)
    except StoreClosed:
        raise
    except StoreError as error:
        return _wrong(key, Kind.UNREADABLE, error.message)
    if blob is not None:
        return _inspect_blob(key, blob)
    if store.num_quarantined > num_quarantined:
        return _wrong(key, Kind.DAMAGED, "its bytes do not match their digest")
    return Inspection(key)


def _inspect_blob(key: Key, blob: memoryview) -> Inspection:
    try:
        part, origin = decode_origin(blob)
        if (origin.address, part) != key:
            detail = f"it is the {part.name.lower()} part of {origin.address.hex()}"
            return _wrong(key, Kind.MISPLACED, detail, nbytes=blob.nbytes)
        return Inspection(key, blob.nbytes, decode(part, blob), origin)
    except FormatTooNew as error:
        return _wrong(key, Kind.TOO_NEW, error.message, nbytes=blob.nbytes)
    except BackpromptError as error:
        return _wrong(key, Kind.MALFORMED, error.message, nbytes=blob.nbytes)


def _wrong(key: Key, kind: Kind, detail: str, *, nbytes: int = 0) -> Inspection:
    return Inspection(key, nbytes, problem=Problem(*key, kind, detail))
