"""Keys and values in memory that passes share: a pass takes the buffer that begins like its context, and extends it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backprompt_db.compute.kvcache import KVBuffer, KVShape
from backprompt_db.keys import Address
from backprompt_db.tier import MemoryTier

_HEADROOM = 64


def take_prefix(
    memory: MemoryTier, shape: KVShape, contents: Sequence[tuple[Address, int]], *, room: int, device: torch.device
) -> KVBuffer:
    """Return a buffer that begins with as much of `contents` as any in memory, with room for all and `room` tokens.

    `contents` are addresses with numbers of tokens, in order. The buffer belongs to the caller until `put_prefix`. Of
    what another prefix had behind the common beginning nothing is kept: reading it again costs no more than copying.
    """

    def num_shared(buffer: KVBuffer) -> int:
        return buffer.num_shared(contents) if (buffer.shape, buffer.device) == (shape, device) else 0

    capacity = sum(num_tokens for _, num_tokens in contents) + room
    buffer = memory.take_best(KVBuffer, num_shared)
    if buffer is None:
        return KVBuffer(shape, capacity=_with_headroom(capacity), device=device)
    buffer.truncate(buffer.num_shared(contents))
    return buffer if buffer.capacity >= capacity else buffer.grown(_with_headroom(capacity))


def put_prefix(memory: MemoryTier, buffer: KVBuffer) -> None:
    """Leave a buffer in memory for others to take."""
    memory.put(object(), buffer, nbytes=buffer.nbytes)


def _with_headroom(capacity: int) -> int:
    """A little more than is needed: the next pass may be longer, and a growing chat shall not move each time."""
    return capacity + capacity // 8 + _HEADROOM
