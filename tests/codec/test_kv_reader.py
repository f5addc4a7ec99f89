"""From blobs in pieces into places of larger buffers: equal to decoding, for any shape and any cuts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backprompt_db.codec.blob import encode
from backprompt_db.codec.kv_reader import KVReader, KVSpan
from backprompt_db.errors import BlobFormat
from backprompt_db.prompt.ids import TokenizerId, WeightsId
from backprompt_db.prompt.representation import Array, Arrays, Origin, Part

ORIGIN = Origin("a text", (), None, WeightsId(bytes(32)), TokenizerId(bytes(32)), 1, 0.0)
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5))
DTYPES = st.sampled_from([("F32", "<f4"), ("F16", "<f2"), ("F64", "<f8"), ("BF16", "<u2")])


def kv(shape: tuple[int, ...], dtype: tuple[str, str]) -> Arrays:
    """Keys and values in which no two elements of one array are equal."""
    num_layers, num_heads, num_tokens, key_dim, value_dim = shape
    arrays = {}
    for first, (name, dim) in enumerate([("keys", key_dim), ("values", value_dim)]):
        size = num_layers * num_heads * num_tokens * dim
        bits = np.arange(first * 1000, first * 1000 + size).astype(dtype[1])
        arrays[name] = Array(dtype[0], (num_layers, num_heads, num_tokens, dim), bits.view(np.uint8).data)
    return arrays


def place(shape: tuple[int, ...], dtype: str, *, before: int, after: int) -> tuple[KVSpan, list[np.ndarray[Any, Any]]]:
    """A span in the middle of larger buffers, and the buffers, filled with a number that no array has."""
    num_layers, num_heads, num_tokens, *dims = shape
    wholes = [np.full((num_layers, num_heads, before + num_tokens + after, dim), 9, dtype=dtype) for dim in dims]
    return KVSpan(*(whole[:, :, before : before + num_tokens] for whole in wholes)), wholes


def fill(span: KVSpan, dtype: str, blob: bytes, cuts: list[int]) -> KVReader:
    reader = KVReader(span, dtype)
    ends = [*sorted(8 * cut for cut in cuts if 8 * cut < len(blob)), len(blob)]
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        reader.take(memoryview(blob)[begin:end])
    return reader


@given(SHAPES, DTYPES, st.lists(st.integers(0, 200), max_size=5), st.integers(0, 3), st.integers(0, 3))
def test_a_part_in_pieces_fills_its_place_and_nothing_else(
    shape: tuple[int, ...], dtype: tuple[str, str], cuts: list[int], before: int, after: int
) -> None:
    arrays = kv(shape, dtype)
    span, wholes = place(shape, dtype[1], before=before, after=after)
    fill(span, dtype[0], encode(Part.KV, arrays, ORIGIN), cuts).finish()
    for whole, name in zip(wholes, ("keys", "values"), strict=True):
        expected = np.frombuffer(arrays[name].data, dtype=dtype[1]).reshape(arrays[name].shape)
        inner = whole[:, :, before : whole.shape[2] - after]
        assert np.array_equal(inner, expected)
        assert (whole[:, :, :before] == 9).all()
        assert (whole[:, :, whole.shape[2] - after :] == 9).all()


@given(st.data(), DTYPES, st.lists(st.integers(0, 200), max_size=3))
def test_a_part_that_ends_early_is_malformed(data: st.DataObject, dtype: tuple[str, str], cuts: list[int]) -> None:
    blob = encode(Part.KV, kv((2, 2, 3, 4, 4), dtype), ORIGIN)
    length = data.draw(st.integers(0, len(blob) - 1))
    span, _ = place((2, 2, 3, 4, 4), dtype[1], before=1, after=1)
    with pytest.raises(BlobFormat):
        fill(span, dtype[0], blob[:length], cuts).finish()


@given(st.integers(1, 50))
def test_a_part_with_more_than_its_arrays_is_malformed(num_more: int) -> None:
    blob = encode(Part.KV, kv((2, 2, 3, 4, 4), ("F32", "<f4")), ORIGIN) + bytes(num_more)
    span, wholes = place((2, 2, 3, 4, 4), "<f4", before=1, after=1)
    with pytest.raises(BlobFormat):
        fill(span, "F32", blob, []).finish()
    assert all((whole[:, :, [0, -1]] == 9).all() for whole in wholes)


@pytest.mark.parametrize("shape", [(2, 2, 4, 4, 4), (2, 1, 3, 4, 4), (2, 2, 3, 4, 5), (1, 2, 3, 4, 4)])
def test_a_part_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    span, wholes = place((2, 2, 3, 4, 4), "<f4", before=0, after=0)
    with pytest.raises(BlobFormat, match="not F32"):
        fill(span, "F32", encode(Part.KV, kv(shape, ("F32", "<f4")), ORIGIN), [])
    assert all((whole == 9).all() for whole in wholes)


def test_a_part_of_another_dtype_is_refused() -> None:
    span, _ = place((1, 1, 2, 2, 2), "<u2", before=0, after=0)
    with pytest.raises(BlobFormat, match="F16"):
        fill(span, "BF16", encode(Part.KV, kv((1, 1, 2, 2, 2), ("F16", "<f2")), ORIGIN), [])


@pytest.mark.parametrize("header", [b"\x01" + bytes(7) + b"{", b"\xff" * 8, (1 << 40).to_bytes(8, "little")])
def test_a_header_that_cannot_be_is_refused(header: bytes) -> None:
    span, _ = place((1, 1, 2, 2, 2), "<f4", before=0, after=0)
    with pytest.raises(BlobFormat):
        fill(span, "F32", header, [])
