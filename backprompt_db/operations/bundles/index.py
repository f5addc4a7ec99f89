"""What a bundle says about its parts before they come, as JSON that is checked against the types below.

msgspec refuses values of other types, sizes and patterns, and missing fields; it ignores fields that it does not know.
Of two fields with the same name it would take the second one, so names are checked here.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.errors import FormatTooNew
from backprompt_db.operations.bundles.tar import MAX_MEMBER_NBYTES, malformed
from backprompt_db.prompt.ids import ID_NBYTES, TokenizerId, WeightsId
from backprompt_db.prompt.representation import Part
from backprompt_db.store.records import DIGEST_NBYTES

if TYPE_CHECKING:
    from backprompt_db.catalog.records import ModelRecord, TokenizerRecord

FORMAT = 1
"""The version of bundles that this code writes."""

_MAX_LINE_NBYTES = 1 << 17
"""Python's objects take twenty times the bytes of `[[],[],...`."""
_MAX_NUM_CHARACTERS = 4096

PARTS = {part.name.lower(): part for part in Part}
"""Parts by their names in bundles."""

_Value = TypeVar("_Value")


_Text = Annotated[str, Meta(max_length=_MAX_NUM_CHARACTERS)]
_Number = Annotated[int, Meta(ge=0, le=1 << 53)]
_Nbytes = Annotated[int, Meta(ge=0, le=MAX_MEMBER_NBYTES)]
# Capitals and spaces would be a second name for the same thing. The length is given too, for `$` allows a line's end.
_Id = Annotated[str, Meta(pattern=f"^[0-9a-f]{{{2 * ID_NBYTES}}}$", max_length=2 * ID_NBYTES)]
_Digest = Annotated[str, Meta(pattern=f"^[0-9a-f]{{{2 * DIGEST_NBYTES}}}$", max_length=2 * DIGEST_NBYTES)]


class _Description(Struct):
    format: _Number
    fidelity: _Text
    created_at: object = None
    """For people; nothing reads it."""


class _Model(Struct):
    weights_id: _Id
    name: _Text
    architecture: _Text
    dtype: _Text
    num_layers: _Number
    num_kv_heads: _Number
    head_dim: _Number
    vocab_size: _Number
    max_positions: _Number | None


class _Tokenizer(Struct):
    tokenizer_id: _Id
    name: _Text
    kind: _Text
    vocab_size: _Number


class PartEntry(Struct):
    """A part that will come."""

    part: str
    """One of the keys of `PARTS`."""
    nbytes: _Nbytes
    xxh3_128: _Digest
    """The digest of its blob."""


class Entry(Struct):
    """A representation that will come, with its parts in this order."""

    address: _Id
    parts: Annotated[list[PartEntry], Meta(min_length=1)]
    label: _Text | None
    is_pinned: bool


class _Line(Struct, forbid_unknown_fields=True):
    """A line of an index: one of the three."""

    model: _Model | UnsetType = UNSET
    tokenizer: _Tokenizer | UnsetType = UNSET
    representation: Entry | UnsetType = UNSET


class End(Struct):
    """What closes a bundle."""

    num_parts: _Number
    xxh3_128: _Digest
    """The digest over the names and digests of all members before."""


@dataclass(frozen=True, slots=True)
class Index:
    """What comes next in a bundle, and who computed it."""

    entries: Sequence[Entry]
    models: Sequence[ModelRecord] = ()
    """Unchecked ones: a model proves itself where it is used."""
    tokenizers: Sequence[TokenizerRecord] = ()


def description_to_json(fidelity: Fidelity, *, made_at: float) -> bytes:
    """Return what a bundle begins with."""
    created_at = datetime.fromtimestamp(made_at, UTC).isoformat(timespec="seconds")
    return _to_json(_Description(FORMAT, fidelity.value, created_at))


def fidelity_from_json(content: bytes) -> Fidelity:
    """Return the fidelity of a bundle from what it begins with. Raises `FormatTooNew` for a newer bundle."""
    found = _from_json(content, _Description)
    if found.format != FORMAT or found.fidelity not in tuple(Fidelity):
        raise FormatTooNew(
            f"the bundle has format {found.format} and keeps keys and values {found.fidelity:.20}, unknown to this"
            " version",
            hint="Upgrade backprompt-db.",
        )
    return Fidelity(found.fidelity)


def index_to_json(index: Index) -> bytes:
    """Return one line for each model, tokenizer and representation."""
    lines = [_Line(model=_model(record)) for record in index.models]
    lines += [_Line(tokenizer=_tokenizer(record)) for record in index.tokenizers]
    lines += [_Line(representation=entry) for entry in index.entries]
    return b"".join(map(_to_json, lines))


def index_from_json(content: bytes) -> Index:
    """Return what the lines say. Raises `FormatError` for anything that is not as `index_to_json` writes it."""
    models, tokenizers, entries = list["ModelRecord"](), list["TokenizerRecord"](), list[Entry]()
    for line in io.BytesIO(content):
        match _from_json(line, _Line):
            case _Line(_Model() as model, UnsetType(), UnsetType()):
                models.append(_read_model(model))
            case _Line(UnsetType(), _Tokenizer() as tokenizer, UnsetType()):
                tokenizers.append(_read_tokenizer(tokenizer))
            case _Line(UnsetType(), UnsetType(), Entry() as entry):
                entries.append(_checked(entry))
            case _:
                raise malformed("its index cannot be read: a line says nothing, or more than one thing")
    return Index(entries, models, tokenizers)


def end_to_json(end: End) -> bytes:
    """Return what a bundle ends with."""
    return _to_json(end)


def end_from_json(content: bytes) -> End:
    """Return what a bundle says at its end."""
    return _from_json(content, End)


def _to_json(value: Struct) -> bytes:
    return msgspec.json.encode(value) + b"\n"


def _from_json(line: bytes, type_: type[_Value]) -> _Value:
    if len(line) > _MAX_LINE_NBYTES:
        raise malformed("a line of its index is too long")
    try:
        found = msgspec.json.decode(line, type=type_)
        json.loads(line.decode(), object_pairs_hook=_unique)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise malformed(f"its index cannot be read: {error!s:.200}") from None
    return found


def _unique(pairs: Sequence[tuple[str, Any]]) -> None:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name appears twice")


def _model(record: ModelRecord) -> _Model:
    name, architecture, dtype = (bounded(each) or "" for each in (record.name, record.architecture, record.dtype))
    sizes = (record.num_layers, record.num_kv_heads, record.head_dim, record.vocab_size)
    return _Model(record.weights_id.hex(), name, architecture, dtype, *sizes, record.max_positions)


def _read_model(found: _Model) -> ModelRecord:
    from backprompt_db.catalog.records import ModelRecord

    unchecked = {"verdict": "unchecked", **dict.fromkeys(("mask_form", "max_error", "reason", "checked_with"))}
    fields: dict[str, Any] = msgspec.structs.asdict(found) | unchecked
    return ModelRecord(**fields | {"weights_id": WeightsId(bytes.fromhex(found.weights_id))})


def _tokenizer(record: TokenizerRecord) -> _Tokenizer:
    name, kind = bounded(record.name) or "", bounded(record.kind) or ""
    return _Tokenizer(record.tokenizer_id.hex(), name, kind, record.vocab_size)


def _read_tokenizer(found: _Tokenizer) -> TokenizerRecord:
    from backprompt_db.catalog.records import TokenizerRecord

    tokenizer_id = TokenizerId(bytes.fromhex(found.tokenizer_id))
    return TokenizerRecord(tokenizer_id, found.name, found.kind, found.vocab_size)


def _checked(entry: Entry) -> Entry:
    names = {each.part for each in entry.parts}
    if len(names) != len(entry.parts) or not names <= PARTS.keys():
        raise malformed(f"a representation has each of its parts once, and no others than {', '.join(PARTS)}")
    return entry


def bounded(string: str | None) -> str | None:
    """Return a string that readers take, None for a longer one."""
    return None if string is None or len(string) > _MAX_NUM_CHARACTERS else string
