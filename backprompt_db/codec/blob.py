"""One part of a representation as one safetensors blob, format 1: writing it, reading it, refusing what is malformed.

    u64le header length | header, JSON padded with spaces to 8 bytes | array bytes, one after the other

The header names each array's dtype, shape and byte range. Its single `__metadata__` entry, `backprompt-db`, holds JSON:
format, part, text, parents, start, namespace, weights id, tokenizer id, tokens, compute seconds, library versions.
Any safetensors reader opens such a blob. `decode` is stricter: it takes exactly the arrays of the part, with its dtypes
and shapes, and not one byte more. It allocates nothing before it has checked the header. Blobs are byte for byte those
of the safetensors library, whose own writer would copy every array twice.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from backprompt_db.codec.continuations import flaw_of_tree
from backprompt_db.errors import BackpromptError, BlobFormat, FormatTooNew, StoreClosed
from backprompt_db.prompt.ids import ID_NBYTES, SegmentId, TokenizerId, WeightsId
from backprompt_db.prompt.representation import FORMAT, ITEMSIZE, Array, Arrays, Origin, Part

if TYPE_CHECKING:
    from backprompt_db.store.contract import Key, Store

_HEADER_LENGTH = struct.Struct("<Q")
_MAX_HEADER_NBYTES = 1 << 26
_MAX_HEADER_STRINGS = 23
"""Three strings of metadata, and five for each of four arrays: name, `dtype` and its value, `shape`, `data_offsets`."""
_MAX_STRUCTURE_NBYTES = 1024
"""How many bytes a header may have outside its strings."""
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_MAX_ARRAY_NBYTES = 1 << 62
_METADATA_KEY = "backprompt-db"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_INT8 = frozenset({"I8"})
_FLOAT32 = frozenset({"F32"})
_INT32 = frozenset({"I32"})
_DTYPE_ORDER = ("F64", "F32", "I32", "BF16", "F16", "I8")
"""The order of arrays in safetensors: wide elements first, so that each array is aligned; then by name."""

_Layout: TypeAlias = dict[str, tuple[frozenset[str], int]]
"""Name, dtypes and number of dimensions of each array."""

_LAYOUTS: dict[Part, tuple[_Layout, ...]] = {
    Part.SCORES: ({"input_ids": (_INT32, 1), "token_logprobs": (_FLOAT32, 1)},),
    Part.LOGITS: ({"logits": (_FLOATS, 1)},),
    Part.KV: (
        {"keys": (_FLOATS, 4), "values": (_FLOATS, 4)},
        {"keys": (_INT8, 4), "keys_scale": (_FLOAT32, 3), "values": (_INT8, 4), "values_scale": (_FLOAT32, 3)},
    ),
    Part.CONTINUATIONS: ({"input_ids": (_INT32, 1), "parents": (_INT32, 1), "token_logprobs": (_FLOAT32, 1)},),
}
"""What each part may hold. The second layout of keys and values is that of int8, see `fidelity`."""


def encode(part: Part, arrays: Arrays, origin: Origin) -> bytes:
    """Return one part as a blob. Raises `BlobFormat` for arrays that are not those of the part."""
    return b"".join(encode_pieces(part, arrays, origin))


def encode_pieces(part: Part, arrays: Arrays, origin: Origin) -> list[bytes | memoryview]:
    """Return a blob in pieces that follow one another: the header, then the arrays, which are not copied.

    Raises `BlobFormat` for arrays that are not those of the part.
    """
    _check_layout(part, {name: (array.dtype, array.shape) for name, array in arrays.items()})
    _check_tree(part, arrays)
    ordered = sorted(arrays.items(), key=lambda item: (_DTYPE_ORDER.index(item[1].dtype), item[0]))
    header: dict[str, Any] = {"__metadata__": {_METADATA_KEY: _to_json(_origin_to_json(part, origin))}}
    end = 0
    for name, array in ordered:
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": array.dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    raw = _to_json(header).encode()
    raw += b" " * (-len(raw) % _HEADER_LENGTH.size)
    if len(raw) > _MAX_HEADER_NBYTES:
        raise BlobFormat("the text of a part is too long to be stored", hint="Divide it: concatenate shorter texts.")
    return [_HEADER_LENGTH.pack(len(raw)) + raw, *(array.data for _, array in ordered)]


def decode(part: Part, blob: memoryview) -> Arrays:
    """Return the arrays of a blob as views of it. Raises `BlobFormat`; never reads outside it."""
    header, data = _split(blob)
    places = _places(part, header)
    end = max(place.end for place in places.values())
    if end != data.nbytes:
        raise _malformed(f"{data.nbytes - end} bytes belong to no array")
    arrays = {name: _array(place, data) for name, place in places.items()}
    _check_tree(part, arrays)
    return arrays


class ArrayPlace(NamedTuple):
    """Where an array lies in a blob."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """In bytes after the header."""
    end: int


def header_nbytes(beginning: bytes | memoryview) -> int:
    """Return how many bytes of a blob come before its arrays, or 8 when `beginning` has not enough to say.

    Raises `BlobFormat` for a length that no header has. A length that is not a multiple of 8 is refused too, although
    readers of safetensors accept it: no writer makes it, and the arrays would not be aligned.
    """
    if len(beginning) < _HEADER_LENGTH.size:
        return _HEADER_LENGTH.size
    (nbytes,) = _HEADER_LENGTH.unpack_from(beginning)
    if nbytes > _MAX_HEADER_NBYTES or nbytes % _HEADER_LENGTH.size:
        raise _malformed(f"its header claims {nbytes} bytes")
    return int(_HEADER_LENGTH.size + nbytes)


def kv_places(header: memoryview) -> dict[str, ArrayPlace]:
    """Return where the arrays of a kv part are, by its header. Raises `BlobFormat`."""
    return _places(Part.KV, _split(header)[0])


def decode_origin(blob: memoryview) -> tuple[Part, Origin]:
    """Return which part a blob is and what it was computed from. Raises `BlobFormat` or `FormatTooNew`."""
    header, _ = _split(blob)
    try:
        fields = _parse(header["__metadata__"][_METADATA_KEY])
        if type(fields["format"]) is not int or fields["format"] < 1:
            raise ValueError("it has no format version")  # noqa: TRY301 - one place turns each into BlobFormat
        if fields["format"] > FORMAT:
            raise FormatTooNew(
                f"the part has format {fields['format']}, this version reads up to {FORMAT}",
                hint="Upgrade backprompt-db.",
            )
        return Part[fields["part"].upper()], _origin_from_json(fields)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _malformed(f"its metadata cannot be read ({error!r:.200})") from None


def read_origin(store: Store, key: Key) -> Origin | None:
    """Return what a stored part was computed from; None where this key has no part that can be used.

    Only the chunks that hold the header are read and verified: one of many for large parts. Raises `StoreClosed`.
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
    """The header is complete: there is no need to read on."""


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


def _to_json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def _split(blob: memoryview) -> tuple[dict[str, Any], memoryview]:
    if blob.nbytes < _HEADER_LENGTH.size:
        raise _malformed("it is shorter than a header")
    end = header_nbytes(blob)
    if end > blob.nbytes:
        raise _malformed(f"it ends inside its header of {end} bytes")
    raw = bytes(blob[_HEADER_LENGTH.size : end])
    # Python's objects take 20 times the bytes of `[[],[],...`, so what is parsed is counted first.
    strings = [
        match.end() - match.start() for match in itertools.islice(_STRING.finditer(raw), _MAX_HEADER_STRINGS + 1)
    ]
    if len(strings) > _MAX_HEADER_STRINGS or len(raw) - sum(strings) > _MAX_STRUCTURE_NBYTES:
        raise _malformed("its header has more than four arrays and one entry of metadata")
    header = _parse(raw)
    if not isinstance(header, dict):
        raise _malformed("its header is not a JSON object")
    return header, blob[end:]


def _parse(raw: bytes | str) -> Any:
    """Parse JSON by the standard: no NaN, no infinity, and no name twice in one object."""
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw  # json.loads would guess UTF-16 and UTF-32 too
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"it has something that is not JSON ({type(error).__name__})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name appears twice")
    return fields


def _not_a_number(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _begin(entry: object) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)):
        raise _malformed("an array has no byte range")
    return int(offsets[0])


def _places(part: Part, header: dict[str, Any]) -> dict[str, ArrayPlace]:
    """Return where each array lies, checked: exactly those of the part, one after the other without gaps."""
    header.pop("__metadata__", None)
    _layout(part, header)
    places: dict[str, ArrayPlace] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(item[1])):
        places[name] = _place(name, entry, begin=end)
        end = places[name].end
    _check_layout(part, {name: (place.dtype, place.shape) for name, place in places.items()})
    return places


def _place(name: str, entry: dict[str, Any], *, begin: int) -> ArrayPlace:
    first, end = entry["data_offsets"]
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if first != begin or end < begin:
        raise _malformed(f"{name} does not have the bytes from {begin} on")
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise _malformed(f"{name} has a dtype that parts do not have")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise _malformed(f"{name} has no shape")
    # Sizes beside a zero are checked too: no library could make a view of such an array.
    if ITEMSIZE[dtype] * math.prod(max(size, 1) for size in shape) > _MAX_ARRAY_NBYTES:
        raise _malformed(f"{name} is too large")
    if ITEMSIZE[dtype] * math.prod(shape) != end - begin:
        raise _malformed(f"{name} has {end - begin} bytes for {dtype} {shape}")
    return ArrayPlace(dtype, tuple(shape), begin, end)


def _array(place: ArrayPlace, data: memoryview) -> Array:
    return Array(place.dtype, place.shape, data[place.begin : place.end])


def _layout(part: Part, names: Mapping[str, object]) -> _Layout:
    for layout in _LAYOUTS[part]:
        if names.keys() == layout.keys():
            return layout
    known = " or ".join(str(sorted(layout)) for layout in _LAYOUTS[part])
    raise _malformed(f"{part.name.lower()} holds {known}, not {[name[:20] for name in sorted(names)[:8]]}")


def _check_layout(part: Part, found: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    for name, (dtypes, num_dimensions) in _layout(part, found).items():
        dtype, shape = found[name]
        if dtype not in dtypes or len(shape) != num_dimensions:
            raise _malformed(f"{name} is {dtype} {list(shape)}")
    # Keys and values may differ in head_dim (multi-head latent attention), scores and logits in nothing. Scales of int8
    # have the first three dimensions of what they scale, and no more.
    if len({shape[:3] for _, shape in found.values()}) != 1:
        raise _malformed(f"its arrays differ in shape: {[list(shape) for _, shape in found.values()]}")


def _check_tree(part: Part, arrays: Arrays) -> None:
    flaw = flaw_of_tree(arrays) if part is Part.CONTINUATIONS else None
    if flaw is not None:
        raise _malformed(flaw)


def _origin_to_json(part: Part, origin: Origin) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "part": part.name.lower(),
        "text": origin.text,
        "parents": [parent.hex() for parent in origin.parents],
        "start": origin.start,
        "namespace": origin.namespace,
        "weights_id": origin.weights_id.hex(),
        "tokenizer_id": origin.tokenizer_id.hex(),
        "num_tokens": origin.num_tokens,
        "compute_seconds": round(origin.compute_seconds, 6),
        "versions": dict(origin.versions),
    }


def _origin_from_json(fields: dict[str, Any]) -> Origin:
    return Origin(
        text=_text(fields["text"]),
        parents=tuple(SegmentId(_id(parent)) for parent in fields["parents"]),
        start=None if fields["start"] is None else _count(fields["start"]),
        weights_id=WeightsId(_id(fields["weights_id"])),
        tokenizer_id=TokenizerId(_id(fields["tokenizer_id"])),
        num_tokens=_count(fields["num_tokens"]),
        compute_seconds=float(fields["compute_seconds"]),
        namespace=_text(fields["namespace"]),
        versions={name: _text(version) for name, version in fields["versions"].items()},
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is not a string")
    value.encode()  # a lone surrogate has no address
    return value


def _id(value: str) -> bytes:
    if len(found := bytes.fromhex(value)) != ID_NBYTES:
        raise ValueError("an id is not 32 bytes")
    return found


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("a position or a number of tokens is not one")
    return value


def _malformed(reason: str) -> BlobFormat:
    return BlobFormat(f"a stored part is malformed: {reason}", hint="It counts as a miss and will be computed again.")
