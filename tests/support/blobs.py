"""Parts with any content, and blobs that are none."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from backprompt_db.codec.blob import encode
from backprompt_db.prompt.ids import SegmentId, TokenizerId, WeightsId
from backprompt_db.prompt.representation import ITEMSIZE, Array, Origin, Part

FLOATS = ["F16", "BF16", "F32", "F64"]
IDS = st.binary(min_size=32, max_size=32)
STRINGS = st.text(st.characters(exclude_categories=["Cs"]))
ORIGINS = st.builds(
    Origin,
    text=STRINGS,
    parents=st.lists(IDS.map(SegmentId), max_size=4).map(tuple),
    start=st.none() | st.integers(0, 2**63 - 1),
    weights_id=IDS.map(WeightsId),
    tokenizer_id=IDS.map(TokenizerId),
    num_tokens=st.integers(0, 2**31),
    compute_seconds=st.integers(0, 10**9).map(lambda micros: micros / 1_000_000),
    namespace=STRINGS,
    versions=st.dictionaries(STRINGS, STRINGS, max_size=3),
)
ORIGIN = Origin("a", (), None, WeightsId(b"w" * 32), TokenizerId(b"t" * 32), 1, 0.5)


def array(dtype: str, *shape: int, fill: int = 1) -> Array:
    data = bytes((fill * 7 + index) % 251 for index in range(min(251, ITEMSIZE[dtype] * int(np.prod(shape)))))
    nbytes = ITEMSIZE[dtype] * int(np.prod(shape))
    return Array(dtype, shape, memoryview((data * (nbytes // max(1, len(data)) + 1))[:nbytes]))


def int8_arrays(keys: tuple[int, ...], values: tuple[int, ...], *, fill: int = 1) -> dict[str, Array]:
    return {
        "keys": array("I8", *keys, fill=fill), "keys_scale": array("F32", *keys[:3], fill=fill + 1),
        "values": array("I8", *values, fill=fill + 2), "values_scale": array("F32", *values[:3], fill=fill + 3),
    }  # fmt: skip


def tree(ids: Sequence[int], parents: Sequence[int], logprobs: Sequence[float]) -> dict[str, Array]:
    """The arrays of continuations."""
    return {
        "input_ids": Array.from_numpy(np.array(ids, dtype=np.int32)),
        "parents": Array.from_numpy(np.array(parents, dtype=np.int32)),
        "token_logprobs": Array.from_numpy(np.array(logprobs, dtype=np.float32)),
    }


def chain(ids: Sequence[int]) -> dict[str, Array]:
    """The arrays of one continuation alone."""
    return tree(ids, range(-1, len(ids) - 1), [-0.5] * len(ids))


@st.composite
def parts(draw: st.DrawFn) -> tuple[Part, dict[str, Array]]:
    part, num_tokens, fill = draw(st.sampled_from(Part)), draw(st.integers(0, 5)), draw(st.integers(0, 255))
    dtypes = draw(st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)))
    if part is Part.SCORES:
        return part, {
            "token_logprobs": array("F32", num_tokens, fill=fill), "input_ids": array("I32", num_tokens, fill=fill)
        }  # fmt: skip
    if part is Part.CONTINUATIONS:
        return part, chain([fill] * num_tokens)
    if part is Part.LOGITS:
        return part, {"logits": array(dtypes[0], draw(st.integers(0, 50)), fill=fill)}
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dims = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))  # latent attention: the two differ
    shapes = [(layers, heads, num_tokens, dim) for dim in dims]
    if draw(st.booleans()):
        return part, int8_arrays(*shapes, fill=fill)
    return part, {
        "keys": array(dtypes[0], *shapes[0], fill=fill),
        "values": array(dtypes[1], *shapes[1], fill=fill + 1),
    }


def content(arrays: Mapping[str, Array]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (each.dtype, each.shape, bytes(each.data)) for name, each in arrays.items()}


def view(blob: bytes | bytearray) -> memoryview:
    return memoryview(bytearray(blob))


def small_blob() -> bytes:
    return encode(Part.SCORES, {"input_ids": array("I32", 2), "token_logprobs": array("F32", 2)}, ORIGIN)


def int8_blob() -> bytes:
    return encode(Part.KV, int8_arrays((2, 1, 2, 3), (2, 1, 2, 2)), ORIGIN)


def blob_of(header: object, data: bytes = b"") -> memoryview:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return view(struct.pack("<Q", len(raw)) + raw + data)


def tensor(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}
