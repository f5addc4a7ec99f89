"""What is read from the catalog: plain functions on an open read transaction."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Select,
    SQLColumnExpression,
    distinct,
    exists,
    func,
    literal_column,
    or_,
    select,
)
from sqlalchemy.orm import InstrumentedAttribute

from backprompt_db.catalog import graph
from backprompt_db.catalog.records import GroupTotals, Order, Row, Totals
from backprompt_db.catalog.schema import (
    ALL_NBYTES,
    NBYTES,
    USED_AT,
    Model,
    Namespace,
    Parent,
    Representation,
    Segment,
    Sums,
)
from backprompt_db.errors import PromptError
from backprompt_db.prompt.ids import ID_NBYTES, Address, SegmentId, TokenizerId, WeightsId

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from backprompt_db.prompt import segments
    from backprompt_db.prompt.representation import Part

_Group = TypeVar("_Group")

MAX_FOUND = 50
"""How many rows a search by prefix returns at most."""

MAX_NAMESAKES = 300
"""How many segments with the same text are looked at: the newest."""

_NUM_TIMED = 1_000
"""The seconds per token of a model are those of so many of its representations: the newest."""

# Rows of one transaction have the same time; their row ids keep the order in which they were recorded.
_AGE: tuple[SQLColumnExpression[float], ...] = (Representation.created_at, literal_column("representations.rowid"))
_NEWEST = [column.desc() for column in _AGE]


def totals(connection: Connection, *, namespace: str | None = None) -> Totals:
    """Sum over all representations, or over those of a namespace."""
    sums, segments = _TOTALS, select(_sum(Namespace.num_segments))
    if namespace is not None:
        sums = sums.where(Sums.namespace == namespace)
        segments = segments.where(Namespace.name == namespace)
    values = dict(connection.execute(sums).mappings().one())
    nbytes = {part: values.pop(column.key) for part, column in NBYTES.items()}
    return Totals(**values, num_segments=connection.execute(segments).scalar_one(), nbytes=nbytes)


def totals_by(connection: Connection, column: InstrumentedAttribute[_Group]) -> dict[_Group, GroupTotals]:
    """Sum over the representations of each model, or of each namespace: one of the columns that sums are kept by."""
    sums = select(column, *(_sum(each) for each in (Sums.num_representations, *_NBYTES))).group_by(column)
    return {
        group: GroupTotals(count, dict(zip(NBYTES, nbytes, strict=True)))
        for group, count, *nbytes in connection.execute(sums)
    }


def _sum(column: InstrumentedAttribute[int]) -> ColumnElement[int]:
    return func.coalesce(func.sum(column), 0).label(column.key)


_NBYTES = (Sums.scores_nbytes, Sums.logits_nbytes, Sums.kv_nbytes)
_TOTALS = select(
    *(_sum(column) for column in (Sums.num_representations, Sums.num_tokens, *_NBYTES, Sums.num_hits)),
    func.total(Sums.saved_seconds).label("saved_seconds"),
    func.count(distinct(Sums.weights_id)).label("num_models"),
)


def rows(
    connection: Connection, *, limit: int | None, order: Order, among: Iterable[ColumnElement[bool]] = ()
) -> list[Row]:
    """Return the first representations in an order of which all is true."""
    first = [column.asc() for column in _AGE] if order is Order.OLDEST else [*_LARGEST[order], *_NEWEST]
    return _rows(connection, _ROWS.where(*among).order_by(*first).limit(limit))


_LARGEST: dict[Order, list[ColumnElement[Any]]] = {
    Order.NEWEST: [],
    Order.SIZE: [ALL_NBYTES.desc()],
    Order.HITS: [Representation.num_hits.desc()],
    Order.USED: [USED_AT.desc()],
    Order.SECONDS: [Representation.compute_seconds.desc()],
}


def page_of_rows(
    connection: Connection, among: Iterable[ColumnElement[bool]], *, after: Address, num_rows: int
) -> list[Row]:
    """Return the next representations after an address of which all is true, by address."""
    page = _ROWS.where(Representation.address > after, *among).order_by(Representation.address).limit(num_rows)
    return _rows(connection, page)


def rows_of_segments(
    connection: Connection, ids: Iterable[SegmentId], among: Iterable[ColumnElement[bool]]
) -> list[Row]:
    """Return the representations of segments of which all is true."""
    return _rows(connection, _ROWS.where(Representation.segment_id.in_(ids), *among))


def find(connection: Connection, low: bytes, high: bytes) -> list[Row]:
    """Return the newest representations whose address or segment id lies in `[low, high]`."""
    lies_between = or_(Representation.address.between(low, high), Representation.segment_id.between(low, high))
    return _rows(connection, _ROWS.where(lies_between).order_by(*_NEWEST).limit(MAX_FOUND))


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
    select(*(column for column in Representation.__table__.columns if column.key != "num_kv_children"))
    .add_columns(Segment.text, Segment.start)
    .add_columns(func.nullif(Model.name, "").label("model_name"))
    .select_from(Representation)
    .join(Segment, Segment.id == Representation.segment_id)
    .join(Model, Model.weights_id == Representation.weights_id)
)


def _rows(connection: Connection, statement: Select[*tuple[object, ...]]) -> list[Row]:
    found = connection.execute(statement)
    names = tuple(found.keys())
    return [_row(dict(zip(names, values, strict=True))) for values in found]


_SIZES = [(part, column.key) for part, column in NBYTES.items()]


def _row(values: dict[str, Any]) -> Row:
    sizes = [(part, values.pop(name)) for part, name in _SIZES]
    return Row(**values, nbytes={part: size for part, size in sizes if size is not None})


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


def namesakes(
    connection: Connection,
    strings: Iterable[str],
    ids: tuple[WeightsId, TokenizerId],
    among: Sequence[segments.Segment],
) -> dict[segments.Segment, bool]:
    """Return the newest segments whose text is one of `strings`, 300 of each, with all that they follow.

    And whether they have a representation under the model and the tokenizer that have these ids. The namespace, and the
    order of parallel branches, are those of the segments `among`. Looks at every text.
    """
    newest_first = literal_column("segments.rowid", Integer).desc()
    place = func.row_number().over(partition_by=Segment.text, order_by=newest_first).label("place")
    known = (
        select(Segment.id, place)
        .where(Segment.text.in_(set(strings)), Segment.namespace == among[0].namespace)
        .subquery()
    )
    is_represented = exists().where(
        Representation.segment_id == known.c.id,
        Representation.weights_id == ids[0],
        Representation.tokenizer_id == ids[1],
    )
    # Asked only of those that are left: of a text that thousands of prompts have it would take longer than the rest.
    newest = connection.execute(select(known.c.id, is_represented).where(known.c.place <= MAX_NAMESAKES))
    found = {segment_id: bool(is_own) for segment_id, is_own in newest}
    placed = graph.placed(connection, found, order=[segment.id for segment in among])
    return {placed[segment_id]: is_own for segment_id, is_own in found.items()}


def seconds_per_token(connection: Connection, weights_id: WeightsId) -> float | None:
    """Return what computing a token took lately under one model; None where nothing was recorded."""
    newest = select(Representation.compute_seconds, Representation.num_tokens).order_by(_AGE[0].desc())
    timed = newest.where(Representation.weights_id == weights_id).limit(_NUM_TIMED).subquery()
    total = select(func.total(timed.c.compute_seconds), func.total(timed.c.num_tokens))
    seconds, num_tokens = connection.execute(total).one()
    return seconds / num_tokens if num_tokens else None
