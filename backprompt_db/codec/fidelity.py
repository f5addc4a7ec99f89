"""Fidelities of keys and values: exact, bfloat16, or int8 with a scale for each token and head.

`reduce` makes the arrays that a database of some fidelity stores; `restore` and `restore_into` make keys and values of
the model's dtype again. All values pass through float32, block by block: a block stays in the processor's cache, and
where float32 is wanted, only the destination is written.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from backprompt_db.errors import BlobFormat
from backprompt_db.prompt.representation import Array, Arrays, Part

_AnyArray: TypeAlias = npt.NDArray[Any]
_Block: TypeAlias = tuple[slice, slice, slice]
"""Some layers, heads and tokens of keys or values."""

_NUMPY_DTYPE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""How the dtypes of keys and values look in NumPy, which knows bfloat16 only by its bits."""

_BLOCK_NUM_ELEMENTS = 1 << 17
"""Half a megabyte of float32. As measured, smaller blocks cost calls, and larger ones do not stay in the cache."""

_MAX_INT8 = np.float32(127)
_MIN_SCALE = np.finfo(np.float32).smallest_normal
_MAX_SCALE = np.nextafter(np.finfo(np.float32).max / _MAX_INT8, np.float32(0))
"""The largest scale that is still finite when multiplied by 127."""


class Fidelity(enum.StrEnum):
    """How closely a database keeps keys and values. Scores and logits are always exact."""

    EXACT = "exact"
    """Bit for bit, in the model's dtype."""
    BFLOAT16 = "bfloat16"
    """Rounded to the nearest bfloat16: half the bytes of float32. Models of two bytes per element lose nothing."""
    INT8 = "int8"
    """Multiples from -127 to 127 of one scale for each token and head: a quarter of the bytes of float32."""


_quiet = np.errstate(over="ignore", invalid="ignore")
"""NumPy does not warn about infinities and NaN: they are values like others."""


@_quiet
def reduce(part: Part, arrays: Arrays, fidelity: Fidelity) -> Arrays:
    """Return the arrays of a part as a database of this fidelity stores them: the same ones where nothing changes.

    Raises `BlobFormat` for keys and values with an infinity or NaN (or, in F64, beyond the range of float32), which
    int8 has no numbers for.
    """
    if part is not Part.KV or fidelity is Fidelity.EXACT or arrays["keys"].dtype == "I8":
        return arrays
    if fidelity is Fidelity.BFLOAT16:
        return {name: _to_bfloat16(array) for name, array in arrays.items()}
    stored = dict[str, Array]()
    for name, array in arrays.items():
        stored[name], stored[_scale_of(name)] = _to_int8(array)
    return stored


def restore(arrays: Arrays, dtype: str) -> Arrays:
    """Return the keys and values of a stored part in `dtype`: F64, F32, F16 or BF16; copied only to convert."""
    return {name: _restored(arrays, name, dtype) for name in ("keys", "values")}


def restore_into(arrays: Arrays, keys: _AnyArray, values: _AnyArray) -> None:
    """Write the keys and values of a stored part into given arrays, in their dtype.

    Both are `[num_layers, num_kv_heads, T, head_dim]` with any strides, float64, float32 or float16; uint16 stands for
    bfloat16. Raises `BlobFormat` when the part has another shape.
    """
    _restore_one(arrays, "keys", keys)
    _restore_one(arrays, "values", values)


def _scale_of(name: str) -> str:
    return f"{name}_scale"


def _to_bfloat16(array: Array) -> Array:
    if array.dtype not in ("F64", "F32"):
        return array
    source, bits = _view(array), np.empty(array.shape, "<u2")
    for block in _blocks(array.shape):
        _round(_as_float32(source[block]), out=bits[block])
    return _array("BF16", bits)


def _to_int8(array: Array) -> tuple[Array, Array]:
    source = _view(array)
    multiples, scale = np.empty(array.shape, np.int8), np.empty(array.shape[:3], "<f4")
    for block in _blocks(array.shape):
        multiples[block], scale[block] = _quantised(_as_float32(source[block]))
    return _array("I8", multiples), _array("F32", scale)


def _quantised(values: _AnyArray) -> tuple[_AnyArray, _AnyArray]:
    """Return float32 values as whole multiples, still in float32, of one scale for the last dimension."""
    largest = np.abs(values).max(axis=-1, initial=0)
    if not np.isfinite(largest).all():
        raise BlobFormat(
            "keys or values that are not finite cannot be stored as int8",
            hint="They are computed each time; a database with fidelity 'exact' or 'bfloat16' keeps them.",
        )
    # A subnormal scale has too few bits: its multiples would miss the values by more than half of it.
    scale = np.clip(largest / _MAX_INT8, _MIN_SCALE, _MAX_SCALE)
    multiples = values / scale[..., None]
    return np.rint(multiples, out=multiples), np.where(largest == 0, np.float32(0), scale)


def _restored(arrays: Arrays, name: str, dtype: str) -> Array:
    if arrays[name].dtype == dtype:
        return arrays[name]
    target = np.empty(arrays[name].shape, _NUMPY_DTYPE[dtype])
    _restore_one(arrays, name, target)
    return _array(dtype, target)


@_quiet
def _restore_one(arrays: Arrays, name: str, target: _AnyArray) -> None:
    array = arrays[name]
    if array.shape != target.shape:
        raise BlobFormat(
            f"the stored {name} have shape {list(array.shape)}, not {list(target.shape)}",
            hint="It counts as a miss and will be computed again.",
        )
    source = _view(array)
    if source.dtype == target.dtype:
        target[...] = source
        return
    scale = arrays[_scale_of(name)].numpy() if array.dtype == "I8" else None
    for block in _blocks(array.shape):
        _restore_block(source[block], None if scale is None else scale[block], target[block])


def _restore_block(source: _AnyArray, scale: _AnyArray | None, target: _AnyArray) -> None:
    if target.dtype == np.float32:
        _widen(source, scale, out=target)
    elif target.dtype == np.uint16:
        _round(_as_float32(source, scale), out=target)
    else:
        np.copyto(target, _as_float32(source, scale))  # unlike an assignment, it refuses integers


def _as_float32(source: _AnyArray, scale: _AnyArray | None = None) -> _AnyArray:
    if source.dtype == np.float32:
        return source
    values = np.empty(source.shape, np.float32)
    _widen(source, scale, out=values)
    return values


def _widen(source: _AnyArray, scale: _AnyArray | None, *, out: _AnyArray) -> None:
    """Write a block as float32. Converting in the destination takes half the time of converting beside it."""
    if source.dtype == np.uint16:
        bits = out.view(np.uint32)
        bits[...] = source
        np.left_shift(bits, 16, out=bits)
    else:
        out[...] = source
    if scale is not None:
        np.multiply(out, scale[..., None], out=out)


def _round(values: _AnyArray, *, out: _AnyArray) -> None:
    """Write the bits of the bfloat16 nearest to each float32; of two that are as near, the even one. NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    np.copyto(out, rounded, casting="unsafe")
    is_nan = np.isnan(values)
    if is_nan.any():  # rounding may have carried into its exponent
        out[is_nan] = bits[is_nan] >> 16 | 0x0040


def _blocks(shape: tuple[int, ...]) -> Iterator[_Block]:
    """Divide keys or values into blocks of about `_BLOCK_NUM_ELEMENTS`, each contiguous when the whole is."""
    num_layers, num_kv_heads, num_tokens, head_dim = shape
    room = max(1, _BLOCK_NUM_ELEMENTS // max(1, head_dim))
    tokens = max(1, min(num_tokens, room))
    heads = max(1, min(num_kv_heads, room // tokens))
    layers = max(1, room // (tokens * heads))
    steps = ((num_layers, layers), (num_kv_heads, heads), (num_tokens, tokens))
    return itertools.product(*([slice(i, i + step) for i in range(0, size, step)] for size, step in steps))


def _view(array: Array) -> _AnyArray:
    if array.dtype == "BF16":
        return np.frombuffer(array.data, _NUMPY_DTYPE["BF16"]).reshape(array.shape)
    return array.numpy()


def _array(dtype: str, array: _AnyArray) -> Array:
    return Array(dtype, array.shape, array.reshape(-1).view(np.uint8).data)
