"""Which segments follow which: plain functions on an open read transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from sqlalchemy import Connection, bindparam, exists, select

from backprompt_db.catalog.tables import Parent, Segment
from backprompt_db.keys import SegmentId

MAX_VARIABLES = 900
"""SQLite builds may allow no more than 999 variables in a statement."""

_Item = TypeVar("_Item")


def descendants(connection: Connection, ids: Iterable[SegmentId]) -> set[SegmentId]:
    """Return all segments that follow the given ones, at any distance, without the given ones."""
    return _closure(ids, lambda some: children(connection, some))


def ancestors(connection: Connection, ids: Iterable[SegmentId]) -> set[SegmentId]:
    """Return all known segments that the given ones follow, at any distance, without the given ones."""
    return _closure(ids, lambda some: connection.execute(_PARENTS, {"ids": some}).scalars())


def children(connection: Connection, ids: list[SegmentId]) -> Iterable[SegmentId]:
    """Return the segments that directly follow some of the given ones, of which one statement can take all."""
    return connection.execute(_CHILDREN, {"ids": ids}).scalars()


def chunks(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """Divide items into lists that one statement can take."""
    remaining = iter(items)
    while chunk := list(islice(remaining, MAX_VARIABLES)):
        yield chunk


def _closure(ids: Iterable[SegmentId], step: Callable[[list[SegmentId]], Iterable[SegmentId]]) -> set[SegmentId]:
    given = set(ids)
    found, front = set(given), given
    while front:
        front = {each for some in chunks(front) for each in step(some)} - found
        found |= front
    return found - given


_CHILDREN = select(Parent.segment_id).where(Parent.parent_id.in_(bindparam("ids", expanding=True)))
_PARENTS = select(Parent.parent_id).where(
    Parent.segment_id.in_(bindparam("ids", expanding=True)), exists().where(Segment.id == Parent.parent_id)
)
