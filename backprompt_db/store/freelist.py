"""Which pages of an LMDB file are free: its tree of free pages, whose values are lists of page numbers.

    page: u64 number, u16 pad, u16 flags, u16 lower, u16 upper | u16 offsets of its nodes, up to `lower` | nodes
    node: u16 low, u16 high, u16 flags, u16 key length | key | value, or the u64 number of the page that it begins on

Of a branch page's node, low, high and flags are the number of a page below it; of a leaf page's, the value's length.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

NO_PAGE = 2**64 - 1
"""The root of an empty tree."""

_HEADER = struct.Struct("=QHHHH")
_NODE = struct.Struct("=HHHH")
_BRANCH, _ELSEWHERE = 0x01, 0x01
"""Flags: of a page, that it is a branch; of a node, that its value has pages of its own."""


def free_pages(data: Path, *, root: int, page_nbytes: int) -> Iterator[int]:
    """Yield the numbers of the free pages of a file whose pages were checked."""
    below = [] if root == NO_PAGE else [root]
    with data.open("rb") as file:
        while below:
            page = _read(file, below.pop() * page_nbytes, page_nbytes)
            _, _, flags, lower, _ = _HEADER.unpack_from(page)
            nodes = struct.unpack_from(f"={(lower - _HEADER.size) // 2}H", page, _HEADER.size)
            if flags & _BRANCH:
                below += [_child(page, node) for node in nodes]
            else:
                for node in nodes:
                    yield from _numbers(_value(file, page, node, page_nbytes))


def _child(page: bytes, node: int) -> int:
    low, middle, high, _ = _NODE.unpack_from(page, node)
    return int(low | middle << 16 | high << 32)


def _value(file: BinaryIO, page: bytes, node: int, page_nbytes: int) -> bytes:
    low, high, flags, key_nbytes = _NODE.unpack_from(page, node)
    nbytes, begin = low | high << 16, node + _NODE.size + key_nbytes
    if flags & _ELSEWHERE:
        (number,) = struct.unpack_from("=Q", page, begin)
        return _read(file, number * page_nbytes + _HEADER.size, nbytes)
    return page[begin : begin + nbytes]


def _numbers(value: bytes) -> tuple[int, ...]:
    """Return the list in a value, which begins with its length."""
    return struct.unpack(f"={len(value) // 8}Q", value)[1:]


def _read(file: BinaryIO, position: int, nbytes: int) -> bytes:
    file.seek(position)
    return file.read(nbytes)
