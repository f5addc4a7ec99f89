"""What is read from the catalog about representations: rows in some order, and sums over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

from backprompt_db.catalog.connection import CatalogFile
from backprompt_db.catalog.graph import chunks, rebuilt
from backprompt_db.catalog.records import GroupTotals, Order, Row, Selection, Totals, require_all
from backprompt_db.catalog.schema import (
    ALL_NBYTES,
    NBYTES,
    USED_AT,
    Model,
    Namespace,
    Representation,
    Segment,
    Sums,
)
from backprompt_db.catalog.selection import conditions, conditions_but_searches, id_range, searched_segments
from backprompt_db.prompt.ids import Address, SegmentId, TokenizerId, WeightsId

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from backprompt_db.prompt.representation import Part
    from backprompt_db.prompt.segments import Segment as PromptSegment

MAX_FOUND = 50
"""How many rows a search by prefix returns at most."""

MAX_NAMESAKES = 300
"""How many segments with the same text are looked at: the newest."""

"""Over how many representations of a model the seconds per token are averaged: the newest."""

_KEYS_PER_PAGE = 5_000
_ROWS_PER_PAGE = 1_000

# What one transaction records has one time; row ids keep its order.
_AGE: tuple[SQLColumnExpression[float], ...] = (Representation.created_at, literal_column("representations.rowid"))
_NEWEST = [column.desc() for column in _AGE]
_NEWEST_SEGMENT = literal_column("segments.rowid", Integer).desc()


class Queries(CatalogFile):
    """The part of a catalog that lists representations and sums them up."""

    def totals(self, *, namespace: str | None = None) -> Totals:
        """Return the sums over all representations, or over those of a namespace."""
        sums, segments = _TOTALS, select(_sum(Namespace.num_segments))
        if namespace is not None:
            sums = sums.where(Sums.namespace == namespace)
            segments = segments.where(Namespace.name == namespace)
        with self.reading() as connection:
            values = dict(connection.execute(sums).mappings().one())
            num_segments = connection.execute(segments).scalar_one()
        nbytes = {part: values.pop(column.key) for part, column in NBYTES.items()}
        return Totals(**values, num_segments=num_segments, nbytes=nbytes)

    def totals_by_model(self) -> dict[WeightsId, GroupTotals]:
        """Return the sums of each model that has representations."""
        sums = select(Sums.weights_id, *(_sum(each) for each in (Sums.num_representations, *_NBYTES)))
        with self.reading() as connection:
            return {
                weights_id: GroupTotals(count, dict(zip(NBYTES, nbytes, strict=True)))
                for weights_id, count, *nbytes in connection.execute(sums.group_by(Sums.weights_id))
            }

    def rows(
        self, *, limit: int | None = None, order: Order = Order.NEWEST, selection: Selection | None = None
    ) -> list[Row]:
        """Return the first representations in an order; `selection` restricts them and raises what `select` raises."""
        first = [column.asc() for column in _AGE] if order is Order.OLDEST else [*_LARGEST[order], *_NEWEST]
        with self.reading() as connection:
            among = conditions(connection, selection or Selection())
            return _rows(connection, _ROWS.where(*among).order_by(*first).limit(limit))

    def find(self, prefix: str) -> list[Row]:
        """Return the newest 50 representations whose address or segment id begins with the hex digits `prefix`.

        Raises `PromptError` when `prefix` is not 1 to 64 hex digits.
        """
        low, high = id_range(prefix)
        lies_between = or_(Representation.address.between(low, high), Representation.segment_id.between(low, high))
        with self.reading() as connection:
            return _rows(connection, _ROWS.where(lies_between).order_by(*_NEWEST).limit(MAX_FOUND))

    def select(self, selection: Selection) -> Iterator[Row]:
        """Iterate over the selected representations, a page at a time, without a lock between two pages.

        They come by address. When a text's prefix or a search selects them, they come by segment, and the ids of these
        segments are in memory; nothing else grows with their number. What is recorded or forgotten meanwhile may appear
        or not.

        Raises `PromptError` for a prefix that is not hex digits and for a model that the catalog does not know, and
        `InvalidText` for strings that have no UTF-8.
        """
        with self.reading() as connection:
            among = conditions_but_searches(connection, selection)
            ids = searched_segments(connection, selection)
        return self._rows_by_address(among) if ids is None else self._rows_by_segment(ids, among)

    def of_segments(self, ids: Iterable[SegmentId]) -> Iterator[Row]:
        """Iterate over all representations of segments, as `select` does."""
        return self._rows_by_segment(set(ids), [])

    def _rows_by_address(self, among: Sequence[ColumnElement[bool]]) -> Iterator[Row]:
        last = Address(b"")
        while True:
            following = _ROWS.where(Representation.address > last, *among).order_by(Representation.address)
            with self.reading() as connection:
                page = _rows(connection, following.limit(_ROWS_PER_PAGE))
            yield from page
            if len(page) < _ROWS_PER_PAGE:
                return
            last = page[-1].address

    def _rows_by_segment(self, ids: Iterable[SegmentId], among: Sequence[ColumnElement[bool]]) -> Iterator[Row]:
        for some in chunks(sorted(ids)):
            with self.reading() as connection:
                page = _rows(connection, _ROWS.where(Representation.segment_id.in_(some), *among))
            yield from page

    def keys(self) -> Iterator[tuple[Address, Part]]:
        """Iterate over every part that the catalog believes to be in the store, by address.

        No lock is held between two of them: parts that are recorded or forgotten meanwhile may appear or not.
        """
        last = Address(b"")
        by_address = select(Representation.address, *NBYTES.values()).order_by(Representation.address)
        while True:
            with self.reading() as connection:
                page = by_address.where(Representation.address > last).limit(_KEYS_PER_PAGE)
                found = connection.execute(page).all()
            for address, *sizes in found:
                yield from ((address, part) for part, size in zip(NBYTES, sizes, strict=True) if size is not None)
            if not found:
                return
            last = found[-1].address

    def namesakes(
        self, strings: Iterable[str], ids: tuple[WeightsId, TokenizerId], among: Sequence[PromptSegment]
    ) -> dict[PromptSegment, bool]:
        """Return the newest segments with one of these texts, rebuilt, and whether these ids have them represented.

        At most 300 of each text. The namespace, and the order of parallel branches, are those of the segments `among`.
        Looks at every text.
        """
        place = func.row_number().over(partition_by=Segment.text, order_by=_NEWEST_SEGMENT).label("place")
        has_text = Segment.text.in_(set(strings)) & (Segment.namespace == among[0].namespace)
        known = select(Segment.id, place).where(has_text).subquery()
        is_represented = exists().where(
            Representation.segment_id == known.c.id,
            Representation.weights_id == ids[0],
            Representation.tokenizer_id == ids[1],
        )
        # Asked only about the newest: for a text that thousands of prompts have, it would take longer than all else.
        newest = select(known.c.id, is_represented).where(known.c.place <= MAX_NAMESAKES)
        with self.reading() as connection:
            found = {segment_id: bool(is_own) for segment_id, is_own in connection.execute(newest)}
            segments = rebuilt(connection, found, order=[segment.id for segment in among])
        return {segments[segment_id]: is_own for segment_id, is_own in found.items()}


def _sum(column: InstrumentedAttribute[int]) -> ColumnElement[int]:
    return func.coalesce(func.sum(column), 0).label(column.key)


_NBYTES = (Sums.scores_nbytes, Sums.logits_nbytes, Sums.kv_nbytes, Sums.continuations_nbytes)
_TOTALS = select(
    *(_sum(column) for column in (Sums.num_representations, Sums.num_tokens, *_NBYTES, Sums.num_hits)),
    func.total(Sums.saved_seconds).label("saved_seconds"),
    func.count(distinct(Sums.weights_id)).label("num_models"),
)


_LARGEST: dict[Order, list[ColumnElement[Any]]] = {
    Order.NEWEST: [],
    Order.SIZE: [ALL_NBYTES.desc()],
    Order.HITS: [Representation.num_hits.desc()],
    Order.USED: [USED_AT.desc()],
    Order.SECONDS: [Representation.compute_seconds.desc()],
}

_ROWS = (
    select(*(column for column in Representation.__table__.columns if column.key != "num_kv_children"))
    .add_columns(Segment.text, Segment.start)
    .add_columns(func.nullif(Model.name, "", type_=Model.name.type).label("model_name"))
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
    require_all(Row, values)
    return Row(**values, nbytes={part: size for part, size in sizes if size is not None})
