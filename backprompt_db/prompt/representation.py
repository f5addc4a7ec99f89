"""A segment's representation: its parts, what they were computed from, and the arrays that they consist of.

Nothing here needs torch: a run of full hits does not import it. Arrays are raw buffers with a safetensors dtype
name; `Array.numpy()` and `Array.torch()` are views of them.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from backprompt_db.errors import FormatError
from backprompt_db.prompt.ids import Address, SegmentId, TokenizerId, WeightsId, address, namespace_id, segment_id

if TYPE_CHECKING:
    import torch


FORMAT = 1
"""The format version of addresses, parts and directories that this code writes."""


class Part(enum.Enum):
    """One of the parts of a representation. The value is its one-byte code in store keys."""

    SCORES = b"s"
    """`input_ids` int32 [T] and `token_logprobs` float32 [T]."""
    LOGITS = b"l"
    """`logits` [vocab_size] after the segment's last token, in the model's dtype."""
    KV = b"k"
    """`keys` and `values` [num_layers, num_kv_heads, T, head_dim] of the segment's own tokens, in the model's dtype."""
    CONTINUATIONS = b"c"
    """What is known of the tokens that may follow: a tree, `input_ids` and `parents` int32 [N] and `token_logprobs`
    float32 [N]. A parent is the index of the token before, -1 directly after the segment. It grows as more is asked."""


OWN_PARTS = (Part.SCORES, Part.LOGITS, Part.KV)
"""The parts of a segment itself: a pass over it computes them, once and for all."""


ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1}
"""Bytes per element of the dtypes that a part may hold, by safetensors name."""

_NUMPY_DTYPE: dict[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I8": "|i1"}
_TORCH_DTYPE = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
}


@dataclass(frozen=True, slots=True, eq=False)
class Array:
    """A C-contiguous little-endian array in a buffer: a dtype by safetensors name, a shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def __post_init__(self) -> None:
        if self.data.nbytes != ITEMSIZE[self.dtype] * math.prod(self.shape):
            raise FormatError(
                f"{self.data.nbytes} bytes are not a {self.dtype} array of shape {list(self.shape)}",
                hint="The part is damaged; it will be computed again.",
            )

    @classmethod
    def from_numpy(cls, array: npt.NDArray[np.float32] | npt.NDArray[np.int32]) -> Array:
        """Wrap a NumPy array of a dtype that parts may hold; contiguous little-endian input is not copied."""
        little = array.dtype.newbyteorder("<")
        dtype = {code: name for name, code in _NUMPY_DTYPE.items()}[little.str]
        flat = np.ascontiguousarray(array, dtype=little).reshape(-1)
        return cls(dtype, array.shape, flat.view(np.uint8).data)

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> Array:
        """Wrap a tensor; one that is contiguous and on the CPU is not copied."""
        import torch

        dtype = dtype_name(tensor.dtype)
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return cls(dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().data)

    def numpy(self) -> npt.NDArray[np.generic]:
        """Return a NumPy view. NumPy has no bfloat16: a BF16 array raises `KeyError`; use `torch()`."""
        return np.frombuffer(self.data, dtype=_NUMPY_DTYPE[self.dtype]).reshape(self.shape)

    def torch(self) -> torch.Tensor:
        """Return a CPU tensor over the same memory."""
        import torch

        dtype = getattr(torch, _TORCH_DTYPE[self.dtype])
        if not self.data.nbytes:
            return torch.empty(self.shape, dtype=dtype)
        tensor: torch.Tensor = torch.frombuffer(self.data, dtype=dtype).reshape(self.shape)
        return tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the array's elements."""
        return self.data.nbytes


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype that parts may hold."""
    return {name: code for code, name in _TORCH_DTYPE.items()}[str(dtype).removeprefix("torch.")]


Arrays = Mapping[str, Array]
"""The named arrays of one part."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a representation was computed from, and how: enough to rebuild the catalog from the store."""

    text: str
    parents: tuple[SegmentId, ...]
    """Ids of the direct parents, ascending; in a namespace, a first segment's only parent is the namespace's id."""
    start: int | None
    weights_id: WeightsId
    tokenizer_id: TokenizerId
    num_tokens: int
    compute_seconds: float
    """This segment's share, by tokens, of the pass that computed it."""
    namespace: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def segment_id(self) -> SegmentId:
        """The id of the segment, recomputed from the text and the parents."""
        return segment_id(self.text, parents=self.parents, start=self.start)

    @property
    def address(self) -> Address:
        """The address that this representation belongs under."""
        return address(self.segment_id, self.weights_id, self.tokenizer_id)

    @property
    def parent_addresses(self) -> list[Address]:
        """The addresses that this representation directly follows; what stands for a namespace is none of them."""
        root = namespace_id(self.namespace)
        return [address(each, self.weights_id, self.tokenizer_id) for each in self.parents if each != root]


@np.errstate(over="ignore", invalid="ignore")  # infinities and NaN are values like others
def likeliest(logits: Array, k: int) -> list[tuple[int, float]]:
    """Return the `k` likeliest tokens by their logits [V], the likeliest first, with natural log-probabilities."""
    values: npt.NDArray[Any] = _widened(logits) if logits.dtype == "BF16" else logits.numpy()
    best = np.argpartition(values, -k)[-k:]
    best = best[np.argsort(values[best])[::-1]]
    largest = values[best[0]]
    log_sum = np.log(np.exp(values - largest, dtype=np.float32).sum(dtype=np.float64))
    return [(int(token), float(values[token] - largest - log_sum)) for token in best]


def _widened(array: Array) -> npt.NDArray[np.float32]:
    """Return bfloat16 numbers as float32, of which they are the upper half."""
    return (np.frombuffer(array.data, dtype="<u2").astype("<u4") << 16).view("<f4").reshape(array.shape)
