"""The types of the catalog's columns. SQLite keeps any value in any column, so each value that comes out is checked."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec
from sqlalchemy import JSON, Float, Integer, LargeBinary, String, TypeDecorator

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
    """A number."""

    kinds = (float, int)


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
