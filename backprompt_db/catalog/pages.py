"""What is done a page at a time, each in a transaction of its own, without a lock in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backprompt_db.catalog import graph, queries, search
from backprompt_db.prompt.ids import Address, SegmentId

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sqlalchemy import ColumnElement

    from backprompt_db.catalog.connection import Connections
    from backprompt_db.catalog.records import Row
    from backprompt_db.prompt.representation import Part

_KEYS_PER_PAGE = 5_000
_ROWS_PER_PAGE = 1_000


def rows(connections: Connections, among: list[ColumnElement[bool]]) -> Iterator[Row]:
    """Iterate over the representations of which all is true, by address."""
    last = Address(b"")
    while True:
        with connections.reading() as connection:
            page = queries.page_of_rows(connection, among, after=last, num_rows=_ROWS_PER_PAGE)
        yield from page
        if len(page) < _ROWS_PER_PAGE:
            return
        last = page[-1].address


def rows_of_segments(
    connections: Connections, ids: Iterable[SegmentId], among: list[ColumnElement[bool]]
) -> Iterator[Row]:
    """Iterate over the representations of segments of which all is true, by segment."""
    for some in graph.chunks(sorted(ids)):
        with connections.reading() as connection:
            page = queries.rows_of_segments(connection, some, among)
        yield from page


def keys(connections: Connections) -> Iterator[tuple[Address, Part]]:
    """Iterate over all parts, by address."""
    page = [(Address(b""), list["Part"]())]
    while page:
        with connections.reading() as connection:
            page = queries.page_of_keys(connection, after=page[-1][0], num_rows=_KEYS_PER_PAGE)
        yield from ((address, part) for address, parts in page for part in parts)


def index_texts(connections: Connections) -> Iterator[int]:
    """Make an index of all texts, or bring it up to date; yield how many were left before each page."""
    with connections.writing() as connection:
        search.create_index(connection)
        num_left = search.num_unindexed(connection)
    yield num_left
    while num_left > 0:
        with connections.writing() as connection:
            num_left -= search.index_some(connection) or num_left
        yield num_left
