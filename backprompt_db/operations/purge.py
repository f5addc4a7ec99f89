"""Purging: removing what is selected, and every trace of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backprompt_db.codec.blob import read_origin
from backprompt_db.database.database import writable_catalog
from backprompt_db.database.location import CATALOG
from backprompt_db.database.reconcile import differences
from backprompt_db.errors import PromptError
from backprompt_db.prompt.ids import Address, SegmentId, TokenizerId, WeightsId
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key

if TYPE_CHECKING:
    from backprompt_db.catalog.catalog import Catalog
    from backprompt_db.catalog.records import Selection
    from backprompt_db.database.database import Database

_ADDRESSES_PER_TRANSACTION = 300
_PARTS_PER_TRANSACTION = 1_000


@dataclass(frozen=True, slots=True)
class Purged:
    """How much was removed."""

    num_representations: int
    num_parts: int


def doomed(db: Database, selection: Selection) -> list[Address]:
    """Return the addresses of what is selected, and of all that follows it: that holds the text too, in other forms.

    The tokens of completions are forgotten in any case: nobody can tell whose they are. What the catalog does not list
    is entered first, or it would stay. What only the catalog lists counts too: a purge
    that was killed may have left it. Raises `PromptError` for a selection of nothing or of everything,
    `CatalogError` without a catalog to go by, and `StoreLocked` when others have been writing for too long.
    """
    catalog = writable_catalog(db)
    if selection.is_everything:
        raise PromptError("nothing says what to purge", hint="Select it; to purge everything, delete the directory.")
    db.flush()
    db.evictor.catch_up()
    _enter_unlisted(db, catalog)
    catalog.forget_encodings()
    found = _selected(catalog, selection)
    if not found:
        raise PromptError("nothing is selected", hint="See what there is with `backprompt-db ls`.")
    return sorted(found)


def purge(db: Database, selection: Selection) -> Purged:
    """Remove what is `doomed`, pinned or not, and every trace of it from the files of the database.

    The store is compacted and the catalog is rewritten, so that free pages hold nothing of it, and catalogs that a
    reindexing has moved aside are deleted. After being killed it can be repeated: rows go last. Raises what `doomed`
    raises, `StoreFull` without room for a copy of what stays, and `StoreLocked` when others have been writing for too
    long.
    """
    catalog = writable_catalog(db)
    gone, left, num_parts = set[Address](), set(doomed(db, selection)), 0
    followed = catalog.ancestors({row.segment_id for row in catalog.select(selection)})
    db.memory.clear()
    while left:
        num_parts += sum(_delete(db, some) for some in _chunks(left))
        gone |= left
        left = _selected(catalog, selection) - gone  # what somebody has stored meanwhile
    _forget_continuations(db, catalog, followed)
    db.store.compact()
    for some in _chunks(gone):
        _erase(db, catalog, some)
    catalog.vacuum()
    _delete_damaged_catalogs(db)
    return Purged(len(gone), num_parts)


def _enter_unlisted(db: Database, catalog: Catalog) -> None:
    """Enter what is stored and not listed; unlike a reindexing, forget nothing."""
    from backprompt_db.catalog.records import StoredPart

    unlisted = (found for found in differences(db.store, catalog) if found.is_stored)
    while some := list(itertools.islice(unlisted, _PARTS_PER_TRANSACTION)):
        with db.evictor.journal.nobody_writing():  # and nobody removing what is entered here
            origins = {found: read_origin(db.store, found.key) for found in some}
            parts = [
                StoredPart(*found.key, found.nbytes or 0, origin)
                for found, origin in origins.items()
                if origin is not None
            ]
            catalog.record(parts, at=time.time())


def _selected(catalog: Catalog, selection: Selection) -> set[Address]:
    """Return the addresses of what is selected, and of what follows it under the same model."""
    segments: dict[tuple[WeightsId, TokenizerId], set[SegmentId]] = {}
    for row in catalog.select(selection):
        segments.setdefault((row.weights_id, row.tokenizer_id), set()).add(row.segment_id)
    found = set[Address]()
    for ids, some in segments.items():
        rows = catalog.of_segments(some | catalog.descendants(some))
        found |= {row.address for row in rows if (row.weights_id, row.tokenizer_id) == ids}
    return found


def _delete(db: Database, addresses: list[Address]) -> int:
    with db.evictor.journal.nobody_writing():
        return db.store.delete(_keys(addresses))


def _forget_continuations(db: Database, catalog: Catalog, followed: Iterable[SegmentId]) -> None:
    """Delete what is known of the tokens after segments: some may be those of texts that are purged."""
    keys = [Key(row.address, Part.CONTINUATIONS) for row in catalog.of_segments(followed)]
    with db.evictor.journal.nobody_writing():
        db.store.delete(keys)
        catalog.forget(keys)


def _erase(db: Database, catalog: Catalog, addresses: list[Address]) -> None:
    with db.evictor.journal.nobody_writing():  # what somebody has stored again meanwhile stays listed
        catalog.erase([key for key in _keys(addresses) if not db.store.has(key)])


def _keys(addresses: Iterable[Address]) -> Iterator[Key]:
    return (Key(address, part) for address in addresses for part in Part)


def _chunks(addresses: Iterable[Address]) -> Iterator[list[Address]]:
    remaining = iter(addresses)
    while some := list(itertools.islice(remaining, _ADDRESSES_PER_TRANSACTION)):
        yield some


def _delete_damaged_catalogs(db: Database) -> None:
    if db.directory is not None:
        for path in db.directory.glob(f"{CATALOG}.damaged-*"):
            path.unlink(missing_ok=True)
