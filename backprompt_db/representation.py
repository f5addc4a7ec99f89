"""What is kept of a segment: its three parts, where they came from, and the arrays they are made of.

Nothing here needs torch: a full hit is answered without importing it. Arrays are raw buffers with a safetensors dtype
name; `Array.numpy()` and `Array.torch()` are views of them.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from backprompt_db.errors import FormatError, PromptError
from backprompt_db.keys import Address, SegmentId, TokenizerId, WeightsId, address, namespace_id, segment_id

if TYPE_CHECKING:
    import torch

    from backprompt_db.pictures.picture import Picture
    from backprompt_db.text import Text

FORMAT = 1
"""The format version of addresses, parts and directories that this code writes."""


class Part(enum.Enum):
    """One of the three parts of a representation. The value is its one-byte code in store keys."""

    SCORES = b"s"
    """`input_ids` int32 [T] and `token_logprobs` float32 [T]."""
    LOGITS = b"l"
    """`logits` [vocab_size] after the segment's last token, in the model's dtype."""
    KV = b"k"
    """`keys` and `values` [num_layers, num_kv_heads, T, head_dim] of the segment's own tokens, in the model's dtype."""


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
    """What a representation was computed from, and how: all that is needed to rebuild the catalog from the store."""

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


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelRepr:
    """A language model's representation of one text: what running a prompt returns.

    Attributes:
        text: the text that was run.
        input_ids: int64 [T], the tokens of the whole text, segment by segment in the order written.
        token_logprobs: float32 [T], natural log-probability of each token given the tokens visible to it; NaN for the
            first token of a prompt and for the first token after parallel branches, which nothing predicts.
        logits: [vocab_size] in the model's dtype, after the last token. `PromptError` for a text that ends in
            parallel branches, which has no single last token.
        past_key_values: a transformers `Cache` of the text's keys and values, each
            `[1, num_kv_heads, T, head_dim]` per layer, in the order of `input_ids`. Assembled anew at each access,
            because a model extends the cache that it is given.
        num_cached_tokens: tokens of this text whose representation was found.
        num_computed_tokens: tokens of this text that were computed by the call. A segment shared by several texts of
            one call is counted as computed once, for the first of them.
        is_computed: of each segment, in the order written, whether its tokens count as computed.
        fidelity: `exact`, or that of the lossy database whose keys and values it may have been computed with.

    Tensors are on the CPU (`past_key_values` where the model is) and may be changed freely. Reading `logits` or
    `token_logprobs` imports torch; nothing else of a hit does.
    """

    text: Text
    scores: tuple[Arrays, ...] = field(repr=False)
    """The scores part of each segment, in the order written."""
    last_logits: Array | None = field(repr=False)
    """The logits part of the last segment; None after parallel branches."""
    num_cached_tokens: int
    num_computed_tokens: int
    is_computed: tuple[bool, ...] = field(repr=False)
    ids: tuple[WeightsId, TokenizerId]
    """The weights id and tokenizer id that this was computed under."""
    fidelity: str = "exact"

    @cached_property
    def input_ids(self) -> torch.Tensor:
        """int64 [T]: the tokens of the whole text."""
        import torch

        return torch.cat([scores["input_ids"].torch() for scores in self.scores]).long()

    @cached_property
    def token_logprobs(self) -> torch.Tensor:
        """float32 [T]: log-probability of each token, NaN where nothing predicts it."""
        import torch

        return torch.cat([scores["token_logprobs"].torch() for scores in self.scores])

    @cached_property
    def logits(self) -> torch.Tensor:
        """[vocab_size]: the logits after the last token."""
        # A copy: the array itself may still be queued for writing.
        return self._last_array().torch().clone()

    def top_k(self, k: int) -> list[tuple[int, float]]:
        """Return the `k` likeliest next tokens, the likeliest first, as token ids with natural log-probabilities.

        The logits are read where they lie, without torch and, unless they are bfloat16, without a copy. Raises
        `PromptError` where there are no logits, see `logits`, and for a `k` that is not from 1 to vocab_size.
        """
        array = self._last_array()
        if not 1 <= k <= array.shape[0]:
            raise PromptError(f"k={k} is not a number of tokens", hint=f"Give an int from 1 to {array.shape[0]}.")
        return likeliest(array, k)

    def _last_array(self) -> Array:
        if self.last_logits is None:
            raise PromptError(
                "a text that ends in parallel branches has no last token",
                hint="Append the text that follows the branches, then run it.",
            )
        return self.last_logits

    @property
    def past_key_values(self) -> Any:
        """A transformers `Cache` of the whole text, valid input to `model(...)`; a new one at each access.

        Reads the stored keys and values; those that were evicted or never asked for are computed and kept. Raises
        `ModelMismatch` when the model has changed since this representation was computed.
        """
        return self.text.model.past_key_values(self.text, ids=self.ids)

    def picture(self) -> Picture:
        """Return a picture of the prompt, in which what was found and what the call computed have different colours."""
        from backprompt_db.pictures.subjects import picture_result

        return picture_result(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: every token, coloured by how much it surprised the model."""
        from backprompt_db.pictures.surprise import surprise_view

        return surprise_view(self)
