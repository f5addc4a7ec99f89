"""The trees of an LMDB file, looked at before LMDB walks them: it trusts pages, and a damaged one kills the process.

A check of the whole file takes seconds. Here a page is checked when LMDB is about to visit it: a read and a `put` visit
the pages on the way to a name, and deleting may join those with the ones beside them.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from backprompt_db.store.lmdb_file import CheckedFile, Place
from backprompt_db.store.lmdb_meta import NO_PAGE, Meta, Tree
from backprompt_db.store.lmdb_nodes import Page, Value


class CheckedTree:
    """One of the two trees of a file as a transaction sees it when it begins.

    What the transaction then writes is sound, and is not looked at.
    """

    def __init__(
        self, file: CheckedFile, meta: Meta, tree: Tree, *, are_names_numbers: bool = False, free: Container[int] = ()
    ) -> None:
        """Make the tree of a state of the file; none of its pages may be one that is `free`."""
        self.meta = meta
        self._file, self._tree = file, tree
        self._are_names_numbers, self._free = are_names_numbers, free
        self._top: Place | None = None

    def find(self, name: bytes) -> memoryview | Value | None:
        """Return the value of a name, or, if it has pages of its own, where it is: LMDB can read it.

        None where there is none. Raises `StoreCorrupt` for damage on the way.
        """
        place = self._root()
        if place is None:
            return None
        number = place.page.number
        while place.num_below > 2:
            place = self._below(place, place.page.index_below(name))
        if place.num_below:
            number = place.page.below[place.page.index_below(name)]
        if place.num_below > 1:
            number = self._file.below(number, name, self.meta)
        return self._file.find(number, name, self.meta)

    def check(self, name: bytes) -> None:
        """Raise `StoreCorrupt` unless LMDB can go to a name, read its value and put one there."""
        place = self._root()
        while place is not None and place.page.below:
            place = self._below(place, place.page.index_below(name))
        value = None if place is None else place.page.find(name)
        if value is not None:
            self._check_value(value)

    def check_around(self, name: bytes) -> None:
        """Raise `StoreCorrupt` unless LMDB can delete a name.

        It joins a page that has become too empty with one beside it, and goes to the first name below each of them.
        """
        self.check(name)
        before, place, after = None, self._root(), None
        while place is not None and place.page.below:
            index = place.page.index_below(name)
            before = self._before(before, place, index)
            after = self._after(place, after, index)
            place = self._below(place, index)
            for beside in (before, place, after):
                self._check_first(beside)

    def names(self, after: bytes = b"") -> Iterator[bytes]:
        """Yield all names behind one, ascending. Their values are not looked at."""
        for leaf in self.leaves(after):
            yield from (name for name in leaf.names if name > after)

    def leaves(self, after: bytes = b"") -> Iterator[Page]:
        """Yield the leaves, from that on in which a name belongs."""
        root = self._root()
        if root is not None:
            yield from self._leaves(root, after)

    def _root(self) -> Place | None:
        if self._top is None and self._tree.root != NO_PAGE:
            self._top = self._place(self._tree.root, self._tree.depth - 1, (b"", None))
        return self._top

    def _below(self, place: Place, index: int) -> Place:
        names, (low, high) = place.page.names, place.between
        if index:
            low = names[index]
        if index + 1 < len(names):
            high = names[index + 1]
        return self._place(place.page.below[index], place.num_below - 1, (low, high))

    def _before(self, before: Place | None, place: Place, index: int) -> Place | None:
        """Return what is before a page below `place`, which may be the last below the page before `place`."""
        if index:
            return self._below(place, index - 1)
        return None if before is None else self._below(before, len(before.page.below) - 1)

    def _after(self, place: Place, after: Place | None, index: int) -> Place | None:
        if index + 1 < len(place.page.below):
            return self._below(place, index + 1)
        return None if after is None else self._below(after, 0)

    def _check_first(self, place: Place | None) -> None:
        """Look at all pages on the way to the first name below a page."""
        while place is not None and place.page.below:
            place = self._below(place, 0)

    def _leaves(self, place: Place, after: bytes) -> Iterator[Page]:
        if not place.page.below:
            yield place.page
            return
        for index in range(place.page.index_below(after), len(place.page.below)):
            yield from self._leaves(self._below(place, index), after)

    def _place(self, number: int, num_below: int, between: tuple[bytes, bytes | None]) -> Place:
        self._require_not_free(number)
        return self._file.place(
            number, self.meta, between, num_below=num_below, are_names_numbers=self._are_names_numbers
        )

    def _check_value(self, value: Value) -> None:
        self._file.check_value(value, self.meta)
        if value.number is not None:
            self._require_not_free(value.number)

    def _require_not_free(self, number: int) -> None:
        if number in self._free:
            raise self._file.damaged(f"page {number} is in use and free")
