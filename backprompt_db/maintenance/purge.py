"""Purging: texts, and everything that was computed from them, leave a database for good."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backprompt_db.errors import PromptError
from backprompt_db.keys import Address
from backprompt_db.maintenance.annotation import writable_catalog
from backprompt_db.maintenance.existing import CATALOG
from backprompt_db.representation import Part
from backprompt_db.store.contract import Key

if TYPE_CHECKING:
    from backprompt_db.catalog import Selection
    from backprompt_db.database import Database

_ADDRESSES_PER_TRANSACTION = 300


@dataclass(frozen=True, slots=True)
class Purged:
    """What is gone."""

    num_representations: int
    num_parts: int


def doomed(db: Database, selection: Selection) -> list[Address]:
    """Return the addresses of what is selected and of all that follows it: those hold the text too, in other forms.

    Raises `PromptError` for a selection of nothing or of everything, `CatalogError` without a catalog to go by.
    """
    catalog = writable_catalog(db)
    if selection.is_everything:
        raise PromptError("nothing says what to purge", hint="Select it; to purge everything, delete the directory.")
    db.flush()
    db.collector.catch_up()
    segments = {row.segment_id for row in catalog.select(selection)}
    if not segments:
        raise PromptError("nothing is selected", hint="See what there is with `backprompt-db ls`.")
    chosen = {row.address for row in catalog.select(selection)}
    return sorted(chosen | {row.address for row in catalog.of_segments(catalog.descendants(segments))})


def purge(db: Database, addresses: Iterable[Address]) -> Purged:
    """Remove representations, pinned or not, and every trace of them from the files of the database.

    The store is compacted and the catalog is rewritten, so that deleted pages do not keep anything, and catalogs that
    a reindexing has moved aside are deleted. Killed in between, it can be repeated: rows go last. Raises `StoreFull`
    without room for a copy of what stays, and `StoreLocked` when others have been writing for too long.
    """
    catalog = writable_catalog(db)
    gone = list(addresses)
    db.memory.clear()
    num_parts = sum(_delete(db, some) for some in _chunks(gone))
    db.store.compact()
    for some in _chunks(gone):
        catalog.erase([(address, part) for address in some for part in Part])
    catalog.vacuum()
    _delete_damaged_catalogs(db)
    return Purged(len(gone), num_parts)


def _delete(db: Database, addresses: list[Address]) -> int:
    with db.collector.pending.nobody_writing():
        return db.store.delete(Key(address, part) for address in addresses for part in Part)


def _chunks(addresses: list[Address]) -> Iterator[list[Address]]:
    remaining = iter(addresses)
    while some := list(itertools.islice(remaining, _ADDRESSES_PER_TRANSACTION)):
        yield some


def _delete_damaged_catalogs(db: Database) -> None:
    if db.directory is not None:
        for path in db.directory.glob(f"{CATALOG}.damaged-*"):
            path.unlink(missing_ok=True)
