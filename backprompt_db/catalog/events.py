"""What happened to a database, over all processes: counts, events, evictions. Plain functions on a transaction."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Integer, delete, literal_column, select
from sqlalchemy.dialects.sqlite import insert

from backprompt_db.catalog.graph import chunks
from backprompt_db.catalog.records import Event
from backprompt_db.catalog.schema import Count, EventRow, Eviction

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from backprompt_db.prompt.ids import Address

MAX_EVENTS = 1_000
MAX_EVICTIONS = 100_000
"""How many are kept: the newest."""


def count(connection: Connection, increments: Mapping[str, float]) -> None:
    """Add to counts; one that is not there begins at 0."""
    rows = [{"name": name, "value": float(more)} for name, more in increments.items() if more and math.isfinite(more)]
    if rows:
        connection.execute(_COUNT, rows)


_NEW = insert(Count)
_COUNT = _NEW.on_conflict_do_update(index_elements=["name"], set_={"value": Count.value + _NEW.excluded.value})


def counts(connection: Connection) -> dict[str, float]:
    """Return all counts."""
    found = connection.execute(select(Count.name, Count.value).order_by(Count.name))
    return {row.name: row.value for row in found}


def log(connection: Connection, events: Sequence[Event]) -> None:
    """Enter events and forget all but the newest."""
    connection.execute(insert(EventRow), [{**event._asdict(), "detail": _storable(event.detail)} for event in events])
    newest = select(EventRow.id).order_by(EventRow.id.desc()).offset(MAX_EVENTS).limit(1).scalar_subquery()
    connection.execute(delete(EventRow).where(EventRow.id <= newest))


def _storable(detail: str) -> str:
    # A message may name a file whose name is no UTF-8.
    return detail.encode(errors="backslashreplace").decode()


def events(connection: Connection, *, limit: int) -> list[Event]:
    """Return the newest events, the last one first."""
    columns = (EventRow.at, EventRow.kind, EventRow.address, EventRow.detail)
    return [Event(*found) for found in connection.execute(select(*columns).order_by(EventRow.id.desc()).limit(limit))]


def remember_evictions(connection: Connection, addresses: Iterable[Address], *, at: float) -> None:
    """Enter when representations were evicted and forget all but the newest evictions."""
    new = insert(Eviction)
    upsert = new.on_conflict_do_update(index_elements=["address"], set_={"at": new.excluded.at})
    connection.execute(upsert, [{"address": address, "at": at} for address in addresses])
    # By row, not by time: any number of them may have the same one.
    newest_first = select(_ROW_ID).select_from(Eviction).order_by(Eviction.at.desc(), _ROW_ID.desc()).correlate(None)
    connection.execute(delete(Eviction).where(_ROW_ID.in_(newest_first.offset(MAX_EVICTIONS).limit(-1))))


_ROW_ID = literal_column("evictions.rowid", Integer)


def evictions(connection: Connection, addresses: Iterable[Address]) -> dict[Address, float]:
    """Return when something of representations was evicted the last time, as far as that is known."""
    chosen = select(Eviction.address, Eviction.at)
    found = (connection.execute(chosen.where(Eviction.address.in_(some))) for some in chunks(addresses))
    return {row.address: row.at for rows in found for row in rows}


def forget_evictions(connection: Connection, addresses: Iterable[Address]) -> None:
    """Remove every trace of representations: their evictions and the events about them."""
    for some in chunks(addresses):
        connection.execute(delete(Eviction).where(Eviction.address.in_(some)))
        connection.execute(delete(EventRow).where(EventRow.address.in_(some)))
