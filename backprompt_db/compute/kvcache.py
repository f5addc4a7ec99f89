"""Keys and values of many segments in one transformers `Cache`, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from backprompt_db.representation import Array, Arrays


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a model's keys and values look like, but for their length."""

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


class _PreallocatedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A cache layer that appends in place while its buffer lasts, and like any `DynamicLayer` after that.

    Concatenating copies the whole prefix for every pass; at 1,000 tokens that costs as much as the pass itself.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().__init__()
        self._buffers = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        self.is_initialized = True

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        begin = self.keys.shape[-2]
        end = begin + key_states.shape[-2]
        keys, values = self._buffers
        # By storage: an empty view has no address. Users of the cache may have replaced or repeated its tensors.
        is_ours = self.keys.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
        if not is_ours or end > keys.shape[-2]:
            return tuple(super().update(key_states, value_states, *args, **kwargs))
        keys[:, :, begin:end] = key_states
        values[:, :, begin:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values


class KVBuffer:
    """Room for the keys and values of some segments, one after the other, and a `Cache` over it.

    Shapes are `[num_layers, 1, num_kv_heads, capacity, head_dim]`: one segment is one strided copy for all layers.
    """

    def __init__(self, shape: KVShape, *, capacity: int, device: torch.device | None) -> None:
        size = (shape.num_layers, 1, shape.num_kv_heads, capacity)
        self.keys = torch.empty((*size, shape.key_dim), dtype=shape.dtype, device=device)
        self.values = torch.empty((*size, shape.value_dim), dtype=shape.dtype, device=device)
        self.length = 0

    def append(self, arrays: Arrays) -> None:
        """Copy stored keys and values, `[num_layers, num_kv_heads, T, head_dim]`, behind the others."""
        end = self.length + arrays["keys"].shape[2]
        self.keys[:, 0, :, self.length : end] = arrays["keys"].torch()
        self.values[:, 0, :, self.length : end] = arrays["values"].torch()
        self.length = end

    def cache(self) -> Cache:
        """Return a transformers `Cache` that holds what was appended and appends into the same buffer."""
        cache = DynamicCache()
        cache.layers = [
            _PreallocatedLayer(keys, values, self.length) for keys, values in zip(self.keys, self.values, strict=True)
        ]
        return cache

    def is_filled_by(self, cache: Cache) -> bool:
        """Whether a pass over `cache` has filled the whole buffer, and kept its keys and values nowhere else."""
        shape = self.keys.shape[1:]
        starts = [(keys.data_ptr(), values.data_ptr()) for keys, values in zip(self.keys, self.values, strict=True)]
        layers = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        return layers == starts and all(layer.keys.shape == shape for layer in cache.layers)

    def slice(self, begin: int, end: int) -> Arrays:
        """Return a copy of the keys and values of tokens `begin` to `end`, as they are stored."""
        return {
            "keys": Array.from_torch(self.keys[:, 0, :, begin:end].contiguous()),
            "values": Array.from_torch(self.values[:, 0, :, begin:end].contiguous()),
        }


def assemble(shape: KVShape, parts: Sequence[Arrays], *, capacity: int, device: torch.device | None) -> KVBuffer:
    """Return a buffer of `capacity` tokens that begins with the keys and values of `parts`."""
    buffer = KVBuffer(shape, capacity=capacity, device=device)
    for arrays in parts:
        buffer.append(arrays)
    return buffer


def shape_of(cache: Any, *, num_tokens: int) -> KVShape | str:
    """Return the shape of the keys and values in a cache that a model filled, or why it has no single one."""
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
