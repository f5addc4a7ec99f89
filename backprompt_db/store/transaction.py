"""A transaction of LMDB that looks at every page before LMDB walks it, so that damage is an error and no signal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lmdb

from backprompt_db.store.lmdb_nodes import Value
from backprompt_db.store.lmdb_trees import CheckedTree


class CheckedTransaction:
    """One transaction. Values are views that die with it. Raises `StoreCorrupt` for a page that is damaged."""

    def __init__(self, transaction: lmdb.Transaction[memoryview], tree: CheckedTree, *, is_writing: bool) -> None:
        self._transaction, self._tree, self._is_writing = transaction, tree, is_writing

    @property
    def id(self) -> int:
        """The number of the state that is read, or that is about to be written."""
        return int(self._transaction.id())

    def get(self, name: bytes) -> memoryview | None:
        """Return the value of a name; None where there is none."""
        if self._is_writing:
            self._tree.check(name)
            return self._transaction.get(name)
        found = self._tree.find(name)
        return self._transaction.get(name) if isinstance(found, Value) else found

    def put(self, name: bytes, value: bytes | memoryview, *, overwrite: bool = True) -> bool:
        """Write a value; whether it was written: without `overwrite`, the one that is there stays."""
        self._tree.check(name)
        return self._transaction.put(name, value, overwrite=overwrite)

    def delete(self, name: bytes) -> bool:
        """Remove a name; whether it was there."""
        self._tree.check_around(name)
        return self._transaction.delete(name)

    def names(self, after: bytes = b"") -> Iterator[bytes]:
        """Yield all names behind one, ascending, as they are without what this transaction has written itself."""
        return self._tree.names(after)

    def stat(self) -> Mapping[str, Any]:
        """Return LMDB's counts of what this transaction sees."""
        return self._transaction.stat()
