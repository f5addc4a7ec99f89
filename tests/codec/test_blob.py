"""What is in the file: every part comes back exactly, any safetensors reader opens it, and nothing else is believed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from backprompt_db.codec.blob import decode, decode_origin, encode, encode_pieces
from backprompt_db.codec.continuations import flaw_of_tree
from backprompt_db.errors import BlobFormat, FormatTooNew
from backprompt_db.prompt.ids import SegmentId, TokenizerId, WeightsId
from backprompt_db.prompt.representation import Array, Origin, Part
from tests.support.blobs import (
    ORIGIN,
    ORIGINS,
    array,
    blob_of,
    content,
    int8_arrays,
    int8_blob,
    parts,
    small_blob,
    tensor,
    tree,
    view,
)


@given(parts(), ORIGINS)
def test_a_part_and_its_origin_come_back_exactly(given_part: tuple[Part, dict[str, Array]], origin: Origin) -> None:
    part, arrays = given_part
    blob = view(encode(part, arrays, origin))
    assert content(decode(part, blob)) == content(arrays)
    assert decode_origin(blob) == (part, origin)
    assert decode_origin(blob)[1].address == origin.address


@given(parts(), ORIGINS)
def test_safetensors_reads_the_same(given_part: tuple[Part, dict[str, Array]], origin: Origin) -> None:
    part, arrays = given_part
    blob = encode(part, arrays, origin)
    theirs = {name: (each["dtype"], tuple(each["shape"]), bytes(each["data"])) for name, each in deserialized(blob)}
    assert theirs == content(arrays)


RUST_DTYPE = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "I8": "int8"
}  # fmt: skip


@given(parts(), ORIGINS)
def test_a_blob_is_byte_for_byte_what_safetensors_writes(
    given_part: tuple[Part, dict[str, Array]], origin: Origin
) -> None:
    blob = encode(*given_part, origin)
    bits = {name: np.frombuffer(bytes(each.data) + b"0", np.uint8) for name, each in given_part[1].items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=RUST_DTYPE[each.dtype], shape=list(each.shape), data_ptr=bits[name].ctypes.data, data_len=each.nbytes
        )
        for name, each in given_part[1].items()
    }
    header_nbytes = struct.unpack_from("<Q", blob)[0]
    metadata = json.loads(blob[8 : 8 + header_nbytes])["__metadata__"]
    assert blob == bytes(safetensors.serialize(specs, metadata))


@given(parts(), ORIGINS)
def test_the_pieces_of_a_blob_are_its_header_and_its_arrays_themselves(
    given_part: tuple[Part, dict[str, Array]], origin: Origin
) -> None:
    pieces = encode_pieces(*given_part, origin)
    assert b"".join(pieces) == encode(*given_part, origin)
    assert {id(piece) for piece in pieces[1:]} == {id(each.data) for each in given_part[1].values()}


GOLDEN_ORIGIN = Origin(
    'say "é"\n\t\x00\\ \U0001f600', (SegmentId(b"p" * 32),), 3, WeightsId(b"w" * 32), TokenizerId(b"t" * 32), 2, 0.25,
    namespace="team", versions={"torch": "2.9"},
)  # fmt: skip
GOLDEN: dict[str, tuple[Part, dict[str, Array]]] = {
    "6dd5d88ff4403f4a746761bd2d5a4a37753e64cf8c032939639e6182c57d8ab2": (
        Part.SCORES, {"input_ids": array("I32", 2, fill=0), "token_logprobs": array("F32", 2, fill=0)}
    ),
    "04c3a16621d7483c0ebda5dcd642dd2dcb36aa8985cb5403899f334cfcaaeece": (
        Part.LOGITS, {"logits": array("F16", 5, fill=0)}
    ),
    "4ea0115ecc1b4f6133716ba945c5cbc43cafa5bda686bf5c6beb09b96a0d6ea6": (
        Part.KV, {"keys": array("F32", 2, 1, 2, 3, fill=0), "values": array("F32", 2, 1, 2, 3, fill=0)}
    ),
    "9057771b037e3fe118ca573e791037d684bb629e1a06d28419ff869f16b28a85": (
        Part.CONTINUATIONS, tree([5, 6, 5], [-1, 0, 0], [-0.25, -1.5, -3.0])
    ),
    "35b58dbd564542eff421ad461f1e9c12d93758cf70e06fb6fbacbb9c21d07153": (
        Part.KV, {"keys": array("BF16", 2, 1, 2, 3, fill=0), "values": array("F64", 2, 1, 2, 2, fill=0)}
    ),
    "384bf2c1eae84f4c68f91df3f7f73a3cd3d4fe1ca93474a179f16503dd5fa2ab": (
        Part.KV, int8_arrays((2, 1, 2, 3), (2, 1, 2, 2))
    ),
}  # fmt: skip


@pytest.mark.parametrize("digest", GOLDEN)
def test_blobs_never_change_within_a_format(digest: str) -> None:
    assert hashlib.sha256(encode(*GOLDEN[digest], GOLDEN_ORIGIN)).hexdigest() == digest


def deserialized(blob: bytes) -> list[tuple[str, dict[str, Any]]]:
    return list(safetensors.deserialize(blob))  # type: ignore[no-untyped-call]


def test_numpy_values_are_those_of_safetensors() -> None:
    logits = np.array([0.1, -2.5, 3e30, -0.0, 7], dtype=np.float32)
    blob = encode(Part.LOGITS, {"logits": Array.from_numpy(logits)}, ORIGIN)
    assert np.array_equal(safetensors.numpy.load(blob)["logits"], logits)
    assert np.array_equal(decode(Part.LOGITS, view(blob))["logits"].numpy(), logits)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("step", [1, -1, 2])
def test_values_survive_strides_and_byte_order(order: str, step: int) -> None:
    values: Any = np.arange(24, dtype=f"{order}f4").reshape(4, 6)[::step, ::step]
    found = Array.from_numpy(values)
    assert (found.dtype, found.shape) == ("F32", values.shape)
    assert np.array_equal(found.numpy(), values)
    assert np.array_equal(Array.from_numpy(values.T).numpy(), values.T)


def test_a_decoded_array_is_a_view_of_the_blob() -> None:
    blob = view(small_blob())
    decode(Part.SCORES, blob)["input_ids"].data[0] = 99
    assert decode(Part.SCORES, blob)["input_ids"].data[0] == 99


@pytest.mark.parametrize("num_tokens", [16, 200])
def test_keys_and_values_cost_less_than_one_percent_more(num_tokens: int) -> None:
    arrays = {name: array("F32", 12, 12, num_tokens, 64) for name in ("keys", "values")}
    origin = Origin("word " * num_tokens, (SegmentId(b"p" * 32),), None, ORIGIN.weights_id, ORIGIN.tokenizer_id, 1, 0.1)
    assert len(encode(Part.KV, arrays, origin)) <= 1.01 * sum(each.nbytes for each in arrays.values())


NO_TREES: dict[str, tuple[list[int], list[int], list[float]]] = {
    "a negative id": ([1, -1], [-1, 0], [-1.0, -1.0]),
    "a token before itself": ([1, 2], [-1, 1], [-1.0, -1.0]),
    "a token that comes later": ([1, 2, 3], [-1, 2, 0], [-1.0, -1.0, -1.0]),
    "a token that is not there": ([1], [-2], [-1.0]),
    "NaN": ([1, 2], [-1, -1], [-1.0, float("nan")]),
    "more than certain": ([1], [-1], [0.5]),
    "the same token twice at the beginning": ([5, 6, 5], [-1, 0, -1], [-1.0, -1.0, -2.0]),
    "the same token twice after another": ([5, 6, 7, 6], [-1, 0, 0, 0], [-1.0, -1.0, -1.0, -1.0]),
}
TREES: dict[str, tuple[list[int], list[int], list[float]]] = {
    "nothing": ([], [], []),
    "a chain of one token again and again": ([5, 5, 5], [-1, 0, 1], [-1.0, 0.0, 1e-6]),
    "a fork with what is impossible": ([0, 7, 7, 0, 2**31 - 1], [-1, -1, 0, 1, 3], [-0.5, -2.0, -1.0, -1.0, -math.inf]),
}

INT8 = int8_arrays((2, 1, 2, 3), (2, 1, 2, 2))
NOT_SCALES = [(), (4,), (2, 1), (2, 1, 1), (2, 1, 3), (1, 2, 2), (2, 1, 2, 1), (2, 1, 2, 3), (0, 1, 2)]
WRONG_PARTS: list[tuple[Part, dict[str, Array]]] = [
    (Part.SCORES, {"input_ids": array("I32", 2)}),
    (Part.SCORES, {"input_ids": array("I64", 2), "token_logprobs": array("F32", 2)}),
    (Part.SCORES, {"input_ids": array("I32", 2), "token_logprobs": array("F32", 3)}),
    (Part.CONTINUATIONS, {"input_ids": array("I32", 0), "token_logprobs": array("F32", 0)}),
    (Part.CONTINUATIONS, {**tree([1], [-1], [-1.0]), "parents": array("F32", 1)}),
    (Part.CONTINUATIONS, {**tree([1], [-1], [-1.0]), "parents": array("I32", 0)}),
    *[(Part.CONTINUATIONS, tree(*columns)) for columns in NO_TREES.values()],
    (Part.LOGITS, {"logits": array("F32", 2, 2)}),
    (Part.LOGITS, {"logits": array("I32", 2)}),
    (Part.LOGITS, {"logits": array("F32", 2), "more": array("F32", 2)}),
    (Part.KV, {"keys": array("F32", 1, 1, 2, 3), "values": array("F32", 1, 1, 3, 3)}),
    (Part.KV, {"keys": array("F32", 1, 2, 3), "values": array("F32", 1, 2, 3)}),
    (Part.KV, {"keys": array("I8", 1, 1, 2, 3), "values": array("I8", 1, 1, 2, 3)}),
    (Part.LOGITS, {"logits": array("I8", 2)}),
    *[(Part.KV, {name: each for name, each in INT8.items() if name != missing}) for missing in INT8],
    *[(Part.KV, INT8 | {name: array("F32", *INT8[name].shape)}) for name in ("keys", "values")],
    *[(Part.KV, INT8 | {name: array("F16", *INT8[name].shape)}) for name in ("keys_scale", "values_scale")],
    *[
        (Part.KV, INT8 | {name: array("F32", *shape)})
        for name in ("keys_scale", "values_scale")
        for shape in NOT_SCALES
    ],
    (Part.KV, INT8 | {"keys": array("I8", 2, 1, 3, 3), "keys_scale": array("F32", 2, 1, 3)}),
    (Part.KV, INT8 | {"more": array("F32", 1)}),
]


@pytest.mark.parametrize(("part", "arrays"), WRONG_PARTS)
def test_what_is_not_the_part_is_neither_written_nor_read(part: Part, arrays: dict[str, Array]) -> None:
    with pytest.raises(BlobFormat):
        encode(part, arrays, ORIGIN)
    foreign = safetensors.numpy.save({name: np.array(each.numpy()) for name, each in arrays.items()})
    with pytest.raises(BlobFormat):
        decode(part, view(foreign))


@pytest.mark.parametrize("about", TREES)
def test_a_tree_of_continuations_comes_back(about: str) -> None:
    arrays = tree(*TREES[about])
    assert flaw_of_tree(arrays) is None
    assert content(decode(Part.CONTINUATIONS, view(encode(Part.CONTINUATIONS, arrays, ORIGIN)))) == content(arrays)


@pytest.mark.parametrize("about", NO_TREES)
def test_what_is_no_tree_is_told(about: str) -> None:
    assert "tree" in (flaw_of_tree(tree(*NO_TREES[about])) or "")


def test_a_valid_blob_of_another_part_is_not_read() -> None:
    with pytest.raises(BlobFormat):
        decode(Part.KV, view(small_blob()))


F4 = tensor("F32", [1], 0, 4)
F4_JSON = json.dumps(F4).encode()
HOSTILE: dict[str, memoryview] = {
    "nothing": view(b""),
    "a header of 2**63 bytes": view(struct.pack("<Q", 2**63) + b"{}"),
    "a header of 2**64 - 1 bytes": view(struct.pack("<Q", 2**64 - 1) + b"{}"),
    "a header longer than the blob": view(struct.pack("<Q", 3) + b"{}"),
    "an empty header": view(struct.pack("<Q", 0)),
    "not JSON": blob_of(b"{logits}"),
    "not UTF-8": blob_of(b'{"\xff": 1}'),
    "UTF-16": blob_of(json.dumps({"logits": F4}).encode("utf-16"), bytes(4)),
    "a list": blob_of([]),
    "null": blob_of(None),
    "no arrays": blob_of({}),
    "five arrays": blob_of(dict.fromkeys("abcde", F4), bytes(4)),
    "a long name": blob_of({"x" * 100_000: F4}, bytes(4)),
    "a million arrays": blob_of(b"{%s}" % b",".join(b'"%d":%s' % (i, F4_JSON) for i in range(1_000_000)), bytes(4)),
    "deep nesting": blob_of(b"[" * 2_000_000),
    "nesting as deep as fits": blob_of(b'{"logits":' + b"[" * 1000 + b"]" * 1000 + b"}"),
    "a million empty lists": blob_of(b"[" + b"[]," * 1_000_000 + b"[]]"),
    "a name twice": blob_of(b'{"logits":%s,"logits":%s}' % ((F4_JSON,) * 2), bytes(4)),
    "a field twice": blob_of(b'{"logits":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "NaN as a size": blob_of({"logits": tensor("F32", [float("nan")], 0, 4)}, bytes(4)),
    "infinity as an offset": blob_of({"logits": tensor("F32", [1], 0, float("inf"))}, bytes(4)),
    "a true size": blob_of({"logits": tensor("F32", [True], 0, 4)}, bytes(4)),
    "no offsets": blob_of({"logits": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "three offsets": blob_of({"logits": tensor("F32", [1], 0, 2, 4)}, bytes(4)),
    "negative offsets": blob_of({"logits": tensor("F32", [1], -4, 0)}, bytes(4)),
    "reversed offsets": blob_of({"logits": tensor("F32", [1], 4, 0)}, bytes(4)),
    "overflowing offsets": blob_of({"logits": tensor("F32", [2**62], 0, 2**64)}, bytes(4)),
    "offsets of 5,000 digits": blob_of(
        b'{"logits":{"dtype":"F32","shape":[1],"data_offsets":[0,%s]}}' % (b"9" * 5000), bytes(4)
    ),
    "a gap": blob_of({"logits": tensor("F32", [1], 4, 8)}, bytes(8)),
    "trailing bytes": blob_of({"logits": F4}, bytes(5)),
    "an array that is a string": blob_of({"logits": "F32"}, bytes(4)),
    "an unknown dtype": blob_of({"logits": tensor("U8", [4], 0, 4)}, bytes(4)),
    "a dtype that is a list": blob_of({"logits": tensor(["F32"], [1], 0, 4)}, bytes(4)),
    "another dtype of the same size": blob_of({"logits": tensor("I32", [1], 0, 4)}, bytes(4)),
    "a shape that is too small": blob_of({"logits": tensor("F32", [0], 0, 4)}, bytes(4)),
    "a negative shape": blob_of({"logits": tensor("F32", [-1, -1], 0, 4)}, bytes(4)),
    "a shape of 2**62": blob_of({"logits": tensor("F32", [2**62], 0, 4)}, bytes(4)),
    "a shape that is a number": blob_of({"logits": tensor("F32", 1, 0, 4)}, bytes(4)),
    "five dimensions": blob_of({"logits": tensor("F32", [1, 1, 1, 1, 1], 0, 4)}, bytes(4)),
}  # fmt: skip


@pytest.mark.parametrize("about", HOSTILE)
def test_a_hostile_blob_is_refused(about: str) -> None:
    tracemalloc.start()
    try:
        for read in (lambda: decode(Part.LOGITS, HOSTILE[about]), lambda: decode_origin(HOSTILE[about])):
            with pytest.raises(BlobFormat) as caught:
                read()
            assert len(str(caught.value)) < 500
        assert tracemalloc.get_traced_memory()[1] < 2 * HOSTILE[about].nbytes + 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [[2**62, 0, 1, 1], [2**31, 2**31, 0, 2**31], [2**63 - 1, 1, 0, 2**63 - 1]])
@pytest.mark.parametrize("dtype", ["F32", "I8"])
def test_huge_sizes_beside_a_zero_are_refused(dtype: str, shape: list[int]) -> None:
    names = {"keys", "values"} if dtype == "F32" else INT8.keys()
    header = {name: tensor("F32", shape[:3], 0, 0) if "scale" in name else tensor(dtype, shape, 0, 0) for name in names}
    with pytest.raises(BlobFormat):
        decode(Part.KV, blob_of(header))


INT8_RANGES = {"keys_scale": (0, 16), "values_scale": (16, 32), "keys": (32, 44), "values": (44, 52)}


def int8_header(**changes: Any) -> dict[str, Any]:
    return {
        name: tensor(INT8[name].dtype, list(INT8[name].shape), *INT8_RANGES[name]) | changes.get(name, {})
        for name in INT8
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": {"data_offsets": [44, 52]}},
        {"keys": {"data_offsets": [0, 12]}},
        {"keys": {"shape": [2, 1, 2, 4]}},
        {"keys": {"shape": [2, 2, 1, 3]}},
        {"keys": {"dtype": "U8"}},
        {"keys_scale": {"data_offsets": [16, 32]}},
        {"keys_scale": {"dtype": "I32"}},
        {"keys_scale": {"shape": [4, 1, 1]}},
        {"keys_scale": {"shape": [2, 1, 2, 1]}},
        {"values_scale": {"dtype": "F64", "shape": [2, 1, 1]}},
        {"values_scale": {"data_offsets": [16, 2**64]}},
    ],
    ids=str,
)
def test_int8_arrays_and_scales_that_do_not_belong_together_are_refused(changes: dict[str, Any]) -> None:
    decode(Part.KV, blob_of(int8_header(), bytes(52)))
    with pytest.raises(BlobFormat):
        decode(Part.KV, blob_of(int8_header(**changes), bytes(52)))


@pytest.mark.parametrize("ranges", [((0, 4), (0, 4)), ((0, 4), (2, 6)), ((0, 4), (3, 7)), ((4, 8), (4, 8))])
def test_overlapping_arrays_are_refused(ranges: tuple[tuple[int, int], tuple[int, int]]) -> None:
    header = {"input_ids": tensor("I32", [1], *ranges[0]), "token_logprobs": tensor("F32", [1], *ranges[1])}
    with pytest.raises(BlobFormat):
        decode(Part.SCORES, blob_of(header, bytes(8)))


def with_metadata(**changes: Any) -> memoryview:
    fields = {
        "format": 1, "part": "logits", "text": "a", "parents": [], "start": None, "namespace": "",
        "weights_id": "00" * 32, "tokenizer_id": "00" * 32, "num_tokens": 1, "compute_seconds": 0.5, "versions": {},
    } | changes  # fmt: skip
    return blob_of({"__metadata__": {"backprompt-db": json.dumps(fields)}, "logits": F4}, bytes(4))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 0}, {"format": "1"}, {"format": True}, {"format": float("nan")}, {"part": "both"}, {"part": 1},
        {"text": 5}, {"text": "\ud800"}, {"parents": ["00"]}, {"parents": "x"}, {"parents": [1]}, {"start": -1},
        {"start": 1.5}, {"start": 2**63}, {"weights_id": "zz"}, {"weights_id": ""}, {"tokenizer_id": None},
        {"num_tokens": float("inf")}, {"num_tokens": -1}, {"compute_seconds": "x"}, {"compute_seconds": 10**400},
        {"compute_seconds": float("nan")}, {"versions": []}, {"versions": {"torch": 2}}, {"namespace": None},
    ],
    ids=str,
)  # fmt: skip
def test_metadata_that_no_writer_wrote_is_refused(changes: dict[str, Any]) -> None:
    assert decode_origin(with_metadata())[1].num_tokens == 1
    with pytest.raises(BlobFormat):
        decode_origin(with_metadata(**changes))


@pytest.mark.parametrize("metadata", [None, [], "x", {}, {"backprompt-db": 1}, {"backprompt-db": "[" * 100_000}])
def test_metadata_of_another_form_is_refused(metadata: Any) -> None:
    with pytest.raises(BlobFormat):
        decode_origin(blob_of({"__metadata__": metadata, "logits": F4}, bytes(4)))


def test_a_part_of_a_newer_format_is_told_apart() -> None:
    with pytest.raises(FormatTooNew, match="format 2"):
        decode_origin(with_metadata(format=2, unknown="field"))


@pytest.mark.parametrize(
    ("part", "blob"), [(Part.SCORES, small_blob()), (Part.KV, int8_blob())], ids=["scores", "int8"]
)
def test_a_blob_cut_anywhere_is_refused(part: Part, blob: bytes) -> None:
    for length in range(len(blob)):
        with pytest.raises(BlobFormat):
            decode(part, view(blob[:length]))


def test_bytes_after_the_end_are_refused() -> None:
    for part, blob in [(Part.SCORES, small_blob()), (Part.KV, int8_blob())]:
        with pytest.raises(BlobFormat, match="belong to no array"):
            decode(part, view(blob + b"\0"))


@given(st.booleans(), st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes_are_refused_or_still_a_part(is_int8: bool, changes: list[tuple[int, int]]) -> None:  # noqa: FBT001
    part, blob = (Part.KV, bytearray(int8_blob())) if is_int8 else (Part.SCORES, bytearray(small_blob()))
    for place, value in changes:
        blob[place % len(blob)] = value
    with contextlib.suppress(BlobFormat, FormatTooNew):
        arrays = decode(part, view(blob))
        assert len({array.shape[:3] for array in arrays.values()}) == 1
        assert sum(array.nbytes for array in arrays.values()) <= len(blob)
    with contextlib.suppress(BlobFormat, FormatTooNew):
        _, origin = decode_origin(view(blob))
        assert len(origin.address) == 32


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(junk: bytes) -> None:
    for blob in (view(junk), blob_of(junk)):
        for part in Part:
            with pytest.raises(BlobFormat):
                decode(part, blob)


def test_a_text_that_no_reader_would_accept_is_not_written() -> None:
    with pytest.raises(BlobFormat, match="too long"):
        encode(Part.LOGITS, {"logits": array("F32", 1)}, dataclasses.replace(ORIGIN, text="x" * (1 << 26)))
