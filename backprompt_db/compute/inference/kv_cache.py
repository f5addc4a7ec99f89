"""Keys and values of many segments in one transformers `Cache`, and back, in buffers that passes reuse."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from backprompt_db.codec.kv_reader import KVSpan
from backprompt_db.database.memory_cache import MemoryCache
from backprompt_db.prompt.ids import Address
from backprompt_db.prompt.representation import Array, Arrays

_BITS = {torch.bfloat16: torch.uint16}
"""Dtypes that NumPy does not know, with one of the same size that it knows."""

_MIN_NBYTES = 96 << 20
_MIN_TOKENS = 2048
"""The least memory of a buffer, in bytes or tokens, if the budget has it: the next prompt then finds pages that the
process has touched before, while new pages cost as much as reading a prefix of that length."""

CACHE_KEYWORD = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"
"""The argument by which models of this version of transformers, and their `generate`, take a cache."""


def cache_argument(model: Any, cache: Cache) -> dict[str, Cache]:
    """Return a cache as the keyword argument by which a model takes one: models with code of their own may be older."""
    parameters = inspect.signature(type(model).forward).parameters
    names = [name for name in ("cache", "past_key_values") if name in parameters]
    return {names[0] if names else CACHE_KEYWORD: cache}


@dataclass(frozen=True, slots=True)
class KVShape:
    """The shape of a model's keys and values, without their length."""

    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, arrays: Arrays) -> KVShape:
        """Return the shape of stored keys and values."""
        keys, values = arrays["keys"], arrays["values"]
        num_layers, num_kv_heads, _, key_dim = keys.shape
        return cls(num_layers, num_kv_heads, key_dim, values.shape[3], keys.torch().dtype)

    @property
    def nbytes_per_token(self) -> int:
        """Bytes of the keys and values of one token."""
        return self.num_layers * self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class GrowingLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A cache layer that appends in place, and doubles its memory when that is full.

    Concatenating, as a `DynamicLayer` does, copies the whole prefix for every pass; at 1,000 tokens that costs as much
    as the pass itself.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().__init__()
        self._room = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        self.is_initialized = True

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Append keys and values `[batch_size, num_kv_heads, T, head_dim]`; return all there are."""
        begin = self.keys.shape[-2]
        end = begin + key_states.shape[-2]
        keys, values = self._room
        # Storages are compared: an empty view has no address. Users of the cache may replace or repeat its tensors.
        is_ours = self.keys.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
        if not is_ours or end > keys.shape[-2]:
            self._room = keys, values = _enlarged(self.keys, 2 * end), _enlarged(self.values, 2 * end)
        keys[:, :, begin:end] = key_states
        values[:, :, begin:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values


class KVBuffer:
    """Memory for the keys and values of some segments, one after the other, and a `Cache` over it.

    Shapes are `[num_layers, 1, num_kv_heads, capacity, head_dim]`: one segment is one strided copy for all layers.
    """

    def __init__(self, shape: KVShape, *, capacity: int, device: torch.device) -> None:
        size = (shape.num_layers, 1, shape.num_kv_heads, capacity)
        self.shape = shape
        self.device = device
        self.capacity = capacity
        self.keys = _empty((*size, shape.key_dim), shape.dtype, device)
        self.values = _empty((*size, shape.value_dim), shape.dtype, device)
        self.length = 0
        self.contents: list[tuple[Address, int]] = []
        """Addresses and numbers of tokens of the segments at its beginning; a pass adds its own when it ends."""
        self.num_followed = 0
        """How many of these something has followed, so that more may follow them."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole buffer."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def is_mostly_air(self) -> bool:
        """Whether less than half of it is contents."""
        return 2 * num_tokens_of(self.contents) < self.capacity

    @property
    def num_kept(self) -> int:
        """How many of its segments are kept where other contents take its place.

        A short end that nothing has followed is not: most never are, and it is read from the file as fast as copied.
        """
        return self.num_followed if self.is_mostly_air else len(self.contents)

    def append(self, arrays: Arrays) -> None:
        """Copy stored keys and values, `[num_layers, num_kv_heads, T, head_dim]`, after the others."""
        end = self.length + arrays["keys"].shape[2]
        self.keys[:, 0, :, self.length : end] = arrays["keys"].torch()
        self.values[:, 0, :, self.length : end] = arrays["values"].torch()
        self.length = end

    def span(self, num_tokens: int) -> KVSpan:
        """Return the memory of the next `num_tokens` tokens, to be filled and then counted with `extend`."""
        return KVSpan(*(_numpy(self._next(whole, num_tokens)) for whole in (self.keys, self.values)))

    def extend(self, span: KVSpan) -> None:
        """Count the tokens of a span that was filled."""
        if self.device.type != "cpu":
            for whole, part in ((self.keys, span.keys), (self.values, span.values)):
                staged = torch.from_numpy(part).view(self.shape.dtype)
                self._next(whole, span.num_tokens).copy_(staged, non_blocking=True)
        self.length += span.num_tokens

    def num_shared(self, contents: Sequence[tuple[Address, int]]) -> int:
        """Return how many of `contents` the buffer begins with."""
        pairs = zip(self.contents, contents, strict=False)
        return next(
            (n for n, (mine, other) in enumerate(pairs) if mine != other), min(len(self.contents), len(contents))
        )

    def truncate(self, num_segments: int) -> None:
        """Forget all but the first segments."""
        del self.contents[num_segments:]
        self.num_followed = min(self.num_followed, num_segments)
        self.length = num_tokens_of(self.contents)

    def begin_like(self, other: KVBuffer, num_segments: int) -> None:
        """Replace the contents by a copy of another buffer's first segments."""
        self.contents = other.contents[:num_segments]
        self.num_followed = other.num_followed
        self.truncate(num_segments)
        self.keys[:, :, :, : self.length] = other.keys[:, :, :, : self.length]
        self.values[:, :, :, : self.length] = other.values[:, :, :, : self.length]

    def follow(self, chain: Sequence[tuple[Address, int]], *, num_followed: int) -> None:
        """Add the segments that a pass has appended, the first of which are followed; any others are forgotten."""
        self.num_followed = len(self.contents) + num_followed
        self.contents += chain
        self.length = num_tokens_of(self.contents)

    def shrunk(self) -> KVBuffer:
        """Return a copy of what is to be kept, in a buffer that is half full: a short continuation has room there."""
        num_tokens = num_tokens_of(self.contents[: self.num_kept])
        other = KVBuffer(self.shape, capacity=2 * num_tokens, device=self.device)
        other.begin_like(self, self.num_kept)
        return other

    def cache(self) -> Cache:
        """Return a transformers `Cache` that holds what was appended and appends into the same buffer."""
        cache = DynamicCache()
        cache.layers = [
            GrowingLayer(keys, values, self.length) for keys, values in zip(self.keys, self.values, strict=True)
        ]
        return cache

    def is_extended_by(self, cache: Cache, num_tokens: int) -> bool:
        """Whether a pass over `cache` has appended exactly `num_tokens` tokens here, and kept none anywhere else."""
        end = self.length + num_tokens
        starts = [(keys.data_ptr(), values.data_ptr()) for keys, values in zip(self.keys, self.values, strict=True)]
        layers = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        return layers == starts and all(layer.keys.shape[-2] == layer.values.shape[-2] == end for layer in cache.layers)

    def take(self, tokens: npt.NDArray[np.int64]) -> Arrays:
        """Return a copy of the keys and values of tokens, by their places, as they are stored."""
        begin, end = (int(tokens[0]), int(tokens[-1]) + 1) if len(tokens) else (0, 0)
        if end - begin == len(tokens):  # places ascend
            return {"keys": _copy(self.keys[:, 0, :, begin:end]), "values": _copy(self.values[:, 0, :, begin:end])}
        places = torch.from_numpy(tokens).to(self.device)
        return {"keys": _copy(self.keys[:, 0, :, places]), "values": _copy(self.values[:, 0, :, places])}

    def _next(self, whole: torch.Tensor, num_tokens: int) -> torch.Tensor:
        return whole[:, 0, :, self.length : self.length + num_tokens]


def num_tokens_of(contents: Sequence[tuple[Address, int]]) -> int:
    """Return how many tokens the segments have that a buffer lists."""
    return sum(num_tokens for _, num_tokens in contents)


def assemble(shape: KVShape, parts: Sequence[Arrays], *, capacity: int, device: torch.device | None) -> KVBuffer:
    """Return a buffer of `capacity` tokens that begins with the keys and values of `parts`."""
    buffer = KVBuffer(shape, capacity=capacity, device=device or torch.device("cpu"))
    for arrays in parts:
        buffer.append(arrays)
    return buffer


def cache_of_rows(
    shape: KVShape,
    rows: Sequence[Sequence[Arrays]],
    *,
    padding: Sequence[int],
    copies: int,
    capacity: int,
    device: torch.device,
) -> Cache:
    """Return a cache of the keys and values of each row's parts, after `padding` zeros, with `copies` of each row.

    Its layers are `[len(rows) * copies, num_kv_heads, length, head_dim]` and append in place up to `capacity` tokens.
    """
    if len(rows) == copies == 1:
        return assemble(shape, rows[0], capacity=capacity, device=device).cache()
    size = (shape.num_layers, len(rows) * copies, shape.num_kv_heads, capacity)
    whole = KVBuffer(shape, capacity=0, device=device)
    whole.keys = torch.empty((*size, shape.key_dim), dtype=shape.dtype, device=device)
    whole.values = torch.empty((*size, shape.value_dim), dtype=shape.dtype, device=device)
    for index, (parts, begin) in enumerate(zip(rows, padding, strict=True)):
        own = slice(index * copies, (index + 1) * copies)
        num_tokens = sum(arrays["keys"].shape[2] for arrays in parts)
        whole.length = begin + num_tokens
        buffer = assemble(shape, parts, capacity=num_tokens, device=device)
        for room, filled in ((whole.keys, buffer.keys), (whole.values, buffer.values)):
            room[:, own, :, :begin] = 0  # these are masked, but even a masked NaN would spread
            room[:, own, :, begin : whole.length] = filled
    return whole.cache()


def slice_row(cache: Cache, row: int, begin: int, end: int) -> Arrays:
    """Return a copy of the keys and values of tokens `begin` to `end` of a row, as they are stored."""
    return {
        "keys": Array.from_torch(torch.stack([layer.keys[row, :, begin:end] for layer in cache.layers])),
        "values": Array.from_torch(torch.stack([layer.values[row, :, begin:end] for layer in cache.layers])),
    }


def short_name(dtype: torch.dtype) -> str:
    """Return what torch calls a dtype, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def shape_of(cache: Any, *, num_tokens: int) -> KVShape | str:
    """Return the shape of the keys and values in a cache that a model filled, or why they have no single shape."""
    layers = list(getattr(cache, "layers", ()))
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        return "its state is not made of keys and values alone (state space, linear attention or none)"
    shapes = {(tuple(layer.keys.shape), tuple(layer.values.shape), layer.keys.dtype) for layer in layers}
    if len(shapes) != 1:
        return "its layers differ in the shape of their keys and values"
    (keys, values, dtype) = shapes.pop()
    if len(keys) != 4 or keys[:3] != values[:3]:
        return f"its keys have shape {list(keys)} and its values {list(values)}"
    if keys[2] != num_tokens:
        return f"it keeps {keys[2]} keys for {num_tokens} tokens (a prompt of its own, or a cache that forgets)"
    return KVShape(len(layers), keys[1], keys[3], values[3], dtype)


def acquire_prefix(
    memory: MemoryCache,
    shape: KVShape,
    contents: Sequence[tuple[Address, int]],
    *,
    room: int,
    longest: int | None,
    device: torch.device,
) -> KVBuffer:
    """Return a buffer that begins with as much of `contents` as any buffer in memory does.

    It has memory for all of `contents` and `room` more tokens. `contents` are addresses with numbers of tokens, in
    order; `longest` is the number of positions that the model has. The buffer belongs to the caller until
    `release_prefix`.
    """
    capacity = num_tokens_of(contents) + room
    size = _with_headroom(capacity, shape, longest, memory.budget_nbytes)
    best = memory.take_best((shape, device), lambda buffer: _rank(buffer, contents))
    if best is None:
        return KVBuffer(shape, capacity=size, device=device)
    buffer: KVBuffer = best
    num_shared = buffer.num_shared(contents)
    kept = _kept_beside(memory, buffer, contents, capacity=capacity, size=size)
    if kept is not buffer and buffer.capacity >= capacity:
        buffer.truncate(num_shared)
        acquired = buffer
    else:
        acquired = _spare(memory, shape, device, size=size)
        acquired.begin_like(buffer, num_shared)
    if kept is not None:
        release_prefix(memory, kept)
    return acquired


def release_prefix(memory: MemoryCache, buffer: KVBuffer) -> None:
    """Put a buffer into the memory cache, for later passes to acquire."""
    memory.put(object(), buffer, nbytes=buffer.nbytes, group=(buffer.shape, buffer.device))


def _kept_beside(
    memory: MemoryCache, buffer: KVBuffer, contents: Sequence[tuple[Address, int]], *, capacity: int, size: int
) -> KVBuffer | None:
    """Return what stays of a buffer beside one of `size` tokens for other contents; None where it may be lost.

    It is the prefix of another prompt with a common beginning. Where both stay, neither is read again later. One that
    is mostly air stays in a buffer of its own size, so that its memory can be used for the other contents.
    """
    shared, lost = _rank(buffer, contents)
    num_more = 2 * num_tokens_of(buffer.contents[: buffer.num_kept]) if buffer.is_mostly_air else size
    has_room = memory.room_nbytes >= buffer.nbytes + num_more * buffer.shape.nbytes_per_token
    if -lost <= max(shared, capacity // 8) or not has_room:
        return None
    return buffer.shrunk() if buffer.is_mostly_air else buffer


def _spare(memory: MemoryCache, shape: KVShape, device: torch.device, *, size: int) -> KVBuffer:
    """Return a buffer for `size` tokens, to be filled: one in memory that is mostly air, without that, or a new one."""
    spare: KVBuffer | None = memory.take_best(
        (shape, device),
        lambda buffer: (-buffer.num_kept,) if buffer.is_mostly_air and buffer.capacity >= size else None,
    )
    if spare is None:
        return KVBuffer(shape, capacity=size, device=device)
    if spare.num_kept:
        release_prefix(memory, spare.shrunk())
    return spare


def _rank(buffer: KVBuffer, contents: Sequence[tuple[Address, int]]) -> tuple[int, int]:
    """Return how many tokens a buffer shares with `contents`, and, negative, how many it would lose."""
    num_shared = buffer.num_shared(contents)
    return num_tokens_of(contents[:num_shared]), -num_tokens_of(buffer.contents[num_shared : buffer.num_kept])


def _with_headroom(capacity: int, shape: KVShape, longest: int | None, budget_nbytes: int) -> int:
    """Return a little more than `capacity`, so that a growing chat is not copied each time, and enough to be reused."""
    most_nbytes = min(_MIN_NBYTES, budget_nbytes // 8)
    least = min(_MIN_TOKENS, longest or _MIN_TOKENS, most_nbytes // shape.nbytes_per_token)
    size = capacity + capacity // 8 + 64
    return size if 4 * size > least else least


def _enlarged(tensor: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return a copy of keys or values in memory for `capacity` tokens."""
    room = tensor.new_empty((*tensor.shape[:-2], capacity, tensor.shape[-1]))
    room[:, :, : tensor.shape[-2]] = tensor
    return room


@torch.inference_mode(mode=False)  # a tensor made in that mode cannot be written to outside it
def _empty(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    # NumPy asks the system for huge pages, torch does not: new memory costs a page fault for every 2 MiB, not 4 KiB.
    # Measured on 74 MB: 9 ms to fill instead of 55.
    flat = np.empty(max(1, int(np.prod(size)) * dtype.itemsize), dtype=np.uint8)
    return torch.from_numpy(flat)[: int(np.prod(size)) * dtype.itemsize].view(dtype).view(size)


def _copy(place: torch.Tensor) -> Array:
    copied = _empty(tuple(place.shape), place.dtype, torch.device("cpu"))
    return Array.from_torch(copied.copy_(place))


def _numpy(place: torch.Tensor) -> Any:
    """View a part of a buffer in NumPy; for a device's buffer, return memory from which it can be copied there."""
    bits = _BITS.get(place.dtype, place.dtype)
    if place.device.type == "cpu":
        return place.view(bits).numpy()
    return torch.empty(place.shape, dtype=bits, pin_memory=place.device.type == "cuda").numpy()
