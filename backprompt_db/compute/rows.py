"""A cache of several prompts side by side, as `generate` takes it: a row for each, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache

from backprompt_db.compute.kvcache import KVBuffer, KVShape, assemble
from backprompt_db.representation import Array, Arrays


def cache_of_rows(
    shape: KVShape,
    rows: Sequence[Sequence[Arrays]],
    *,
    padding: Sequence[int],
    copies: int,
    capacity: int,
    device: torch.device,
) -> Cache:
    """Return a cache of the keys and values of each row's parts, behind `padding` zeros, and `copies` of each row.

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
            room[:, own, :, :begin] = 0  # masked, but not even a masked NaN may be there
            room[:, own, :, begin : whole.length] = filled
    return whole.cache()


def slice_row(cache: Cache, row: int, begin: int, end: int) -> Arrays:
    """Return a copy of the keys and values of tokens `begin` to `end` of a row, as they are stored."""
    return {
        "keys": Array.from_torch(torch.stack([layer.keys[row, :, begin:end] for layer in cache.layers])),
        "values": Array.from_torch(torch.stack([layer.values[row, :, begin:end] for layer in cache.layers])),
    }
