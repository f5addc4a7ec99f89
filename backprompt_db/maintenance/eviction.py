"""Evicting: what would go to make room, and letting it go."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from backprompt_db.collector import Collection
from backprompt_db.maintenance.annotation import writable_catalog

if TYPE_CHECKING:
    from backprompt_db.catalog import Selection, Victim
    from backprompt_db.database import Database

_VICTIMS_PER_CHOICE = 100_000


def victims(db: Database, *, to_nbytes: int | None, selection: Selection) -> Sequence[Victim]:
    """Return what `evict` would remove now, in order, and why. Nothing is removed.

    Sizes are those of the parts; what is given back to be used again may be a little more or less. Raises the same
    errors as `evict`.
    """
    catalog = writable_catalog(db)
    db.flush()
    db.collector.catch_up()
    config = db.collector.limits.config
    goal = _goal_nbytes(db, to_nbytes, selection)
    excess = 0 if goal is None else max(0, db.store.usage().live_nbytes - goal)
    return catalog.rehearse(
        excess,
        at=time.time(),
        grace_seconds=config.grace_seconds,
        ttl_seconds=config.ttl_seconds,
        selection=selection,
        limit=_VICTIMS_PER_CHOICE,
    )


def evict(db: Database, *, to_nbytes: int | None, selection: Selection) -> Collection:
    """Remove what is expired, then the least valuable of what is selected until no more than `to_nbytes` are live.

    Without `to_nbytes`, all that is selected goes, and without a selection what is above the low water mark. Pinned
    representations stay, and keys and values on which others build.

    Raises `StoreReadOnly` where nothing may be removed, `StoreLocked` when another process has been collecting for too
    long, `PromptError` for a selection that means nothing, `CatalogError` without a catalog to go by.
    """
    writable_catalog(db)
    db.flush()
    return db.collector.collect(to_nbytes=_goal_nbytes(db, to_nbytes, selection), selection=selection)


def _goal_nbytes(db: Database, to_nbytes: int | None, selection: Selection) -> int | None:
    if to_nbytes is not None:
        return to_nbytes
    return db.collector.low_live_nbytes if selection.is_everything else 0
