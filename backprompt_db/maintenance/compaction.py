"""Compacting: giving the room of what was removed back to the filesystem."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backprompt_db.errors import StoreReadOnly

if TYPE_CHECKING:
    from backprompt_db.database import Database


def compact(db: Database) -> tuple[int, int]:
    """Rewrite the store without free pages, beside readers and writers; return the file's bytes before and after.

    The catalog is rewritten too, best effort. Raises `StoreFull` without room for a second copy, `StoreReadOnly` where
    nothing may be written.
    """
    if db.readonly:
        raise StoreReadOnly(f"{db.directory} may only be read", hint="Do it as a user who may write to it.")
    before = db.store.usage().file_nbytes
    db.store.compact()
    if db.catalog is not None:
        db.catalog.vacuum()
    return before, db.store.usage().file_nbytes
