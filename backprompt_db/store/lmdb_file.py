"""An LMDB file that is read beside LMDB: single pages, each checked when it is first read.

Pages are read from the file and not from a map, so that one that is not there is an error and no signal.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import xxhash

from backprompt_db.errors import StoreCorrupt
from backprompt_db.store.files import Identity
from backprompt_db.store.lmdb_errors import RESTORE, store_errors
from backprompt_db.store.lmdb_meta import META_NBYTES, NUM_META_PAGES, Meta, parse_meta
from backprompt_db.store.lmdb_nodes import (
    HEADER_NBYTES,
    Page,
    Value,
    find_below,
    find_value,
    num_run_pages,
    parse_page,
    run_flaw,
)
from backprompt_db.system.files import open_regular
from backprompt_db.system.platform import read_at

_CLOSE = (
    "Close every handle of this database, then restore it from a backup. Never copy over a file that is open: "
    "copy beside it, then rename the copy with `mv`."
)

_MAX_BRANCHES, _MAX_LEAVES = 2048, 256
"""How many checked pages are remembered, some 5 KiB each."""


class Place(NamedTuple):
    """A checked page in its place in a tree."""

    page: Page
    num_below: int
    """How many levels lie below it."""
    between: tuple[bytes, bytes | None]
    """Its names are at least the first and, unless it is None, below the second."""
    digest: int
    """Of its bytes."""
    meta: Meta
    """Of the state of the file for which it was read last."""


class CheckedFile:
    """An open LMDB file, and which of its pages were found right. Threads may share it."""

    def __init__(self, data: Path) -> None:
        self.data = data
        with store_errors(data):
            self._file = open_regular(data)
            self._descriptor = self._file.fileno()
            status = os.fstat(self._descriptor)
        self.identity: Identity = status.st_dev, status.st_ino
        self._largest_nbytes = status.st_size
        self._newest: tuple[bytes, Meta] | None = None
        self._branches, self._leaves = _Known(_MAX_BRANCHES), _Known(_MAX_LEAVES)
        first = parse_meta(self.read(0, META_NBYTES))
        if first is None:
            self.close()
            raise self.damaged("it does not begin with a meta page")
        self.page_nbytes = first.page_nbytes

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, position: int, nbytes: int) -> bytes:
        """Return bytes of the file, fewer at its end."""
        try:
            return read_at(self._descriptor, nbytes, position)
        except (OverflowError, OSError) as error:  # a position that no file can have
            raise self.damaged(f"{nbytes} bytes at {position} cannot be read") from error

    def nbytes(self) -> int:
        """Return how long the file is now."""
        return os.lseek(self._descriptor, 0, os.SEEK_END)  # a tenth of the time of fstat

    def require_uncut(self) -> None:
        """Raise `StoreCorrupt` for a file that has become shorter: whoever reads the map behind its end is killed."""
        largest = self._largest_nbytes  # first: another thread may see the file grow meanwhile
        nbytes = self.nbytes()
        if nbytes < largest:
            raise self.overwritten()
        self._largest_nbytes = nbytes

    def meta(self, transaction_id: int) -> Meta:
        """Return the meta page of the state that has this id, or of another one where it was written over."""
        content = self.read((transaction_id & 1) * self.page_nbytes, META_NBYTES)
        newest = self._newest
        if newest is not None and newest[0] == content:
            return newest[1]
        meta = parse_meta(content)
        if meta is None or meta.page_nbytes != self.page_nbytes:
            raise self.damaged("a meta page is none of a store of ours")
        self._newest = content, meta
        return meta

    def place(
        self, number: int, meta: Meta, between: tuple[bytes, bytes | None], *, num_below: int, are_names_numbers: bool
    ) -> Place:
        """Return a page of a tree in its place, in the state of the file that a meta page stands for.

        In one state, a page is read once. Raises `StoreCorrupt` for one that is damaged or belongs elsewhere.
        """
        known = self._branches if num_below else self._leaves
        found = known.get(number)
        if found is not None and found.meta is meta and found.between == between:
            return found
        content = self._content(number, meta)
        digest = xxhash.xxh3_64_intdigest(content)
        if found is not None and found.digest == digest:
            page = found.page
        else:
            page = self._parsed(content, number, are_names_numbers=are_names_numbers)
        if bool(page.below) != bool(num_below) or not page.is_within(*between):
            raise self.damaged(f"page {number} belongs elsewhere in the tree")
        place = Place(page, num_below, between, digest, meta)
        known.add(number, place)
        return place

    def _content(self, number: int, meta: Meta) -> bytes:
        if not NUM_META_PAGES <= number <= meta.last_page:
            raise self.damaged(f"there is no page {number}")
        return self.read(number * self.page_nbytes, self.page_nbytes)

    def _parsed(self, content: bytes, number: int, *, are_names_numbers: bool) -> Page:
        try:
            return parse_page(content, number, are_names_numbers=are_names_numbers)
        except ValueError as error:
            raise self.damaged(str(error)) from None

    def check_value(self, value: Value, meta: Meta) -> None:
        """Raise `StoreCorrupt` unless the pages of a value that has its own are there."""
        if value.number is None:
            return
        last = value.number + num_run_pages(value, self.page_nbytes) - 1
        if not NUM_META_PAGES <= value.number <= last <= meta.last_page:
            raise self.damaged(f"there are no pages {value.number} to {last}")
        if self.nbytes() < (last + 1) * self.page_nbytes:
            raise self.overwritten()
        flaw = run_flaw(self.read(value.number * self.page_nbytes, HEADER_NBYTES), value, self.page_nbytes)
        if flaw is not None:
            raise self.damaged(flaw)

    def below(self, branch: int, name: bytes, meta: Meta) -> int:
        """Return the page below a branch in which a name belongs. The branch is not remembered."""
        try:
            return find_below(self._content(branch, meta), branch, name)
        except ValueError as error:
            raise self.damaged(str(error)) from None

    def find(self, leaf: int, name: bytes, meta: Meta) -> memoryview | Value | None:
        """Return a value that is in a leaf, or where its own pages are, which are there; None where there is none."""
        content = self._content(leaf, meta)
        try:
            value = find_value(content, leaf, name)
        except ValueError as error:
            raise self.damaged(str(error)) from None
        if value is None or value.number is None:
            return value and memoryview(content)[value.begin : value.end]
        self.check_value(value, meta)
        return value

    def value(self, leaf: Page, value: Value, meta: Meta) -> bytes:
        """Return a copy of a value of a leaf."""
        if value.number is None:
            return leaf.content[value.begin : value.end]
        self.check_value(value, meta)
        return self.read(value.number * self.page_nbytes + HEADER_NBYTES, value.nbytes)

    def damaged(self, detail: str) -> StoreCorrupt:
        """Return the error for a file with a page that LMDB must not see."""
        return StoreCorrupt(f"{self.data} is damaged: {detail}", hint=RESTORE)

    def overwritten(self) -> StoreCorrupt:
        """Return the error for a file that somebody else has changed as nobody may."""
        return StoreCorrupt(f"{self.data} was cut off or copied over while it was open", hint=_CLOSE)


class _Known(dict[int, Place]):
    """Checked pages by their numbers."""

    def __init__(self, max_pages: int) -> None:
        self._max_pages = max_pages

    def add(self, number: int, place: Place) -> None:
        if len(self) >= self._max_pages and number not in self:
            self.clear()
        self[number] = place
