"""An LMDB file that is read beside LMDB: single pages, each checked when it is first read.

Pages are read from the file and not from a map, so that one that is not there is an error and no signal.
"""

from __future__ import annotations

import os
from pathlib import Path

from backprompt_db.errors import StoreCorrupt
from backprompt_db.store.files import Identity
from backprompt_db.store.lmdb_errors import store_errors
from backprompt_db.store.lmdb_meta import META_NBYTES, NUM_META_PAGES, Meta, parse_meta
from backprompt_db.store.lmdb_nodes import HEADER_NBYTES, Page, Value, num_run_pages, parse_page, run_flaw
from backprompt_db.system.files import open_regular
from backprompt_db.system.platform import read_at

RESTORE = "Restore it from a backup, or delete the database directory: it will be computed again."
_CLOSE = (
    "Close every handle of this database, then restore it from a backup. Never copy over a file that is open: "
    "copy beside it, then rename the copy with `mv`."
)

_MAX_BRANCHES, _MAX_LEAVES = 4096, 512
"""How many checked pages are remembered, some 10 KiB each. The branches of a million records are 1,500 pages or so."""


class CheckedFile:
    """An open LMDB file, and which of its pages were found right. Threads may share it."""

    def __init__(self, data: Path) -> None:
        self.data = data
        with store_errors(data):
            self._file = open_regular(data)
            status = os.fstat(self._file.fileno())
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
            return read_at(self._file.fileno(), nbytes, position)
        except (OverflowError, OSError) as error:  # a position that no file can have
            raise self.damaged(f"{nbytes} bytes at {position} cannot be read") from error

    def nbytes(self) -> int:
        """Return how long the file is now."""
        return os.fstat(self._file.fileno()).st_size

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

    def page(self, number: int, meta: Meta, *, is_branch: bool, are_names_numbers: bool) -> Page:
        """Return a page of a tree in the state of the file that a meta page stands for, where it is read once."""
        known = self._branches if is_branch else self._leaves
        page, checked_for = known.get(number, (None, None))
        if page is not None and checked_for is meta:
            return page
        content = self._page_content(number, meta)
        if page is None or page.content != content:
            try:
                page = parse_page(content, number, are_names_numbers=are_names_numbers)
            except ValueError as error:
                raise self.damaged(str(error)) from None
            if bool(page.below) != is_branch:
                raise self.damaged(f"page {number} is of another kind than its place in the tree")
        known.add(number, page, meta)
        return page

    def _page_content(self, number: int, meta: Meta) -> bytes:
        if not NUM_META_PAGES <= number <= meta.last_page:
            raise self.damaged(f"there is no page {number}")
        return self.read(number * self.page_nbytes, self.page_nbytes)

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

    def value(self, page: Page, value: Value, meta: Meta) -> bytes:
        """Return a value of a leaf."""
        if value.number is None:
            return page.content[value.begin : value.end]
        self.check_value(value, meta)
        return self.read(value.number * self.page_nbytes + HEADER_NBYTES, value.nbytes)

    def damaged(self, detail: str) -> StoreCorrupt:
        """Return the error for a file with a page that LMDB must not see."""
        return StoreCorrupt(f"{self.data} is damaged: {detail}", hint=RESTORE)

    def overwritten(self) -> StoreCorrupt:
        """Return the error for a file that somebody else has changed as nobody may."""
        return StoreCorrupt(f"{self.data} was cut off or copied over while it was open", hint=_CLOSE)


class _Known(dict[int, tuple[Page, Meta]]):
    """The newest checked pages by their numbers, each with the meta page for which it was looked at last."""

    def __init__(self, max_pages: int) -> None:
        self._max_pages = max_pages

    def add(self, number: int, page: Page, meta: Meta) -> None:
        if len(self) >= self._max_pages and number not in self:
            self.clear()
        self[number] = page, meta
