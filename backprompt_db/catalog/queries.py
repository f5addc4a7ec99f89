"""What is read from the catalog: plain functions on an open read transaction."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    SQLColumnExpression,
    distinct,
    func,
    literal_column,
    or_,
    select,
)

from backprompt_db.catalog.records import Row, Totals
from backprompt_db.catalog.tables import NBYTES, Model, Parent, Representation, Segment
from backprompt_db.errors import PromptError
from backprompt_db.keys import ID_NBYTES, Address, SegmentId

if TYPE_CHECKING:
    from backprompt_db.representation import Part

MAX_FOUND = 50
"""How many rows a search by prefix returns at most."""

# Rows of one transaction have the same time; their row ids keep the order in which they were recorded.
_AGE: tuple[SQLColumnExpression[float], ...] = (Representation.created_at, literal_column("representations.rowid"))


def totals(connection: Connection) -> Totals:
    """Sum over all representations."""
    sums = select(
        func.count().label("num_representations"),
        func.count(distinct(Representation.segment_id)).label("num_segments"),
        func.count(distinct(Representation.weights_id)).label("num_models"),
        _sum(Representation.num_tokens).label("num_tokens"),
        _sum(Representation.num_hits).label("num_hits"),
        func.total(Representation.num_hits * Representation.compute_seconds).label("saved_seconds"),
        *(_sum(column).label(column.key) for column in NBYTES.values()),
    ).select_from(Representation)
    values = dict(connection.execute(sums).mappings().one())
    nbytes = {part: values.pop(column.key) for part, column in NBYTES.items()}
    return Totals(**values, nbytes=nbytes)


def _sum(column: SQLColumnExpression[int] | SQLColumnExpression[int | None]) -> ColumnElement[int]:
    return func.coalesce(func.sum(column), 0)


def rows(connection: Connection, *, limit: int | None, newest_first: bool) -> list[Row]:
    """Return representations in the order in which they were recorded, or the reverse."""
    order = [column.desc() if newest_first else column.asc() for column in _AGE]
    return _rows(connection, _ROWS.order_by(*order).limit(limit))


def find(connection: Connection, low: bytes, high: bytes) -> list[Row]:
    """Return the newest representations whose address or segment id lies in `[low, high]`."""
    lies_between = or_(Representation.address.between(low, high), Representation.segment_id.between(low, high))
    newest = [column.desc() for column in _AGE]
    return _rows(connection, _ROWS.where(lies_between).order_by(*newest).limit(MAX_FOUND))


def id_range(prefix: str) -> tuple[bytes, bytes]:
    """Return the smallest and the largest id that begin with the hex digits `prefix`.

    Raises `PromptError` for anything else than hex digits, or too many of them.
    """
    num_digits = 2 * ID_NBYTES
    if not re.fullmatch(rf"[0-9a-fA-F]{{1,{num_digits}}}", prefix):
        raise PromptError(
            f"{prefix!r} does not begin an address or a segment id",
            hint=f"Give 1 to {num_digits} hex digits, as listings show them.",
        )
    return bytes.fromhex(prefix.ljust(num_digits, "0")), bytes.fromhex(prefix.ljust(num_digits, "f"))


_ROWS = (
    select(*Representation.__table__.columns)
    .add_columns(Segment.text, Segment.start, Segment.namespace)
    .add_columns(func.nullif(Model.name, "").label("model_name"))
    .select_from(Representation)
    .join(Segment, Segment.id == Representation.segment_id)
    .join(Model, Model.weights_id == Representation.weights_id)
)


def _rows(connection: Connection, statement: Select[*tuple[object, ...]]) -> list[Row]:
    return [_row(found) for found in connection.execute(statement).mappings()]


def _row(found: RowMapping) -> Row:
    values = dict(found)
    sizes = {part: values.pop(column.key) for part, column in NBYTES.items()}
    return Row(**values, nbytes={part: size for part, size in sizes.items() if size is not None})


def parents(connection: Connection, segment_id: SegmentId) -> tuple[SegmentId, ...]:
    """Return the ids of a segment's direct parents, ascending."""
    found = select(Parent.parent_id).where(Parent.segment_id == segment_id).order_by(Parent.parent_id)
    return tuple(connection.execute(found).scalars())


def children(connection: Connection, segment_id: SegmentId) -> tuple[SegmentId, ...]:
    """Return the ids of the segments that directly follow a segment, ascending."""
    found = select(Parent.segment_id).where(Parent.parent_id == segment_id).order_by(Parent.segment_id)
    return tuple(connection.execute(found).scalars())


def page_of_keys(connection: Connection, *, after: Address, num_rows: int) -> list[tuple[Address, list[Part]]]:
    """Return the parts of the next representations after an address, in the order of their addresses."""
    page = select(Representation.address, *NBYTES.values()).where(Representation.address > after)
    found = connection.execute(page.order_by(Representation.address).limit(num_rows))
    return [
        (address, [part for part, size in zip(NBYTES, sizes, strict=True) if size is not None])
        for address, *sizes in found
    ]
