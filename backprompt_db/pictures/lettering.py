"""How much of a string there is room for, in a font whose characters are all as wide."""

from __future__ import annotations

import unicodedata

from backprompt_db.display import shortened

CHARACTER_WIDTH = 7.3
"""Pixels; wide characters take two."""


def num_columns(string: str) -> int:
    """Return how many columns of a terminal, or of a monospaced font, a string takes."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in string)


def fitting(string: str, columns: int) -> str:
    """Return as much of the beginning of a string as fits."""
    while num_columns(string) > max(1, columns):
        string = shortened(string, num_characters=len(string) - 1)
    return string
