"""Keys and values in memory that passes share: a pass takes the buffer that begins like its context, and extends it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backprompt_db.compute.kvcache import KVBuffer, KVShape
from backprompt_db.keys import Address
from backprompt_db.tier import MemoryTier

_MIN_NBYTES = 96 << 20
_MIN_TOKENS = 2048
"""Where little is needed, a buffer gets room for so much: the next prompt finds memory that the process has touched
before, where fresh pages cost as much as reading a prefix of that length."""


def take_prefix(
    memory: MemoryTier,
    shape: KVShape,
    contents: Sequence[tuple[Address, int]],
    *,
    room: int,
    longest: int | None,
    device: torch.device,
) -> KVBuffer:
    """Return a buffer that begins with as much of `contents` as any in memory, with room for all and `room` tokens.

    `contents` are addresses with numbers of tokens, in order; `longest` is the number of positions that the model has.
    The buffer belongs to the caller until `put_prefix`.
    """
    capacity = sum(num_tokens for _, num_tokens in contents) + room
    best = memory.take_best((shape, device), lambda buffer: _rank(buffer, contents))
    size = _with_headroom(capacity, shape, longest, memory.budget_nbytes)
    if best is None:
        return KVBuffer(shape, capacity=size, device=device)
    buffer: KVBuffer = best
    num_shared = buffer.num_shared(contents)
    shared, lost = _rank(buffer, contents)
    if -lost > max(shared, capacity // 8) and memory.room_nbytes >= buffer.nbytes + size * shape.nbytes_per_token:
        # Another prompt's prefix with a common beginning: both stay, and later neither is read again.
        copy = buffer.beginning(num_shared, capacity=size)
        put_prefix(memory, buffer)
        return copy
    if buffer.capacity < capacity:
        return buffer.beginning(num_shared, capacity=size)
    buffer.truncate(num_shared)
    return buffer


def put_prefix(memory: MemoryTier, buffer: KVBuffer) -> None:
    """Leave a buffer in memory for others to take."""
    memory.put(object(), buffer, nbytes=buffer.nbytes, group=(buffer.shape, buffer.device))


def _rank(buffer: KVBuffer, contents: Sequence[tuple[Address, int]]) -> tuple[int, int]:
    """Tokens that a buffer has in common with `contents`, and, negative, those that it would lose."""
    shared = sum(num_tokens for _, num_tokens in contents[: buffer.num_shared(contents)])
    return shared, shared - sum(num_tokens for _, num_tokens in buffer.contents)


def _with_headroom(capacity: int, shape: KVShape, longest: int | None, budget_nbytes: int) -> int:
    """A little more than is needed: a growing chat shall not move each time; and not too little to be reused."""
    most_nbytes = min(_MIN_NBYTES, budget_nbytes // 8)
    least = min(_MIN_TOKENS, longest or _MIN_TOKENS, most_nbytes // shape.nbytes_per_token)
    size = capacity + capacity // 8 + 64
    return size if 4 * size > least else least
