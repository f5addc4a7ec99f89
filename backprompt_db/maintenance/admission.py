"""What a part must be to be carried from one database to another: checked when it leaves and when it arrives."""

from __future__ import annotations

from dataclasses import dataclass

from backprompt_db.codec import decode, decode_origin
from backprompt_db.errors import BlobFormat
from backprompt_db.fidelity import Fidelity
from backprompt_db.representation import Arrays, Origin, Part
from backprompt_db.store.contract import Key

_MAX_COMPUTE_SECONDS = 1e9
_MAX_NUM_TOKENS = 1 << 31
"""The catalog sums both up; what nothing can have computed must not spoil its sums."""

_LOSSY_DTYPES = {Fidelity.BFLOAT16: frozenset({"BF16", "F16"}), Fidelity.INT8: frozenset({"I8"})}


@dataclass(frozen=True, slots=True)
class Note:
    """What is known of a representation beside its parts."""

    label: str | None = None
    is_pinned: bool = False
    num_hits: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing."""
        return self == Note()

    def joined(self, other: Note) -> Note:
        """Return what both say of one representation; of two labels, the first."""
        label = other.label if self.label is None else self.label
        return Note(label, self.is_pinned or other.is_pinned, self.num_hits + other.num_hits)


@dataclass(frozen=True, slots=True, eq=False)
class CheckedPart:
    """A part of which all has been checked that can be, without the model that computed it."""

    key: Key
    origin: Origin
    blob: memoryview
    note: Note = Note()


def admit(key: Key, blob: memoryview, *, fidelity: Fidelity, note: Note | None = None) -> CheckedPart:
    """Return a part that is what its key says, and as closely kept as `fidelity` says.

    Raises `BlobFormat` for any other, `FormatTooNew` for one of a newer version.
    """
    part, origin = decode_origin(blob)
    check_place(key, part, origin)
    reason = _flaw(part, decode(part, blob), origin, fidelity)
    if reason is not None:
        raise _refusal(key, reason)
    return CheckedPart(key, origin, blob, note or Note())


def check_place(key: Key, part: Part, origin: Origin) -> None:
    """Raise `BlobFormat` for a part that was computed from something else than what its key is the name of."""
    if (origin.address, part) != key:
        raise _refusal(key, f"it is the {part.name.lower()} part of {origin.address.hex()}")


def _flaw(part: Part, arrays: Arrays, origin: Origin, fidelity: Fidelity) -> str | None:
    if not 0 <= origin.compute_seconds <= _MAX_COMPUTE_SECONDS:  # NaN is not between them
        return f"nothing takes {origin.compute_seconds} seconds to compute"
    if not origin.num_tokens <= _MAX_NUM_TOKENS or _num_tokens(part, arrays) not in (None, origin.num_tokens):
        return f"it does not have {origin.num_tokens:,} tokens"
    if part is Part.KV and not _is_kept(arrays["keys"].dtype, fidelity):
        return f"its keys and values are {arrays['keys'].dtype}, which {fidelity} ones are not"
    return None


def _num_tokens(part: Part, arrays: Arrays) -> int | None:
    if part is Part.KV:
        return arrays["keys"].shape[2]
    return arrays["input_ids"].shape[0] if part is Part.SCORES else None


def _is_kept(dtype: str, fidelity: Fidelity) -> bool:
    return dtype != "I8" if fidelity is Fidelity.EXACT else dtype in _LOSSY_DTYPES[fidelity]


def _refusal(key: Key, reason: str) -> BlobFormat:
    return BlobFormat(
        f"the {key.part.name.lower()} part of {key.address.hex()} cannot be used: {reason}",
        hint="It was left out and will be computed again.",
    )
