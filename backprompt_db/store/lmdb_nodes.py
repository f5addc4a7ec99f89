"""A page of one of LMDB's trees, read with distrust: its form is checked as a whole before anything in it is followed.

    page = header (16 bytes) | u16 position of each node, in the order of names | free space | nodes
    header = u64 own number | u16 unused | u16 flags | u16 end of the positions | u16 begin of the nodes
    node = u16, u16, u16 | u16 length of the name | name | content

In a branch, the first three are the number of the page below, and the first node's name means nothing. In a leaf, they
are the length of the value (two halves) and flags; the content is the value, or the u64 number of the first of the
pages that hold it. Those begin with a header too, in which the last two are one u32: how many they are. Nodes lie
without gaps, and each takes an even number of bytes. The machine's byte order holds.
"""

from __future__ import annotations

import itertools
import operator
import struct
import sys
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import NamedTuple

HEADER_NBYTES = 16
_HEADER = struct.Struct("=Q2xHHH")
_RUN_HEADER = struct.Struct("=Q2xHI")
_NODE = struct.Struct("=HHHH")
_NUMBER = struct.Struct("=Q")
_BRANCH, _LEAF, _RUN = 0x01, 0x02, 0x04
"""Kinds of pages: of a tree, and those of values that have pages of their own."""
_ELSEWHERE = 0x01
"""The only flag that a node of ours may have: its value has pages of its own."""


class Value(NamedTuple):
    """Where a value is."""

    nbytes: int
    begin: int
    end: int
    """In its leaf, unless it is elsewhere: then the number of its first page is there."""
    number: int | None
    """The first of the pages that hold it and nothing else."""


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a tree, whose form is right."""

    number: int
    content: bytes
    names: list[bytes]
    """Ascending. The first one of a branch is empty."""
    below: list[int]
    """The pages below, one for each name; empty for a leaf."""
    values: list[Value]
    """One for each name; empty for a branch."""

    def index_below(self, name: bytes) -> int:
        """Return which of the pages below a name belongs in."""
        return bisect_right(self.names, name, lo=1) - 1

    def find(self, name: bytes) -> Value | None:
        """Return where the value of a name in this leaf is; None where it has no such name."""
        index = bisect_left(self.names, name)
        return self.values[index] if index < len(self.names) and self.names[index] == name else None

    def is_within(self, low: bytes, high: bytes | None) -> bool:
        """Whether all names are at least `low` and, unless it is None, below `high`."""
        names = self.names[1:] if self.below else self.names
        return not names or (low <= names[0] and (high is None or names[-1] < high))


def parse_page(content: bytes, number: int, *, are_names_numbers: bool) -> Page:
    """Return what is in a page of a tree. Raises `ValueError` with what is wrong with its form.

    Names that are numbers, as those of the tree of free pages, are made such that they ascend as bytes too.
    """
    is_leaf, begin, positions = _positions(content, number)
    nodes = [_node(content, position, number) for position in positions]
    names = [content[node.name_begin : node.begin] for node in nodes]
    below, values = list[int](), list[Value]()
    if is_leaf:
        values = [_value(content, node, number) for node in nodes]
        nums_bytes = [value.end - position for value, position in zip(values, positions, strict=True)]
    else:
        below = [node.below for node in nodes]
        nums_bytes = [node.begin - position for node, position in zip(nodes, positions, strict=True)]
        names[0] = b""
    _require_no_gaps(begin, len(content), positions, nums_bytes, number)
    if are_names_numbers:
        names = [_ascending(name, number) if name else name for name in names]
    if (is_leaf and not names[0]) or not all(itertools.starmap(operator.lt, itertools.pairwise(names))):
        raise ValueError(f"the names in page {number} do not ascend")
    return Page(number, content, names, below, values)


def run_flaw(header: bytes, value: Value, page_nbytes: int) -> str | None:
    """Return what is wrong with the header of the pages that hold a value; None if nothing is."""
    if len(header) < HEADER_NBYTES:
        return f"page {value.number} is not there"
    own, flags, num_pages = _RUN_HEADER.unpack(header)
    is_right = (own, flags, num_pages) == (value.number, _RUN, num_run_pages(value, page_nbytes))
    return None if is_right else f"page {value.number} is not the first one of a value of {value.nbytes} bytes"


def num_run_pages(value: Value, page_nbytes: int) -> int:
    """Return how many pages of its own a value takes."""
    return -(-(HEADER_NBYTES + value.nbytes) // page_nbytes)


def _positions(content: bytes, number: int) -> tuple[bool, int, tuple[int, ...]]:
    """Return whether a page is a leaf, where its nodes begin, and where each of them is."""
    if len(content) < HEADER_NBYTES:
        raise ValueError(f"page {number} is not there")
    own, flags, end, begin = _HEADER.unpack_from(content)
    if own != number or flags not in (_BRANCH, _LEAF):
        raise ValueError(f"page {number} is not a page of a tree")
    if end % 2 or not HEADER_NBYTES < end <= begin <= len(content):
        raise _outside(number)
    return flags == _LEAF, begin, struct.unpack_from(f"={(end - HEADER_NBYTES) // 2}H", content, HEADER_NBYTES)


class _Node(NamedTuple):
    """The beginning of a node; `low`, `middle` and `high` mean what the kind of its page says."""

    low: int
    middle: int
    high: int
    name_begin: int
    begin: int
    """Where the content begins, behind the name."""

    @property
    def below(self) -> int:
        return self.low | self.middle << 16 | self.high << 32


def _node(content: bytes, position: int, number: int) -> _Node:
    name_begin = position + _NODE.size
    if name_begin > len(content):
        raise _outside(number)
    low, middle, high, name_nbytes = _NODE.unpack_from(content, position)
    return _Node(low, middle, high, name_begin, name_begin + name_nbytes)


def _value(content: bytes, node: _Node, number: int) -> Value:
    nbytes = node.low | node.middle << 16
    if not node.high:
        return Value(nbytes, node.begin, node.begin + nbytes, None)
    if node.high != _ELSEWHERE:
        raise ValueError(f"page {number} has a node of a kind that is never written")
    end = node.begin + _NUMBER.size
    if end > len(content):
        raise _outside(number)
    return Value(nbytes, node.begin, end, _NUMBER.unpack_from(content, node.begin)[0])


def _outside(number: int) -> ValueError:
    return ValueError(f"page {number} has its nodes outside itself")


def _require_no_gaps(begin: int, end: int, positions: tuple[int, ...], nums_bytes: list[int], number: int) -> None:
    """Raise `ValueError` unless the nodes fill the page from where they begin to its end."""
    for position, nbytes in sorted(zip(positions, nums_bytes, strict=True)):
        if position != begin:
            break
        begin += nbytes + nbytes % 2
    else:
        if begin == end:
            return
    raise ValueError(f"the nodes of page {number} overlap or have gaps")


def _ascending(name: bytes, number: int) -> bytes:
    if len(name) != _NUMBER.size:
        raise ValueError(f"page {number} has a name that is no number")
    return name[::-1] if sys.byteorder == "little" else name
