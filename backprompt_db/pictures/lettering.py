"""Where a row's words go: into its bar, or beside it, and how much of its text there is room for."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

from backprompt_db.display import shortened

GAP = 6
"""Pixels between a bar, or the edge of the picture, and words."""

_CHARACTER_WIDTH = 7.3
"""Of the monospaced font; wide characters take two."""
_NUM_COLUMNS_INSIDE = 45
"""A bar with room for so much has its text inside, though there might be more room beside it."""
_BETWEEN = 2
"""Columns between a text and what is said of it."""


class Span(NamedTuple):
    """From where to where something goes across the picture, in pixels."""

    left: float
    right: float

    @property
    def num_columns(self) -> int:
        """How many characters there is room for."""
        return int((self.right - self.left) / _CHARACTER_WIDTH)


class Words(NamedTuple):
    """Words in their place."""

    text: str
    x: float
    anchor: str
    """Which end of them is there: `start` or `end`."""
    is_inside: bool


class _Rooms(NamedTuple):
    """Where words may go, the best first. What stands before a bar ends there, all else begins at the left."""

    inside: Span
    before: Span
    after: Span

    def by_size(self) -> list[Span]:
        widest = sorted(self, key=lambda room: -room.num_columns)
        is_enough = self.inside.num_columns >= _NUM_COLUMNS_INSIDE
        return [self.inside, *(room for room in widest if room is not self.inside)] if is_enough else widest

    def put(self, text: str, room: Span, *, offset: int = 0) -> Words:
        shift, is_before = offset * _CHARACTER_WIDTH, room is self.before
        x, anchor = (room.right - shift, "end") if is_before else (room.left + shift, "start")
        return Words(text, x, anchor, room is self.inside)


def lettering(text: str, facts: str, bar: Span, *, width: float, rail: float) -> tuple[Words, Words]:
    """Return where a row's text and the facts about it go, the text shortened to what there is room for.

    They stay together where both fit whole; else the text has the best place, and the facts the next one that they fit
    into. `rail` is what the lines that lead to a bar need before it, in a picture of `width`.
    """
    rooms = _Rooms(
        Span(bar.left + GAP, bar.right - GAP), Span(GAP, bar.left - rail - GAP), Span(bar.right + GAP, width - GAP)
    )
    together = num_columns(text) + _BETWEEN + len(facts)
    if rooms.inside.num_columns >= together:
        return _together(text, facts, rooms, rooms.inside)
    best, *others = rooms.by_size()
    apart = next((room for room in others if room.num_columns >= len(facts)), None)
    if apart is None or best.num_columns >= together:
        return _together(fitting(text, best.num_columns - _BETWEEN - len(facts)), facts, rooms, best)
    return rooms.put(fitting(text, best.num_columns), best), rooms.put(facts, apart)


def _together(text: str, facts: str, rooms: _Rooms, room: Span) -> tuple[Words, Words]:
    if room is rooms.before:
        return rooms.put(text, room, offset=len(facts) + _BETWEEN), rooms.put(facts, room)
    return rooms.put(text, room), rooms.put(facts, room, offset=num_columns(text) + _BETWEEN)


def num_columns(string: str) -> int:
    """Return how many columns of a terminal, or of a monospaced font, a string takes."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in string)


def fitting(string: str, columns: int) -> str:
    """Return as much of the beginning of a string as fits."""
    while num_columns(string) > max(1, columns):
        string = shortened(string, num_characters=len(string) - 1)
    return string
