"""Evicting what is worth least, and giving back the free pages that are left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from backprompt_db.catalog.records import EXPIRED, SELECTED
from backprompt_db.database.database import writable_catalog
from backprompt_db.database.eviction import Eviction
from backprompt_db.errors import StoreReadOnly

if TYPE_CHECKING:
    from backprompt_db.catalog.records import EvictionCandidate, Selection
    from backprompt_db.database.database import Database


def eviction_order(db: Database, *, to_nbytes: int | None, selection: Selection) -> Sequence[EvictionCandidate]:
    """Return what `evict` would remove now, in order, and why. Nothing is removed.

    Where no size is to be reached, what is selected goes because it is selected, whatever it is worth.
    Sizes are those of the parts; the pages that become free may have a little more or less. Raises the same errors as
    `evict`.
    """
    catalog = writable_catalog(db)
    db.flush()
    db.evictor.catch_up()
    config = db.evictor.limits.config
    goal = _goal_nbytes(db, to_nbytes, selection)
    excess = 0 if goal is None else max(0, db.store.usage().live_nbytes - goal)
    candidates = catalog.rehearse(
        excess,
        at=time.time(),
        grace_seconds=config.grace_seconds,
        ttl_seconds=config.ttl_seconds,
        selection=selection,
    )
    is_all_selected = to_nbytes is None and not selection.is_everything
    return [_for_being_selected(candidate) for candidate in candidates] if is_all_selected else candidates


def _for_being_selected(candidate: EvictionCandidate) -> EvictionCandidate:
    return candidate if candidate.reason == EXPIRED else candidate._replace(reason=SELECTED)


def evict(db: Database, *, to_nbytes: int | None, selection: Selection) -> Eviction:
    """Remove what is expired, then the least valuable of what is selected until no more than `to_nbytes` are live.

    Without `to_nbytes`, all that is selected goes, and without a selection what is above the low water mark. Pinned
    representations stay, and keys and values on which others build.

    Raises `StoreReadOnly` where nothing may be removed, `StoreLocked` when another process has been evicting for too
    long, `PromptError` for a selection that means nothing, `CatalogError` without a catalog to go by.
    """
    writable_catalog(db)
    db.flush()
    return db.evictor.evict(to_nbytes=_goal_nbytes(db, to_nbytes, selection), selection=selection)


def _goal_nbytes(db: Database, to_nbytes: int | None, selection: Selection) -> int | None:
    if to_nbytes is not None:
        return to_nbytes
    return db.evictor.low_live_nbytes if selection.is_everything else 0


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
