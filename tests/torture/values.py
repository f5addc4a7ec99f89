"""Values of every dtype, known from their address alone, as databases of every fidelity keep them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from backprompt_db.codec.fidelity import Fidelity, reduce, restore_into
from backprompt_db.codec.kv_reader import KVSpan
from backprompt_db.database.writer import NewPart
from backprompt_db.prompt.ids import Address
from backprompt_db.prompt.representation import Array, Arrays, Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.store.contract import Key
from tests.support import faults
from tests.support.faults import keys_of, num_tokens_at, origin_of

_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""NumPy knows bfloat16 by its bits only."""


def dtype_of(where: Address) -> str:
    """The dtype of the keys and values under an address."""
    return list(_DTYPES)[where[1] % len(_DTYPES)]


def contents(key: Key) -> Arrays:
    """The only right arrays under a key, before a fidelity rounds them."""
    if key.part is not Part.KV:
        return faults.contents(key)
    dice = np.random.default_rng([*key.address[:16], *key.part.value])
    return {name: _floats(dice, key.address) for name in ("keys", "values")}


def new_parts(some: Iterable[Segment]) -> list[NewPart]:
    """What computing segments gives."""
    return [NewPart(key, contents(key), origin_of(segment)) for segment in some for key in keys_of([segment])]


def wrong(found: Mapping[Key, Arrays], fidelity: Fidelity) -> list[Key]:
    """The keys of values that are neither what was computed nor what a database of this fidelity keeps of it."""
    return [key for key, arrays in found.items() if not _is_right(key, arrays, fidelity)]


def empty_span(where: Address) -> KVSpan:
    """A place for the keys and values under an address."""
    shape, dtype = _shape(where), _DTYPES[dtype_of(where)]
    return KVSpan(np.zeros(shape, dtype), np.zeros(shape, dtype))


def is_right_in_place(key: Key, span: KVSpan, fidelity: Fidelity) -> bool:
    """Whether what was read into a span is what was computed, or what restoring gives of what was kept of it."""
    exact, kept = contents(key), empty_span(key.address)
    restore_into(reduce(key.part, exact, fidelity), kept.keys, kept.values)
    read = span.keys.tobytes(), span.values.tobytes()
    return read in (
        (bytes(exact["keys"].data), bytes(exact["values"].data)),
        (kept.keys.tobytes(), kept.values.tobytes()),
    )


def _is_right(key: Key, arrays: Arrays, fidelity: Fidelity) -> bool:
    exact = contents(key)
    # What still waits to be written is exact. What rounding gives is compared with an oracle by the tests of the codec.
    return any(_are_equal(arrays, right) for right in (exact, reduce(key.part, exact, fidelity)))


def _are_equal(arrays: Arrays, right: Arrays) -> bool:
    return arrays.keys() == right.keys() and all(
        (array.dtype, array.shape, bytes(array.data)) == (other.dtype, other.shape, bytes(other.data))
        for array, other in ((array, right[name]) for name, array in arrays.items())
    )


def _shape(where: Address) -> tuple[int, int, int, int]:
    return 1, 2, num_tokens_at(where), 16


def _floats(dice: np.random.Generator, where: Address) -> Array:
    values: npt.NDArray[Any] = dice.standard_normal(_shape(where), dtype=np.float32)
    if dtype_of(where) == "BF16":
        values = values.view("<u4") >> 16
    numbers = values.astype(_DTYPES[dtype_of(where)])
    return Array(dtype_of(where), numbers.shape, numbers.reshape(-1).view(np.uint8).data)
