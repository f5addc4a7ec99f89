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

import operator
import struct
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

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
    """All bytes of a leaf; nothing of a branch."""
    names: list[bytes]
    """Ascending. The first one of a branch is empty."""
    below: Sequence[int]
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
        first = 1 if self.below else 0
        return len(self.names) == first or (low <= self.names[first] and (high is None or self.names[-1] < high))


def parse_page(content: bytes, number: int, *, are_names_numbers: bool) -> Page:
    """Return what is in a page of a tree. Raises `ValueError` with what is wrong with its form.

    Names that are numbers, as those of the tree of free pages, are made such that they ascend as bytes too.
    """
    is_leaf, begin, positions = _layout(content, number)
    try:
        page, spans = (_leaf if is_leaf else _branch)(content, number, positions)
    except struct.error:
        raise _outside(number) from None
    _require_no_gaps(begin, len(content), spans, number)
    names = page.names
    if are_names_numbers:
        names[:] = [_ascending(name, number) if name else name for name in names]
    if (is_leaf and not names[0]) or not all(map(operator.lt, names, names[1:])):
        raise ValueError(f"the names in page {number} do not ascend")
    return page


def find_value(content: bytes, number: int, name: bytes) -> Value | None:
    """Return where the value of a name is in a leaf; None where there is none.

    This and `find_below` are for those who only read: they look at just what LMDB looks at on its way, in a tenth of
    the time of `parse_page`. They raise `ValueError` where that is wrong.
    """
    positions = _positions(content, number, is_leaf=True)
    index, is_found = _search(content, number, positions, name, first=0)
    if not is_found:
        return None
    low, high, flags, _ = _NODE.unpack_from(content, positions[index])
    try:
        value = _value(content, positions[index] + _NODE.size + len(name), low | high << 16, flags)
    except struct.error:
        raise _outside(number) from None
    if value.end > len(content):
        raise _outside(number)
    return value


def find_below(content: bytes, number: int, name: bytes) -> int:
    """Return the page below a branch in which a name belongs."""
    positions = _positions(content, number, is_leaf=False)
    index, is_found = _search(content, number, positions, name, first=1)
    try:
        low, middle, high, _ = _NODE.unpack_from(content, positions[index if is_found else index - 1])
    except struct.error:
        raise _outside(number) from None
    return int(low | middle << 16 | high << 32)


def _positions(content: bytes, number: int, *, is_leaf: bool) -> tuple[int, ...]:
    """Return where the nodes of a leaf, or of a branch, are."""
    is_of_leaf, _, positions = _layout(content, number)
    if is_of_leaf != is_leaf:
        raise ValueError(f"page {number} belongs elsewhere in the tree")
    return positions


def _search(content: bytes, number: int, positions: tuple[int, ...], name: bytes, *, first: int) -> tuple[int, bool]:
    """Return where a name is among the nodes, or would be, and whether it is there: by the same steps as LMDB."""
    last = len(positions) - 1
    while first <= last:
        middle = (first + last) >> 1
        begin = positions[middle] + _NODE.size
        end = begin + int.from_bytes(content[begin - 2 : begin], sys.byteorder)
        if end > len(content):
            raise _outside(number)
        found = content[begin:end]
        if found == name:
            return middle, True
        if found < name:
            first = middle + 1
        else:
            last = middle - 1
    return first, False


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


def _layout(content: bytes, number: int) -> tuple[bool, int, tuple[int, ...]]:
    """Return whether a page is a leaf, where its nodes begin, and where each of them is."""
    if len(content) < HEADER_NBYTES:
        raise ValueError(f"page {number} is not there")
    own, flags, end, begin = _HEADER.unpack_from(content)
    if own != number or flags not in (_BRANCH, _LEAF):
        raise ValueError(f"page {number} is not a page of a tree")
    if end % 2 or not HEADER_NBYTES < end <= begin <= len(content):
        raise _outside(number)
    return flags == _LEAF, begin, struct.unpack_from(f"={(end - HEADER_NBYTES) // 2}H", content, HEADER_NBYTES)


_Span: TypeAlias = tuple[int, int]
"""Where a node begins and ends."""


def _branch(content: bytes, number: int, positions: Sequence[int]) -> tuple[Page, list[_Span]]:
    names: list[bytes] = []  # `list[bytes]()` takes microseconds, and this is on the way of every read
    spans: list[_Span] = []
    below = array("Q")
    for position in positions:
        low, middle, high, name_nbytes = _NODE.unpack_from(content, position)
        end = position + _NODE.size + name_nbytes
        names.append(content[position + _NODE.size : end])
        below.append(low | middle << 16 | high << 32)
        spans.append((position, end))
    names[0] = b""
    return Page(number, b"", names, below, []), spans


def _leaf(content: bytes, number: int, positions: Sequence[int]) -> tuple[Page, list[_Span]]:
    names: list[bytes] = []
    values: list[Value] = []
    spans: list[_Span] = []
    for position in positions:
        low, high, flags, name_nbytes = _NODE.unpack_from(content, position)
        begin = position + _NODE.size + name_nbytes
        names.append(content[position + _NODE.size : begin])
        value = _value(content, begin, low | high << 16, flags)
        values.append(value)
        spans.append((position, value.end))
    return Page(number, content, names, (), values), spans


def _value(content: bytes, begin: int, nbytes: int, flags: int) -> Value:
    if not flags:
        return Value(nbytes, begin, begin + nbytes, None)
    if flags != _ELSEWHERE:
        raise ValueError("a node is of a kind that is never written")
    return Value(nbytes, begin, begin + _NUMBER.size, _NUMBER.unpack_from(content, begin)[0])


def _outside(number: int) -> ValueError:
    return ValueError(f"page {number} has its nodes outside itself")


def _require_no_gaps(begin: int, end: int, spans: list[_Span], number: int) -> None:
    """Raise `ValueError` unless the nodes fill the page from where they begin to its end."""
    for node_begin, node_end in sorted(spans):
        if node_begin != begin:
            break
        begin = node_end + (node_end - node_begin) % 2
    else:
        if begin == end:
            return
    raise ValueError(f"the nodes of page {number} overlap or have gaps")


def _ascending(name: bytes, number: int) -> bytes:
    if len(name) != _NUMBER.size:
        raise ValueError(f"page {number} has a name that is no number")
    return name[::-1] if sys.byteorder == "little" else name
