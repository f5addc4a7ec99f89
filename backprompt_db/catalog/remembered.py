"""The rows that decide an answer, one by one, for those who check whether they are still what was written."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import ColumnElement, Connection, Integer, RowMapping, delete, literal_column, select, update
from sqlalchemy.exc import SQLAlchemyError

from backprompt_db.catalog.connection import CatalogFile
from backprompt_db.catalog.graph import chunks
from backprompt_db.catalog.records import CutsRecord, EncodingRecord, GenerationRecord, GreedyPath, ModelRecord, Source
from backprompt_db.catalog.schema import (
    Base,
    Cuts,
    EncodingRow,
    GenerationRow,
    GreedyPathRow,
    Model,
    Representation,
    SourceFiles,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    Signed = ModelRecord | Source | CutsRecord | EncodingRecord | GreedyPath | GenerationRecord
    """What has a signature, because it decides what is computed and what is found.

    Whoever could change it unseen could have one model answer with another one's values.
    """

_ROWS_PER_PAGE = 500
_rowid: ColumnElement[int] = literal_column("rowid", Integer)

_RECORDS: dict[type[Base], type[Signed]] = {
    Model: ModelRecord,
    SourceFiles: Source,
    Cuts: CutsRecord,
    EncodingRow: EncodingRecord,
    GreedyPathRow: GreedyPath,
    GenerationRow: GenerationRecord,
}
_TABLES = {table.__tablename__: table for table in _RECORDS}

UNCHECKED: dict[str, object] = {
    "name": "",
    "architecture": "",
    "dtype": "",
    "num_layers": 0,
    "num_kv_heads": 0,
    "head_dim": 0,
    "vocab_size": 0,
    "verdict": "unchecked",
}
"""What is known of a model of which only the representations are."""


class RememberedRow(NamedTuple):
    """One row of a table whose rows are signed."""

    table: str
    rowid: int
    record: Signed | None
    """None where a value of another type stands in it, so that it cannot be one."""


class Remembered(CatalogFile):
    """The part of a catalog that goes through what is remembered."""

    def remembered(self) -> Iterator[RememberedRow]:
        """Yield all rows that are signed, table by table, whatever is in them."""
        for table in _RECORDS:
            last = -1
            while page := self._page(table, after=last):
                yield from page
                last = page[-1].rowid

    def forget_remembered(self, table: str, rowids: Iterable[int]) -> None:
        """Remove rows of one table; of a model that has representations, all but its id."""
        rows = _TABLES[table]
        with self.writing() as connection:
            for some in chunks(rowids):
                if rows is Model:
                    empty = {column.name: None for column in Model.__table__.columns if column.name != "weights_id"}
                    connection.execute(update(Model).where(_rowid.in_(some)).values(empty | UNCHECKED))
                unused = [Model.weights_id.not_in(select(Representation.weights_id))] if rows is Model else []
                connection.execute(delete(rows).where(_rowid.in_(some), *unused))

    def _page(self, table: type[Base], *, after: int) -> list[RememberedRow]:
        with self.reading() as connection:
            found = select(_rowid).select_from(table).where(_rowid > after).order_by(_rowid).limit(_ROWS_PER_PAGE)
            rowids = connection.execute(found).scalars().all()
            try:
                return _rows(connection, table, rowids)
            except (SQLAlchemyError, sqlite3.Error):  # one of them cannot be read: which one?
                return [row for rowid in rowids for row in _row(connection, table, rowid)]


def _rows(connection: Connection, table: type[Base], rowids: Sequence[int]) -> list[RememberedRow]:
    found = select(_rowid.label("rowid"), *table.__table__.columns).where(_rowid.in_(rowids)).order_by(_rowid)
    return [
        RememberedRow(table.__tablename__, row["rowid"], _record(table, row))
        for row in connection.execute(found).mappings()
    ]


def _row(connection: Connection, table: type[Base], rowid: int) -> list[RememberedRow]:
    try:
        return _rows(connection, table, [rowid])
    except (SQLAlchemyError, sqlite3.Error):
        return [RememberedRow(table.__tablename__, rowid, None)]


def _record(table: type[Base], row: RowMapping) -> Signed | None:
    values = {name: value for name, value in row.items() if name != "rowid"}
    lists = {name: values[name] for name in ("offsets", "token_ids") if name in values}
    if None in lists.values():
        return None
    return _RECORDS[table](**values | {name: tuple(numbers) for name, numbers in lists.items()})
