"""What happened to a database, over all processes: counts, events, evictions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Integer, delete, literal_column, select
from sqlalchemy.dialects.sqlite import insert

from backprompt_db.catalog.connection import CatalogFile
from backprompt_db.catalog.graph import chunks
from backprompt_db.catalog.records import Event
from backprompt_db.catalog.schema import Count, EventRow, Eviction

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from backprompt_db.prompt.ids import Address

MAX_EVENTS = 1_000
"""How many events are kept: the newest."""

MAX_EVICTIONS = 100_000
"""How many evictions are kept: the newest."""


class Events(CatalogFile):
    """The part of a catalog that remembers what happened."""

    def count(self, increments: Mapping[str, float]) -> None:
        """Add to counts that all processes share; one that is not there begins at 0."""
        rows = [
            {"name": name, "value": float(more)} for name, more in increments.items() if more and math.isfinite(more)
        ]
        if rows:
            with self.writing() as connection:
                connection.execute(_COUNT, rows)

    def counts(self) -> dict[str, float]:
        """Return all counts, by name."""
        with self.reading() as connection:
            found = connection.execute(select(Count.name, Count.value).order_by(Count.name))
            return {row.name: row.value for row in found}

    def log(self, new: Sequence[Event]) -> None:
        """Enter events; the newest thousand are kept."""
        if new:
            with self.writing() as connection:
                rows = [{**event._asdict(), "detail": _storable(event.detail)} for event in new]
                connection.execute(insert(EventRow), rows)
                last = select(EventRow.id).order_by(EventRow.id.desc()).offset(MAX_EVENTS).limit(1).scalar_subquery()
                connection.execute(delete(EventRow).where(EventRow.id <= last))

    def events(self, *, limit: int = 20) -> list[Event]:
        """Return the newest events, the last one first."""
        newest = select(EventRow.at, EventRow.kind, EventRow.address, EventRow.detail).order_by(EventRow.id.desc())
        with self.reading() as connection:
            return [Event(*found) for found in connection.execute(newest.limit(limit))]

    def evictions(self, addresses: Iterable[Address]) -> dict[Address, float]:
        """Return when something of representations was evicted the last time, for those of which that is known."""
        chosen = select(Eviction.address, Eviction.at)
        with self.reading() as connection:
            found = (connection.execute(chosen.where(Eviction.address.in_(some))) for some in chunks(addresses))
            return {row.address: row.at for rows in found for row in rows}


_NEW = insert(Count)
_COUNT = _NEW.on_conflict_do_update(index_elements=["name"], set_={"value": Count.value + _NEW.excluded.value})


def _storable(detail: str) -> str:
    # A message may contain the name of a file, which need not be UTF-8.
    return detail.encode(errors="backslashreplace").decode()


def remember_evictions(connection: Connection, addresses: Iterable[Address], *, at: float) -> None:
    """Enter when representations were evicted; only the newest evictions are kept."""
    new = insert(Eviction)
    upsert = new.on_conflict_do_update(index_elements=["address"], set_={"at": new.excluded.at})
    connection.execute(upsert, [{"address": address, "at": at} for address in addresses])
    # By row, not by time: any number of them may have the same one.
    newest_first = select(_ROW_ID).select_from(Eviction).order_by(Eviction.at.desc(), _ROW_ID.desc()).correlate(None)
    connection.execute(delete(Eviction).where(_ROW_ID.in_(newest_first.offset(MAX_EVICTIONS).limit(-1))))


_ROW_ID = literal_column("evictions.rowid", Integer)


def forget_events(connection: Connection, addresses: Iterable[Address]) -> None:
    """Remove the evictions of representations, and the events about them."""
    for some in chunks(addresses):
        connection.execute(delete(Eviction).where(Eviction.address.in_(some)))
        connection.execute(delete(EventRow).where(EventRow.address.in_(some)))
