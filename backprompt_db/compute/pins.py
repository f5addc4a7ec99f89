"""Pinning texts: all parts of all their segments are there, and stay there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from backprompt_db.errors import StoreError
from backprompt_db.maintenance.annotation import writable_catalog
from backprompt_db.representation import Part
from backprompt_db.store.contract import Key

if TYPE_CHECKING:
    from backprompt_db.compute.engine import Engine
    from backprompt_db.database import Database
    from backprompt_db.text import Segment

_NUM_TRIES = 3
"""How often what was evicted, before it could be pinned, is computed again."""


def pin(engine: Engine, db: Database, segments: Sequence[Segment], *, label: str | None) -> None:
    """Compute what is missing of segments, pin them, and label them if there is a label.

    Raises `StoreReadOnly` and `CatalogError` where nothing can be pinned, what `Database.flush` raises, and
    `StoreError` where others remove it faster than it can be pinned.
    """
    catalog = writable_catalog(db)
    names = engine.names()
    addresses = [names.address(segment) for segment in segments]
    for _ in range(_NUM_TRIES):
        engine.represent(dict.fromkeys(segments, frozenset(Part)), keep={}, names=names)
        db.flush()
        catalog.pin(addresses)
        if all(db.has(Key(address, part)) for address in addresses for part in Part):
            break
    else:
        raise StoreError("not all that was to be pinned could be kept", hint="Look at `backprompt-db stats`.")
    if label is not None:
        catalog.label(addresses, label)


def unpin(engine: Engine, db: Database, segments: Sequence[Segment]) -> None:
    """Let segments be evicted again. Raises `StoreReadOnly` and `CatalogError` where nothing can be set."""
    names = engine.names()
    writable_catalog(db).pin([names.address(segment) for segment in segments], is_pinned=False)
