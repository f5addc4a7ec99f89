"""The two meta pages of an LMDB file, read without LMDB, and what a copy needs that replaces a file.

The layout of a meta page:

    page header (16 bytes) | u32 magic, version | u64 address, map size | two trees, of free pages and of records
    | u64 last page | u64 transaction id

A tree is 48 bytes: u32 (of the first tree the page size) | u16 flags | u16 depth | u64 branches, leaves, pages of large
values, entries, root. The machine's byte order holds. The page with the larger transaction id counts; transaction T
writes page T & 1.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from backprompt_db.errors import StoreCorrupt
from backprompt_db.store.lmdb_errors import store_errors
from backprompt_db.system.files import open_regular
from backprompt_db.system.platform import sync

_META = struct.Struct("=16x II 16x IHH32xQ 4xHH24xQQ QQ")
META_NBYTES = _META.size
_BODY_BEGIN = 16
_TRANSACTION_BEGIN = _META.size - 8
_MAGIC = 0xBEEFC0DE
_VERSION = 1

NUM_META_PAGES = 2
NO_PAGE = 2**64 - 1
"""The root of an empty tree."""

_MAX_DEPTH = 32
_ORDERS, _NUMBERS_ASCEND = 0x7F, 0x08
"""Flags of a tree: all that say how its names are ordered, and the one that that of free pages has."""


class Tree(NamedTuple):
    """A tree: how many pages lie on the way to a name, and the first of them."""

    depth: int
    root: int


class Meta(NamedTuple):
    """What a meta page says."""

    page_nbytes: int
    free: Tree
    records: Tree
    num_records: int
    last_page: int
    transaction_id: int


def newest_meta(data: Path) -> Meta | None:
    """Return the meta page that counts; None for a file that has none."""
    with store_errors(data), open_regular(data) as file:
        first = parse_meta(file.read(META_NBYTES))
        if first is None:
            return None
        file.seek(first.page_nbytes)
        second = parse_meta(file.read(META_NBYTES))
    return max((meta for meta in (first, second) if meta), key=lambda meta: meta.transaction_id)


def parse_meta(page: bytes) -> Meta | None:
    """Return what is in a meta page; None for one that no store of ours can have."""
    if len(page) < META_NBYTES:
        return None
    magic, version, page_nbytes, free_flags, *free, flags, depth, num_records, root, last, number = _META.unpack_from(
        page
    )
    meta = Meta(page_nbytes, Tree(*free), Tree(depth, root), num_records, last, number)
    is_lmdb = magic == _MAGIC and version == _VERSION and 512 <= meta.page_nbytes <= 65536
    is_ours = free_flags & _ORDERS == _NUMBERS_ASCEND and not flags & _ORDERS
    return meta if is_lmdb and is_ours and _is_tree(meta.free, last) and _is_tree(meta.records, last) else None


def _is_tree(tree: Tree, last_page: int) -> bool:
    if tree.root == NO_PAGE:
        return not tree.depth
    return 0 < tree.depth <= _MAX_DEPTH and NUM_META_PAGES <= tree.root <= last_page


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


def _read(file: BinaryIO, position: int, nbytes: int) -> bytes:
    file.seek(position)
    return file.read(nbytes)
