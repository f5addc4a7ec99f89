"""The lists of free pages of an LMDB file, checked before LMDB takes pages from them.

A page that is in two lists would be given away twice, and one that is in use would be written over.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from backprompt_db.store.lmdb_file import CheckedFile
from backprompt_db.store.lmdb_meta import NUM_META_PAGES, Meta
from backprompt_db.store.lmdb_nodes import Page
from backprompt_db.store.lmdb_trees import CheckedTree

Numbers: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint64]]

_NUMBER_NBYTES = 8
_NONE = np.empty(0, dtype=np.uint64)


class FreePages:
    """The numbers of pages that are free in one state of a file."""

    def __init__(self, numbers: Numbers) -> None:
        """Make it of numbers that ascend."""
        self._numbers = numbers

    def __contains__(self, number: object) -> bool:
        """Whether a page is free."""
        place = int(np.searchsorted(self._numbers, np.uint64(number)))  # type: ignore[arg-type]
        return place < len(self._numbers) and bool(self._numbers[place] == number)

    def are_all_from(self, first: int, last: int) -> bool:
        """Whether the last page and all before it from the first one on are free."""
        return int(np.sum((self._numbers >= first) & (self._numbers <= last))) == last + 1 - first


class FreeLists:
    """Reads the free pages of a file; lists that have not changed since the last time are not read again."""

    def __init__(self, file: CheckedFile) -> None:
        self._file = file
        self._known = dict[int, tuple[Page, Numbers]]()

    def at(self, meta: Meta) -> FreePages:
        """Return the free pages of a state. Raises `StoreCorrupt` for lists that LMDB must not see."""
        leaves = CheckedTree(self._file, meta, meta.free, are_names_numbers=True).leaves()
        self._known = {leaf.number: (leaf, self._numbers(leaf, meta)) for leaf in leaves}
        numbers = np.sort(np.concatenate([_NONE, *(numbers for _, numbers in self._known.values())]))
        is_twice = len(numbers) > 1 and bool(np.any(numbers[1:] == numbers[:-1]))
        is_outside = len(numbers) > 0 and not NUM_META_PAGES <= numbers[0] <= numbers[-1] <= meta.last_page
        if is_twice or is_outside:
            raise self._file.damaged("a page is free twice, or not there")
        return FreePages(numbers)

    def _numbers(self, leaf: Page, meta: Meta) -> Numbers:
        page, numbers = self._known.get(leaf.number, (None, _NONE))
        if page is leaf:
            return numbers
        lists = [self._list(self._file.value(leaf, value, meta)) for value in leaf.values]
        return np.concatenate(lists)

    def _list(self, value: bytes) -> Numbers:
        """Return the numbers in a list, which begins with how many they are and descends."""
        numbers = np.frombuffer(value, dtype=np.uint64, count=len(value) // _NUMBER_NBYTES)
        if len(value) % _NUMBER_NBYTES or not len(numbers) or numbers[0] != len(numbers) - 1:
            raise self._file.damaged("a list of free pages has another length than it says")
        if np.any(numbers[2:] >= numbers[1:-1]):
            raise self._file.damaged("a list of free pages is not in order")
        return numbers[1:]
