"""The types of the catalog's columns. SQLite keeps any value in any column, so each value that comes out is checked."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec
from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Float,
    Integer,
    LargeBinary,
    String,
    Table,
    TypeDecorator,
    func,
    or_,
)

from backprompt_db.catalog.plain_sql import MAX_NUMBER

_Reader = Callable[[Any], Any]


class _Checked:
    """What all but the lists have in common: a value of another kind is an error of SQLite, like any damage."""

    kinds: ClassVar[tuple[type, ...]]

    def result_processor(self, *_: object) -> _Reader:
        """Return what checks each value that is read."""
        kinds = self.kinds

        def check(value: object) -> object:
            if value is None or type(value) in kinds:
                return value
            raise sqlite3.DataError(f"a {type(value).__name__} is where a {kinds[0].__name__} belongs")

        return check


class Blob(_Checked, LargeBinary):
    """Bytes."""

    kinds = (bytes,)


class Number(_Checked, Integer):
    """A whole number."""

    kinds = (int,)


class Real(_Checked, Float[float]):
    """A number that is finite, and no larger than whole numbers can be."""

    kinds = (float, int)

    def result_processor(self, *dialect: object) -> _Reader:
        """Return what checks each value that is read."""
        check = super().result_processor(*dialect)

        def check_size(value: Any) -> object:
            if check(value) is None or abs(value) <= MAX_NUMBER:
                return value
            raise sqlite3.DataError(f"{value} is where a smaller number belongs")

        return check_size


class Words(_Checked, String):
    """Text."""

    kinds = (str,)


class Numbers(TypeDecorator[list[int]]):
    """A list of whole numbers, in JSON; None for anything else, so that one bad row does not hide others."""

    impl = JSON
    cache_ok = True

    def result_processor(self, *_: object) -> _Reader:
        """Return what reads each value."""
        return _numbers


def _numbers(value: object) -> list[int] | None:
    try:
        return msgspec.json.decode(value, type=list[int]) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return None


def misfits(table: Table) -> ColumnElement[bool]:
    """Return the condition that a row has a value that does not belong in its column."""
    return or_(*(_is_misfit(column) for column in table.columns))


def _is_misfit(column: Column[Any]) -> ColumnElement[bool]:
    kind = column.type.python_type
    classes = [*_STORAGE_CLASSES.get(kind, ("text",)), *(["null"] if column.nullable else [])]
    is_misfit = func.typeof(column).not_in(classes)
    return or_(is_misfit, func.abs(column) > MAX_NUMBER) if kind is float else is_misfit


_STORAGE_CLASSES: dict[type, tuple[str, ...]] = {
    bytes: ("blob",),
    int: ("integer",),
    bool: ("integer",),
    float: ("real", "integer"),
}
"""What SQLite calls the values of a type; those of all others are text."""
