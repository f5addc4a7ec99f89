"""What a bundle says of its parts before they come, as JSON: plain values to bytes, and bytes, checked, to values."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.errors import FormatTooNew
from backprompt_db.operations.bundles.ingest import Note
from backprompt_db.operations.bundles.tar import MAX_MEMBER_NBYTES, malformed
from backprompt_db.prompt.ids import ID_NBYTES, Address, TokenizerId, WeightsId
from backprompt_db.prompt.representation import Part
from backprompt_db.store.records import DIGEST_NBYTES

if TYPE_CHECKING:
    from backprompt_db.catalog.records import ModelRecord, TokenizerRecord

FORMAT = 1
"""The version of bundles that this code writes."""

_MAX_LINE_NBYTES = 1 << 17
"""Python's objects take twenty times the bytes of `[[],[],...`."""
_MAX_NUM_CHARACTERS = 4096
_MAX_NUMBER = 1 << 53

_MODEL_NAMES = ("name", "architecture", "dtype")
_MODEL_SIZES = ("num_layers", "num_kv_heads", "head_dim", "vocab_size")

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class PartEntry:
    """A part that will come."""

    part: Part
    nbytes: int
    digest: bytes
    """XXH3-128 of the blob."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A representation that will come, with its parts in this order."""

    address: Address
    parts: tuple[PartEntry, ...]
    note: Note


@dataclass(frozen=True, slots=True)
class Index:
    """What comes next in a bundle, and who computed it."""

    entries: tuple[Entry, ...]
    models: tuple[ModelRecord, ...] = ()
    """Unchecked ones: a model proves itself where it is used."""
    tokenizers: tuple[TokenizerRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """What closes a bundle."""

    num_parts: int
    digest: bytes
    """XXH3-128 over the names and digests of all members before."""


def description_to_json(fidelity: Fidelity, *, made_at: float) -> bytes:
    """Return what a bundle begins with."""
    created_at = datetime.fromtimestamp(made_at, UTC).isoformat(timespec="seconds")
    return _to_json({"format": FORMAT, "fidelity": fidelity.value, "created_at": created_at}) + b"\n"


def fidelity_from_json(content: bytes) -> Fidelity:
    """Return the fidelity of a bundle from what it begins with. Raises `FormatTooNew` for a newer bundle."""
    format_, fidelity = _parsed(content, lambda fields: (_count(fields, "format"), _text(fields["fidelity"])))
    if format_ != FORMAT or fidelity not in tuple(Fidelity):
        raise FormatTooNew(
            f"the bundle has format {format_} and keeps keys and values {fidelity:.20}, unknown to this version",
            hint="Upgrade backprompt-db.",
        )
    return Fidelity(fidelity)


def index_to_json(index: Index) -> bytes:
    """Return one line for each model, tokenizer and representation."""
    lines = [{"model": _model(record)} for record in index.models]
    lines += [{"tokenizer": _tokenizer(record)} for record in index.tokenizers]
    lines += [{"representation": _entry(entry)} for entry in index.entries]
    return b"".join(_to_json(line) + b"\n" for line in lines)


def index_from_json(content: bytes) -> Index:
    """Return what the lines say. Raises `FormatError` for anything that is not as `index_to_json` writes it."""
    found: dict[str, list[Any]] = {"model": [], "tokenizer": [], "representation": []}
    readers = {"model": _read_model, "tokenizer": _read_tokenizer, "representation": _read_entry}
    for line in io.BytesIO(content):
        kind, value = _parsed(line, lambda fields: _only(fields, readers))
        found[kind].append(value)
    return Index(tuple(found["representation"]), tuple(found["model"]), tuple(found["tokenizer"]))


def end_to_json(end: End) -> bytes:
    """Return what a bundle ends with."""
    return _to_json({"num_parts": end.num_parts, "xxh3_128": end.digest.hex()}) + b"\n"


def end_from_json(content: bytes) -> End:
    """Return what a bundle says at its end."""
    return _parsed(content, lambda fields: End(_count(fields, "num_parts"), _id(fields, "xxh3_128", DIGEST_NBYTES)))


def _to_json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def _model(record: ModelRecord) -> dict[str, Any]:
    names = {name: _bounded(getattr(record, name)) or "" for name in _MODEL_NAMES}
    sizes = {name: getattr(record, name) for name in (*_MODEL_SIZES, "max_positions")}
    return {"weights_id": record.weights_id.hex(), **names, **sizes}


def _tokenizer(record: TokenizerRecord) -> dict[str, Any]:
    names = {name: _bounded(getattr(record, name)) or "" for name in ("name", "kind")}
    return {"tokenizer_id": record.tokenizer_id.hex(), **names, "vocab_size": record.vocab_size}


def _entry(entry: Entry) -> dict[str, Any]:
    parts = [
        {"part": each.part.name.lower(), "nbytes": each.nbytes, "xxh3_128": each.digest.hex()} for each in entry.parts
    ]
    note = {"label": _bounded(entry.note.label), "is_pinned": entry.note.is_pinned}
    return {"address": entry.address.hex(), "parts": parts, **note}


def _bounded(string: str | None) -> str | None:
    """Return a string that readers take, None for a longer one."""
    return None if string is None or len(string) > _MAX_NUM_CHARACTERS else string


def _parsed(line: bytes, read: Callable[[dict[str, Any]], _Value]) -> _Value:
    """Return what `read` makes of a JSON object, all of whose mistakes are the bundle's."""
    if len(line) > _MAX_LINE_NBYTES:
        raise malformed("a line of its index is too long")
    try:
        fields = json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_not_a_number)
        if not isinstance(fields, dict):
            raise TypeError("it is no JSON object")  # noqa: TRY301 - one place turns each into FormatError
        return read(fields)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise malformed(f"its index cannot be read ({error!r:.200})") from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name appears twice")
    return fields


def _not_a_number(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _only(fields: dict[str, Any], readers: Mapping[str, Callable[[dict[str, Any]], Any]]) -> tuple[str, Any]:
    ((kind, value),) = fields.items()
    return kind, readers[kind](value)


def _read_model(fields: dict[str, Any]) -> ModelRecord:
    from backprompt_db.catalog.records import ModelRecord

    return ModelRecord(
        weights_id=WeightsId(_id(fields, "weights_id", ID_NBYTES)),
        name=_text(fields["name"]),
        architecture=_text(fields["architecture"]),
        dtype=_text(fields["dtype"]),
        num_layers=_count(fields, "num_layers"),
        num_kv_heads=_count(fields, "num_kv_heads"),
        head_dim=_count(fields, "head_dim"),
        vocab_size=_count(fields, "vocab_size"),
        max_positions=None if fields["max_positions"] is None else _count(fields, "max_positions"),
        verdict="unchecked",
        mask_form=None,
        max_error=None,
        reason=None,
        checked_with=None,
    )


def _read_tokenizer(fields: dict[str, Any]) -> TokenizerRecord:
    from backprompt_db.catalog.records import TokenizerRecord

    id_ = TokenizerId(_id(fields, "tokenizer_id", ID_NBYTES))
    return TokenizerRecord(id_, _text(fields["name"]), _text(fields["kind"]), _count(fields, "vocab_size"))


def _read_entry(fields: dict[str, Any]) -> Entry:
    parts = tuple(map(_read_part, fields["parts"]))
    if not parts or len({each.part for each in parts}) != len(parts):
        raise ValueError("a representation has each of its parts once, and one at least")
    if type(fields["is_pinned"]) is not bool:
        raise TypeError("is_pinned is true or false")
    label = None if fields["label"] is None else _text(fields["label"])
    return Entry(Address(_id(fields, "address", ID_NBYTES)), parts, Note(label, fields["is_pinned"]))


def _read_part(fields: dict[str, Any]) -> PartEntry:
    part = {part.name.lower(): part for part in Part}[fields["part"]]
    nbytes = _count(fields, "nbytes", maximum=MAX_MEMBER_NBYTES)
    return PartEntry(part, nbytes, _id(fields, "xxh3_128", DIGEST_NBYTES))


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _MAX_NUM_CHARACTERS:
        raise TypeError("a name or label is no string, or too long")
    value.encode()  # a lone surrogate cannot be stored
    return value


def _id(fields: dict[str, Any], name: str, nbytes: int) -> bytes:
    found = bytes.fromhex(fields[name])
    # Other digits and spaces would be a second name for the same thing.
    if len(found) != nbytes or found.hex() != fields[name]:
        raise ValueError(f"{name} is not {nbytes} bytes in hex")
    return found


def _count(fields: dict[str, Any], name: str, *, maximum: int = _MAX_NUMBER) -> int:
    value = fields[name]
    if type(value) is not int or not 0 <= value <= maximum:
        raise ValueError(f"{name} is not a number up to {maximum}")
    return value
