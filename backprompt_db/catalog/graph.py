"""Which segments follow which."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from graphlib import TopologicalSorter
from itertools import islice
from typing import TypeVar

from sqlalchemy import Connection, Select, bindparam, exists, select

from backprompt_db.catalog.connection import CatalogFile
from backprompt_db.catalog.schema import Parent, Segment
from backprompt_db.prompt import segments
from backprompt_db.prompt.ids import SegmentId

MAX_VARIABLES = 900
"""SQLite builds may allow no more than 999 variables in a statement."""

_Item = TypeVar("_Item")


class Graph(CatalogFile):
    """The part of a catalog that knows which segments follow which."""

    def parents(self, segment_id: SegmentId) -> tuple[SegmentId, ...]:
        """Return the ids of a segment's direct parents, ascending; the catalog may not know these segments."""
        found = select(Parent.parent_id).where(Parent.segment_id == segment_id).order_by(Parent.parent_id)
        with self.reading() as connection:
            return tuple(connection.execute(found).scalars())

    def children(self, segment_id: SegmentId) -> tuple[SegmentId, ...]:
        """Return the ids of the segments that directly follow a segment, or that begin a namespace, ascending."""
        found = select(Parent.segment_id).where(Parent.parent_id == segment_id).order_by(Parent.segment_id)
        with self.reading() as connection:
            return tuple(connection.execute(found).scalars())

    def is_continued(self, ids: Iterable[SegmentId], *, besides: SegmentId) -> bool:
        """Whether any other segment than `besides` directly follows one of these."""
        found = exists().where(Parent.parent_id.in_(list(ids)), Parent.segment_id != besides)
        with self.reading() as connection:
            return bool(connection.execute(select(found)).scalar_one())

    def edges(self, ids: Iterable[SegmentId]) -> list[tuple[SegmentId, SegmentId]]:
        """Return segments, each with each of its direct parents; the catalog may not know these parents."""
        with self.reading() as connection:
            return _edges(connection, ids)

    def ancestors(self, ids: Iterable[SegmentId]) -> set[SegmentId]:
        """Return the known segments that the given ones follow, at any distance, without the given ones."""
        with self.reading() as connection:
            return _closure(ids, lambda some: connection.execute(_PARENTS, {"ids": some}).scalars())

    def descendants(self, ids: Iterable[SegmentId]) -> set[SegmentId]:
        """Return the segments that follow the given ones, at any distance, without the given ones."""
        with self.reading() as connection:
            return descendants_of(connection, ids)

    def segment(self, segment_id: SegmentId) -> segments.Segment | None:
        """Return a segment, rebuilt with all known segments that it follows; `None` if it is unknown itself."""
        with self.reading() as connection:
            return rebuilt(connection, [segment_id], order=[]).get(segment_id)


def descendants_of(connection: Connection, ids: Iterable[SegmentId]) -> set[SegmentId]:
    """Return all segments that follow the given ones, at any distance, without the given ones."""
    return _closure(ids, lambda some: children_of(connection, some))


def children_of(connection: Connection, ids: list[SegmentId]) -> Iterable[SegmentId]:
    """Return the segments that directly follow any of the given ones, which are not more than `MAX_VARIABLES`."""
    return connection.execute(_CHILDREN, {"ids": ids}).scalars()


def rebuilt(
    connection: Connection, ids: Iterable[SegmentId], *, order: Sequence[SegmentId]
) -> dict[SegmentId, segments.Segment]:
    """Rebuild segments, and all known segments that they follow.

    Nobody knows in which order parallel branches were written: those in `order` come first, in that order.
    """
    rows = {row.id: row for some in chunks(ids) for row in connection.execute(_WITH_ANCESTORS, {"ids": some})}
    numbers = {segment_id: number for number, segment_id in enumerate(order)}
    parents: dict[SegmentId, list[SegmentId]] = {segment_id: [] for segment_id in rows}
    for segment_id, parent_id in _edges(connection, rows):
        if parent_id in rows:
            parents[segment_id].append(parent_id)
    built: dict[SegmentId, segments.Segment] = {}
    for segment_id in TopologicalSorter(parents).static_order():
        row = rows[segment_id]
        ordered = sorted(parents[segment_id], key=lambda each: (numbers.get(each, len(numbers)), each))
        before = tuple(built[each] for each in ordered)
        built[segment_id] = segments.Segment(segment_id, row.text, before, row.start, row.namespace)
    return built


def chunks(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """Divide items into lists that are short enough for one statement."""
    remaining = iter(items)
    while chunk := list(islice(remaining, MAX_VARIABLES)):
        yield chunk


def _edges(connection: Connection, ids: Iterable[SegmentId]) -> list[tuple[SegmentId, SegmentId]]:
    # In the order of the table, which is read twice as fast.
    pages = (connection.execute(_EDGES, {"ids": some}) for some in chunks(sorted(ids)))
    return [(segment_id, parent_id) for page in pages for segment_id, parent_id in page]


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
_EDGES = select(Parent.segment_id, Parent.parent_id).where(Parent.segment_id.in_(bindparam("ids", expanding=True)))


def _with_ancestors() -> Select[SegmentId, str, int | None, str]:
    reached = select(Segment.id).where(Segment.id.in_(bindparam("ids", expanding=True))).cte("reached", recursive=True)
    reached = reached.union(select(Parent.parent_id).join(reached, Parent.segment_id == reached.c.id))
    columns = (Segment.id, Segment.text, Segment.start, Segment.namespace)
    return select(*columns).join(reached, reached.c.id == Segment.id)


_WITH_ANCESTORS = _with_ancestors()
