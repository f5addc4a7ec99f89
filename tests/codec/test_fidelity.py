"""How closely keys and values come back: exactly, as the nearest bfloat16, or within half a step of int8."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from backprompt_db.codec.blob import decode, encode
from backprompt_db.codec.fidelity import Fidelity, reduce, restore, restore_into
from backprompt_db.errors import BlobFormat
from backprompt_db.prompt.representation import ITEMSIZE, Array, Arrays, Part
from tests.support.blobs import ORIGIN, content, parts, view

TORCH_DTYPE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROUNDING = {"F64": 2.0**-24, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""How far a value is from the nearest one of the dtype, or of float32, which all goes through; relative."""
SUBNORMAL = {"F64": 2.0**-149, "F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}
"""The same for values near zero; absolute."""
LOSSY = [Fidelity.BFLOAT16, Fidelity.INT8]
LARGEST = float(np.finfo(np.float32).max)
TINIEST = float(np.finfo(np.float32).smallest_subnormal)
SIZES = st.integers(1, 4)
SHAPES = st.tuples(SIZES, SIZES, st.integers(0, 5), SIZES, SIZES).map(lambda s: (s[:4], (*s[:3], s[4])))
MAGNITUDES = st.sampled_from(
    [0.0, TINIEST, 150 * TINIEST, 1e-39, 1.2e-38, 1e-36, 1e-6, 1.0, 6e4, 1e30, 3.3e38, LARGEST]
)


def kv(keys: torch.Tensor, values: torch.Tensor | None = None) -> dict[str, Array]:
    return {"keys": Array.from_torch(keys), "values": Array.from_torch(keys if values is None else values)}


def random_kv(*shape: int, dtype: str = "F32") -> dict[str, Array]:
    torch.manual_seed(0)
    return kv(torch.randn(shape).to(TORCH_DTYPE[dtype]), torch.randn(shape).to(TORCH_DTYPE[dtype]))


@st.composite
def finite_kv(draw: st.DrawFn) -> dict[str, Array]:
    """Keys and values of any finite magnitude, another in each row."""
    dtype, generator = (
        draw(st.sampled_from(sorted(TORCH_DTYPE))),
        torch.Generator().manual_seed(draw(st.integers(0, 99))),
    )
    limits = torch.finfo(TORCH_DTYPE[dtype])
    arrays = {}
    for name, shape in zip(("keys", "values"), draw(SHAPES), strict=True):
        magnitudes = [draw(MAGNITUDES) for _ in range(int(np.prod(shape[:3])))]
        rows = torch.tensor(magnitudes, dtype=torch.float64).reshape(*shape[:3], 1)
        rows = rows * (torch.rand(shape, generator=generator, dtype=torch.float64).mul(2).sub(1).mul(1.5).clamp(-1, 1))
        arrays[name] = Array.from_torch(rows.clamp(limits.min, limits.max).to(TORCH_DTYPE[dtype]))
    return arrays


def bits(*values: int) -> torch.Tensor:
    """A tensor [1, 1, 1, n] of float32 with these bits."""
    return torch.from_numpy(np.array(values, np.uint32).view(np.float32)).reshape(1, 1, 1, -1)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, but for the payload of NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    is_equal = (ours.view(integer) == theirs.view(integer)) | (ours.isnan() & theirs.isnan())
    return ours.dtype == theirs.dtype and bool(is_equal.all())


def buffers(arrays: Arrays, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two longer buffers, filled with 7, for keys and values."""
    shapes = [
        (*arrays[name].shape[:2], arrays[name].shape[2] + 5, arrays[name].shape[3]) for name in ("keys", "values")
    ]
    keys, values = (torch.full(shape, 7, dtype=TORCH_DTYPE[dtype]) for shape in shapes)
    return keys, values


def place(buffer: torch.Tensor, num_tokens: int) -> npt.NDArray[Any]:
    """NumPy's view of some tokens of a buffer, after the first two."""
    view = buffer.view(torch.uint16) if buffer.dtype == torch.bfloat16 else buffer
    return view[:, :, 2 : 2 + num_tokens].numpy()


@pytest.mark.parametrize("fidelity", Fidelity)
@given(parts())
def test_scores_and_logits_are_exact_in_each(fidelity: Fidelity, given_part: tuple[Part, dict[str, Array]]) -> None:
    part, arrays = given_part
    if part is not Part.KV or fidelity is Fidelity.EXACT:
        assert reduce(part, arrays, fidelity) is arrays


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_bfloat16_keeps_what_has_two_bytes_as_it_is(dtype: str) -> None:
    arrays = random_kv(2, 2, 3, 4, dtype=dtype)
    assert content(reduce(Part.KV, arrays, Fidelity.BFLOAT16)) == content(arrays)


def test_every_upper_half_is_rounded_to_bfloat16_as_torch_does() -> None:
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    every = ((np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | lower).view(np.float32)
    values = torch.from_numpy(every).reshape(1, 8, -1, 16)
    stored = reduce(Part.KV, kv(values), Fidelity.BFLOAT16)
    assert same_bits(stored["keys"].torch(), values.bfloat16())
    assert same_bits(restore(stored, "F32")["values"].torch(), values.bfloat16().float())


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
@example([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000])  # NaN
@example([0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 0xFF800000])  # to infinity, or just not
@example([0x3F808000, 0x3F818000, 0x00008000, 0x00018000, 0x80000000])  # ties
def test_any_bits_are_rounded_to_bfloat16_as_torch_does(values: list[int]) -> None:
    stored = reduce(Part.KV, kv(bits(*values)), Fidelity.BFLOAT16)
    assert same_bits(stored["keys"].torch(), bits(*values).bfloat16())


@given(st.lists(st.floats(), min_size=1, max_size=40))
def test_float64_is_rounded_to_float32_first(values: list[float]) -> None:
    wide = torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, -1)
    stored = reduce(Part.KV, kv(wide), Fidelity.BFLOAT16)
    assert same_bits(stored["keys"].torch(), wide.float().bfloat16())
    assert same_bits(restore(stored, "F64")["keys"].torch(), wide.float().bfloat16().double())


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=40), st.sampled_from(sorted(TORCH_DTYPE)))
def test_bfloat16_comes_back_in_any_dtype(values: list[int], dtype: str) -> None:
    stored = torch.from_numpy(np.array(values, np.uint16)).view(torch.bfloat16).reshape(1, 1, 1, -1)
    assert same_bits(restore(kv(stored), dtype)["keys"].torch(), stored.to(TORCH_DTYPE[dtype]))


@given(finite_kv())
def test_int8_comes_back_within_half_its_scale(arrays: dict[str, Array]) -> None:
    stored = reduce(Part.KV, arrays, Fidelity.INT8)
    for name, found in restore(stored, arrays["keys"].dtype).items():
        original, dtype = arrays[name].torch().double(), arrays[name].dtype
        scale = torch.from_numpy(stored[f"{name}_scale"].numpy().astype(np.float64))[..., None]
        # The quotient was rounded in float32, the original and the result in the dtype.
        allowed = 0.5001 * scale + 2 * ROUNDING[dtype] * original.abs() + SUBNORMAL[dtype]
        assert found.dtype == dtype
        assert ((found.torch().double() - original).abs() <= allowed).all()


@given(finite_kv())
def test_a_scale_is_zero_for_zeros_alone_and_a_127th_of_the_largest(arrays: dict[str, Array]) -> None:
    stored = reduce(Part.KV, arrays, Fidelity.INT8)
    for name, array in arrays.items():
        multiples, scale = stored[name].torch(), stored[f"{name}_scale"].torch()
        largest = array.torch().float().abs().amax(-1)
        assert (multiples >= -127).all()
        assert torch.equal(scale == 0, largest == 0)
        assert scale[largest > 0].isfinite().all()
        assert torch.isfinite(scale * 127).all()
        is_normal = largest >= 127 * torch.finfo(torch.float32).smallest_normal
        assert (multiples.abs().amax(-1)[is_normal] == 127).all()
        assert torch.allclose(scale[is_normal], largest[is_normal] / 127, rtol=3e-7, atol=0)


def test_a_row_is_divided_by_its_scale_and_rounded_to_even() -> None:
    values = torch.tensor([[127.0, -63.5, 62.5, 0.49, -0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]).reshape(1, 1, 2, 5)
    stored = reduce(Part.KV, kv(values), Fidelity.INT8)
    assert stored["keys"].numpy().tolist() == [[[[127, -64, 62, 0, 0], [0, 0, 0, 0, 0]]]]
    assert stored["keys_scale"].numpy().tolist() == [[[1.0, 0.0]]]
    assert restore(stored, "F32")["keys"].numpy().tolist() == [[[[127, -64, 62, 0, 0], [0, 0, 0, 0, 0]]]]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", TORCH_DTYPE)
def test_int8_has_no_numbers_for_what_is_not_finite(dtype: str, value: float) -> None:
    arrays = random_kv(2, 2, 3, 4, dtype=dtype)
    arrays["values"].torch()[1, 1, 2, 3] = value
    with pytest.raises(BlobFormat, match="not finite"):
        reduce(Part.KV, arrays, Fidelity.INT8)


def test_int8_has_no_numbers_for_float64_beyond_float32() -> None:
    with pytest.raises(BlobFormat, match="not finite"):
        reduce(Part.KV, kv(torch.full((1, 1, 1, 2), 1e40, dtype=torch.float64)), Fidelity.INT8)


@pytest.mark.parametrize("fidelity", LOSSY)
@given(arrays=finite_kv())
def test_what_was_reduced_is_stored_and_restored_once(fidelity: Fidelity, arrays: dict[str, Array]) -> None:
    stored = reduce(Part.KV, arrays, fidelity)
    assert content(reduce(Part.KV, stored, fidelity)) == content(stored)
    decoded = decode(Part.KV, view(encode(Part.KV, stored, ORIGIN)))
    assert content(decoded) == content(stored)
    restored = restore(decoded, arrays["keys"].dtype)
    assert {name: each.shape for name, each in restored.items()} == {name: each.shape for name, each in arrays.items()}
    assert content(restore(restored, arrays["keys"].dtype)) == content(restored)


@pytest.mark.parametrize("dtype", TORCH_DTYPE)
def test_what_is_exact_is_not_copied(dtype: str) -> None:
    arrays = random_kv(1, 2, 3, 4, dtype=dtype)
    assert all(restored is arrays[name] for name, restored in restore(arrays, dtype).items())


def test_any_reader_of_safetensors_undoes_int8_by_one_multiplication() -> None:
    arrays = random_kv(2, 3, 4, 8)
    stored = reduce(Part.KV, arrays, Fidelity.INT8)
    theirs = safetensors.numpy.load(encode(Part.KV, stored, ORIGIN))
    for name, restored in restore(stored, "F32").items():
        assert np.array_equal(restored.numpy(), theirs[name] * theirs[f"{name}_scale"][..., None])


@pytest.mark.parametrize(
    ("fidelity", "ratio"), [(Fidelity.EXACT, 1.0), (Fidelity.BFLOAT16, 0.5), (Fidelity.INT8, 0.266)]
)
def test_a_lossy_part_is_a_half_or_about_a_quarter_of_float32(fidelity: Fidelity, ratio: float) -> None:
    arrays = random_kv(4, 4, 50, 64)
    nbytes = sum(each.nbytes for each in arrays.values())
    assert sum(each.nbytes for each in reduce(Part.KV, arrays, fidelity).values()) <= ratio * nbytes


@pytest.mark.parametrize(
    "shape", [(3, 5, 70, 96), (2, 3, 1, 4), (1, 1, 3000, 64), (3, 4, 700, 48), (400, 1, 1, 512)], ids=str
)
@pytest.mark.parametrize("fidelity", LOSSY)
def test_parts_of_any_size_are_reduced_and_restored_row_by_row(fidelity: Fidelity, shape: tuple[int, ...]) -> None:
    arrays = random_kv(*shape)
    stored = reduce(Part.KV, arrays, fidelity)
    keys = arrays["keys"].torch()
    if fidelity is Fidelity.INT8:
        scale = keys.abs().amax(-1, keepdim=True) / 127
        assert torch.equal(stored["keys"].torch(), (keys / scale).round().to(torch.int8))
        assert torch.equal(restore(stored, "F32")["keys"].torch(), (keys / scale).round() * scale)
    else:
        assert torch.equal(restore(stored, "F32")["keys"].torch(), keys.bfloat16().float())


@pytest.mark.parametrize("dtype", TORCH_DTYPE)
@pytest.mark.parametrize("fidelity", Fidelity)
def test_a_part_is_restored_into_its_place_and_nowhere_else(fidelity: Fidelity, dtype: str) -> None:
    torch.manual_seed(1)
    arrays = kv(torch.randn(3, 2, 900, 32).to(TORCH_DTYPE[dtype]), torch.randn(3, 2, 900, 48).to(TORCH_DTYPE[dtype]))
    stored = reduce(Part.KV, arrays, fidelity)
    keys, values = buffers(arrays, dtype)
    restore_into(stored, place(keys, 900), place(values, 900))
    for name, buffer in (("keys", keys), ("values", values)):
        assert torch.equal(buffer[:, :, 2:902], restore(stored, dtype)[name].torch())
        assert (buffer[:, :, :2] == 7).all()
        assert (buffer[:, :, 902:] == 7).all()


@pytest.mark.parametrize("fidelity", Fidelity)
def test_nothing_is_restored_from_no_tokens(fidelity: Fidelity) -> None:
    stored = reduce(Part.KV, random_kv(2, 2, 0, 4), fidelity)
    assert restore(stored, "F32")["keys"].shape == (2, 2, 0, 4)
    restore_into(stored, np.empty((2, 2, 0, 4), np.float32), np.empty((2, 2, 0, 4), np.float32))


@pytest.mark.parametrize("fidelity", Fidelity)
@pytest.mark.parametrize("shape", [(2, 2, 5, 4), (3, 2, 1, 4), (2, 2, 1, 8), (2, 2, 0, 4), (2, 4), ()], ids=str)
def test_a_part_of_another_shape_is_not_spread_over_its_place(fidelity: Fidelity, shape: tuple[int, ...]) -> None:
    stored = reduce(Part.KV, random_kv(2, 2, 1, 4), fidelity)
    with pytest.raises(BlobFormat, match="have shape"):
        restore_into(stored, np.empty((2, 2, 1, 4), np.float32), np.empty(shape, np.float32))


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
@pytest.mark.parametrize("fidelity", Fidelity)
def test_integers_are_no_place_for_keys_and_values(fidelity: Fidelity, dtype: type[np.signedinteger[Any]]) -> None:
    stored = reduce(Part.KV, random_kv(2, 2, 1, 4), fidelity)
    with pytest.raises(TypeError):
        restore_into(stored, np.empty((2, 2, 1, 4), dtype), np.empty((2, 2, 1, 4), dtype))


@pytest.mark.parametrize("dtype", TORCH_DTYPE)
@pytest.mark.parametrize("fidelity", LOSSY)
def test_restoring_into_place_takes_little_memory(fidelity: Fidelity, dtype: str) -> None:
    arrays = random_kv(8, 8, 512, 64)
    stored = reduce(Part.KV, arrays, fidelity)
    keys, values = buffers(arrays, dtype)
    tracemalloc.start()
    try:
        restore_into(stored, place(keys, 512), place(values, 512))
        assert tracemalloc.get_traced_memory()[1] < ITEMSIZE["F32"] * arrays["keys"].torch().numel() / 2
    finally:
        tracemalloc.stop()


def test_scales_that_no_writer_wrote_do_no_harm() -> None:
    stored = dict(reduce(Part.KV, random_kv(1, 1, 4, 4), Fidelity.INT8))
    scales = np.array([np.inf, np.nan, LARGEST, -1.0], np.float32).reshape(1, 1, 4)
    stored["keys_scale"] = Array.from_numpy(scales)
    for dtype in TORCH_DTYPE:
        assert restore(stored, dtype)["keys"].shape == (1, 1, 4, 4)
