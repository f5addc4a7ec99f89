"""What is in the file: one part of a representation as one safetensors blob, format 1.

    u64le header length | header, JSON padded with spaces to 8 bytes | array bytes, one after the other

The header names each array's dtype, shape and byte range. Its single `__metadata__` entry, `backprompt-db`, holds JSON:
format, part, text, parents, start, namespace, weights id, tokenizer id, tokens, compute seconds, library versions.
Any safetensors reader opens such a blob. `decode` is stricter: exactly the arrays of the part, with its dtypes
and shapes, and not one byte more. Nothing is allocated before it is checked.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

from backprompt_db.errors import BackpromptError, BlobFormat, FormatTooNew
from backprompt_db.keys import SegmentId, TokenizerId, WeightsId
from backprompt_db.representation import FORMAT, ITEMSIZE, Array, Arrays, Origin, Part

_HEADER_LENGTH = struct.Struct("<Q")
_MAX_HEADER_NBYTES = 1 << 28
_MAX_DIMENSIONS = 4
_METADATA_KEY = "backprompt-db"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_RUST_DTYPE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}

_LAYOUT: dict[Part, dict[str, tuple[frozenset[str], int]]] = {
    Part.SCORES: {"input_ids": (frozenset({"I32"}), 1), "token_logprobs": (frozenset({"F32"}), 1)},
    Part.LOGITS: {"logits": (_FLOATS, 1)},
    Part.KV: {"keys": (_FLOATS, 4), "values": (_FLOATS, 4)},
}
"""The arrays of each part: name, dtypes, number of dimensions."""


def encode(part: Part, arrays: Arrays, origin: Origin) -> bytes:
    """Return one part as a blob. Raises `BlobFormat` for arrays that are not those of the part."""
    _check_layout(part, {name: (array.dtype, array.shape) for name, array in arrays.items()})
    specs = {name: _spec(array) for name, array in arrays.items()}
    metadata = json.dumps(_origin_to_json(part, origin), ensure_ascii=False, separators=(",", ":"))
    # safetensors copies from the addresses in `specs`; `arrays` keeps what they point to alive.
    return bytes(safetensors.serialize(specs, {_METADATA_KEY: metadata}))


def decode(part: Part, blob: memoryview) -> Arrays:
    """Return the arrays of a blob as views of it. Raises `BlobFormat`; never reads outside it."""
    header, data = _split(blob)
    header.pop("__metadata__", None)
    if header.keys() != _LAYOUT[part].keys():
        raise _malformed(f"{part.name.lower()} holds {sorted(_LAYOUT[part])}, not {sorted(header)[:8]}")
    arrays, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(item[1])):
        array, end = _array(name, entry, data, begin=end)
        arrays[name] = array
    if end != data.nbytes:
        raise _malformed(f"{data.nbytes - end} bytes belong to no array")
    _check_layout(part, {name: (array.dtype, array.shape) for name, array in arrays.items()})
    return arrays


def decode_origin(blob: memoryview) -> tuple[Part, Origin]:
    """Return which part a blob is and what it was computed from. Raises `BlobFormat` or `FormatTooNew`."""
    header, _ = _split(blob)
    try:
        fields = json.loads(header["__metadata__"][_METADATA_KEY])
        if fields["format"] > FORMAT:
            raise FormatTooNew(
                f"the part has format {fields['format']}, this version reads up to {FORMAT}",
                hint="Upgrade backprompt-db.",
            )
        return Part[fields["part"].upper()], _origin_from_json(fields)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _malformed(f"its metadata cannot be read ({error!r})") from None


def _spec(array: Array) -> safetensors.TensorSpec:
    # A typed view, because an empty buffer has no address of its own.
    pointer = np.frombuffer(array.data, dtype=np.uint8).ctypes.data if array.nbytes else 0
    return safetensors.TensorSpec(
        dtype=_RUST_DTYPE[array.dtype], shape=list(array.shape), data_ptr=pointer, data_len=array.nbytes
    )


def _split(blob: memoryview) -> tuple[dict[str, Any], memoryview]:
    if blob.nbytes < _HEADER_LENGTH.size:
        raise _malformed("it is shorter than a header")
    (header_nbytes,) = _HEADER_LENGTH.unpack_from(blob)
    begin = _HEADER_LENGTH.size
    if header_nbytes > min(_MAX_HEADER_NBYTES, blob.nbytes - begin):
        raise _malformed(f"its header claims {header_nbytes} bytes")
    try:
        header = json.loads(bytes(blob[begin : begin + header_nbytes]))
    except (ValueError, RecursionError):
        raise _malformed("its header is not JSON") from None
    if not isinstance(header, dict):
        raise _malformed("its header is not a JSON object")
    return header, blob[begin + header_nbytes :]


def _begin(entry: object) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)):
        raise _malformed("an array has no byte range")
    return int(offsets[0])


def _array(name: str, entry: dict[str, Any], data: memoryview, *, begin: int) -> tuple[Array, int]:
    first, end = entry["data_offsets"]
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if first != begin or not begin <= end <= data.nbytes:
        raise _malformed(f"{name} claims bytes {first} to {end}, expected from {begin} within {data.nbytes}")
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise _malformed(f"{name} has dtype {dtype!r}")
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(size) is int and size >= 0 for size in shape)
    ):
        raise _malformed(f"{name} has shape {shape!r}")
    try:
        return Array(dtype, tuple(shape), data[begin:end]), end
    except BackpromptError as error:
        raise _malformed(error.message) from None


def _check_layout(part: Part, found: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    layout = _LAYOUT[part]
    if found.keys() != layout.keys():
        raise _malformed(f"{part.name.lower()} holds {sorted(layout)}, not {sorted(found)[:8]}")
    for name, (dtypes, num_dimensions) in layout.items():
        dtype, shape = found[name]
        if dtype not in dtypes or len(shape) != num_dimensions:
            raise _malformed(f"{name} is {dtype} {list(shape)}")
    # Keys and values may differ in head_dim (multi-head latent attention), scores and logits in nothing.
    if len({shape[:3] for _, shape in found.values()}) != 1:
        raise _malformed(f"its arrays differ in shape: {[list(shape) for _, shape in found.values()]}")


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
        text=str(fields["text"]),
        parents=tuple(SegmentId(bytes.fromhex(parent)) for parent in fields["parents"]),
        start=None if fields["start"] is None else int(fields["start"]),
        weights_id=WeightsId(bytes.fromhex(fields["weights_id"])),
        tokenizer_id=TokenizerId(bytes.fromhex(fields["tokenizer_id"])),
        num_tokens=int(fields["num_tokens"]),
        compute_seconds=float(fields["compute_seconds"]),
        namespace=str(fields["namespace"]),
        versions={str(name): str(version) for name, version in fields["versions"].items()},
    )


def _malformed(reason: str) -> BlobFormat:
    return BlobFormat(f"a stored part is malformed: {reason}", hint="It counts as a miss and will be computed again.")
