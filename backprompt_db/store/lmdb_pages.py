"""Pages of an LMDB file, read without LMDB: checks before it maps a file, and what a copy needs that replaces one.

The layout of a meta page, of which there are two:

    page header (16 bytes) | u32 magic, version | u64 address, map size | two trees of 48 bytes, of free pages and of
    records, of which the first begins with the u32 page size and each ends with the u64 number of entries and the u64
    root | u64 last page | u64 transaction id

The machine's byte order holds. The page with the larger transaction id counts; transaction T writes page T & 1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from backprompt_db.errors import StoreCorrupt
from backprompt_db.store.lmdb_errors import store_errors
from backprompt_db.system.files import open_regular
from backprompt_db.system.platform import sync

_META = struct.Struct("=16x II 16x I 36x Q 32x Q 8x QQ".replace(" ", ""))
_BODY_BEGIN = 16
_TRANSACTION_BEGIN = _META.size - 8
_MAGIC = 0xBEEFC0DE
_VERSION = 1
_SMALLEST_PAGE_NBYTES = 4096
"""A meta page lies within this many bytes."""

_RESTORE = "Restore it from a backup, or delete the database directory: it will be computed again."

_MAX_RECORDS, _MAX_PAGES = 5_000, 1 << 16
"""Files up to this size have their pages checked whenever they are opened, which takes 30 ms at most."""


class Meta(NamedTuple):
    """What a meta page says."""

    page_nbytes: int
    free_root: int
    num_records: int
    last_page: int
    transaction_id: int


def newest_meta(data: Path) -> Meta | None:
    """Return the meta page that counts; None for a file that has none."""
    with store_errors(data), open_regular(data) as file:
        first = _parse(file.read(_SMALLEST_PAGE_NBYTES))
        if first is None:
            return None
        file.seek(first.page_nbytes)
        second = _parse(file.read(_SMALLEST_PAGE_NBYTES))
    return max((meta for meta in (first, second) if meta), key=lambda meta: meta.transaction_id)


def check_length(data: Path) -> None:
    """Raise `StoreCorrupt` unless the file holds all pages that its newest meta page counts and that are in use.

    A file may be shorter than it counts and still be whole: a transaction that takes pages at the end and gives them
    back, as deleting does, counts these pages and never writes them.
    """
    meta = newest_meta(data)
    with store_errors(data):
        nbytes = data.stat().st_size
    expected = 0 if meta is None else (meta.last_page + 1) * meta.page_nbytes
    if meta is None or (expected > nbytes and not _are_free(data, meta, nbytes // meta.page_nbytes)):
        raise StoreCorrupt(
            f"{data} is not a whole LMDB file: {nbytes} bytes of {expected}",
            hint=_RESTORE,
        )


def _are_free(data: Path, meta: Meta, first: int) -> bool:
    """Whether all pages from the first one on are free."""
    try:
        check_pages(data, however_many=True)
    except StoreCorrupt:
        return False
    if newest_meta(data) != meta:  # somebody else has the file open, so it was whole
        return True
    with store_errors(data):
        free = free_pages(data, root=meta.free_root, page_nbytes=meta.page_nbytes)
        return set(range(first, meta.last_page + 1)) <= set(free)


def check_pages(data: Path, *, however_many: bool = False) -> None:
    """Raise `StoreCorrupt` for a damaged page of the trees, which LMDB trusts: it may kill the process.

    It reads no values. It skips larger files unless `however_many`: a million records take 5 s. There is no later
    defence: LMDB's binding touches all bytes that a value claims to have before anybody can look at its length.
    """
    meta = newest_meta(data)
    is_small = meta is not None and meta.num_records <= _MAX_RECORDS and meta.last_page <= _MAX_PAGES
    while meta is not None and (is_small or however_many):
        wrong = _wrong_pages(data)
        before, meta = meta, newest_meta(data)
        if wrong and meta == before:  # else somebody has written over the pages meanwhile
            raise StoreCorrupt(f"{data} is damaged: {wrong[0]}", hint=_RESTORE)
        if not wrong:
            return


def _wrong_pages(data: Path) -> list[str]:
    from lmdb.verify import VerifyError, verify

    try:
        with store_errors(data):
            return list(verify(str(data), subdir=False))  # type: ignore[no-untyped-call]
    except VerifyError as error:
        return [str(error)]


def number_transactions(data: Path, transaction_id: int) -> None:
    """Give the newest state of a file the id of a given transaction, and make it the only state. Nobody has it open."""
    meta = newest_meta(data)
    if meta is None:
        raise StoreCorrupt(f"{data} is not an LMDB file", hint="Try again.")
    with data.open("r+b") as file:
        newest = (meta.transaction_id & 1) * meta.page_nbytes
        body = _read(file, newest + _BODY_BEGIN, _TRANSACTION_BEGIN - _BODY_BEGIN)
        for number in (transaction_id, transaction_id - 1):
            file.seek((number & 1) * meta.page_nbytes + _BODY_BEGIN)
            file.write(body + struct.pack("=Q", number))
        file.flush()
        sync(file.fileno())


def _parse(page: bytes) -> Meta | None:
    if len(page) < _SMALLEST_PAGE_NBYTES:
        return None
    magic, version, *rest = _META.unpack_from(page)
    meta = Meta(*rest)
    is_ours = magic == _MAGIC and version == _VERSION and 512 <= meta.page_nbytes <= 65536
    return meta if is_ours else None


NO_PAGE = 2**64 - 1
"""The root of an empty tree."""

_HEADER = struct.Struct("=QHHHH")
_NODE = struct.Struct("=HHHH")
_BRANCH, _ELSEWHERE = 0x01, 0x01
"""Flags: the page is a branch; the node's value has pages of its own."""


def free_pages(data: Path, *, root: int, page_nbytes: int) -> Iterator[int]:
    """Yield the numbers of the free pages of a file whose pages were checked."""
    below = [] if root == NO_PAGE else [root]
    with open_regular(data) as file:
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
    """Return the list in a value; the value begins with the list's length."""
    return struct.unpack(f"={len(value) // 8}Q", value)[1:]


def _read(file: BinaryIO, position: int, nbytes: int) -> bytes:
    file.seek(position)
    return file.read(nbytes)
