"""Checks of a whole LMDB file before LMDB maps it, without LMDB: its length, and every page of its trees."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from backprompt_db.errors import StoreCorrupt
from backprompt_db.store.lmdb_errors import RESTORE, store_errors
from backprompt_db.store.lmdb_file import CheckedFile
from backprompt_db.store.lmdb_free import FreeLists
from backprompt_db.store.lmdb_meta import Meta, newest_meta

_MAX_RECORDS, _MAX_PAGES = 5_000, 1 << 16
"""Files up to this size have their pages checked whenever they are opened, which takes 30 ms at most."""


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
        raise StoreCorrupt(f"{data} is not a whole LMDB file: {nbytes} bytes of {expected}", hint=RESTORE)


def _are_free(data: Path, meta: Meta, first: int) -> bool:
    """Whether all pages from the first one on are free."""
    with store_errors(data), closing(CheckedFile(data)) as file:
        try:
            return FreeLists(file).at(meta).are_all_from(first, meta.last_page)
        except StoreCorrupt:
            return newest_meta(data) != meta  # somebody else has the file open, so it was whole


def check_pages(data: Path, *, however_many: bool = False) -> None:
    """Raise `StoreCorrupt` for a damaged page of the trees, which LMDB trusts: it may kill the process.

    It reads no values. It skips larger files unless `however_many`: a million records take 5 s. Of those, a page is
    checked when it is used (`lmdb_trees`).
    """
    meta = newest_meta(data)
    is_small = meta is not None and meta.num_records <= _MAX_RECORDS and meta.last_page <= _MAX_PAGES
    while meta is not None and (is_small or however_many):
        wrong = _wrong_pages(data)
        before, meta = meta, newest_meta(data)
        if wrong and meta == before:  # else somebody has written over the pages meanwhile
            raise StoreCorrupt(f"{data} is damaged: {wrong[0]}", hint=RESTORE)
        if not wrong:
            return


def _wrong_pages(data: Path) -> list[str]:
    from lmdb.verify import VerifyError, verify

    try:
        with store_errors(data):
            return list(verify(str(data), subdir=False))  # type: ignore[no-untyped-call]
    except VerifyError as error:
        return [str(error)]
