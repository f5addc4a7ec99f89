"""Pinning texts: all parts of all their segments are there, and stay there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from backprompt_db.maintenance.annotation import writable_catalog
from backprompt_db.representation import Part

if TYPE_CHECKING:
    from backprompt_db.compute.engine import Engine
    from backprompt_db.database import Database
    from backprompt_db.text import Segment


def pin(engine: Engine, db: Database, segments: Sequence[Segment], *, label: str | None) -> None:
    """Compute what is missing of segments, pin them, and label them if there is a label.

    Raises `StoreReadOnly` and `CatalogError` where nothing can be pinned, and what `Database.flush` raises.
    """
    catalog = writable_catalog(db)
    names = engine.names()
    engine.represent(dict.fromkeys(segments, frozenset(Part)), keep={}, names=names)
    db.flush()
    addresses = [names.address(segment) for segment in segments]
    catalog.pin(addresses)
    if label is not None:
        catalog.label(addresses, label)


def unpin(engine: Engine, db: Database, segments: Sequence[Segment]) -> None:
    """Let segments be evicted again. Raises `StoreReadOnly` and `CatalogError` where nothing can be set."""
    names = engine.names()
    writable_catalog(db).pin([names.address(segment) for segment in segments], is_pinned=False)
