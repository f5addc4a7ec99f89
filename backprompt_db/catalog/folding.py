"""When two strings are the same but for the case of their letters."""

from __future__ import annotations

from collections.abc import Iterator

_DOTTED_I = "\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}"
_SIGMA, _FINAL_SIGMA = "\N{GREEK SMALL LETTER SIGMA}", "\N{GREEK SMALL LETTER FINAL SIGMA}"


def folded(text: str) -> str:
    """Return a text in which letters that differ only in case are the same, character for character.

    >>> folded("Écho, ÉCHO")
    'écho, écho'
    """
    # The lower case of one letter is two, that of another depends on what follows. FTS5 reads no further than a zero.
    lower = text.replace(_DOTTED_I, "i").lower()
    return lower.replace(_FINAL_SIGMA, _SIGMA).replace("\0", "\1")


def occurrences(text: str, string: str) -> Iterator[tuple[int, int]]:
    """Yield where `string` begins and ends in a text, in any case, from left to right.

    >>> list(occurrences("Buy, or BUY", "buy"))
    [(0, 3), (8, 11)]
    """
    inside, wanted = folded(text), folded(string)
    begin = inside.find(wanted)
    while wanted and begin >= 0:
        end = begin + len(wanted)
        yield begin, end
        begin = inside.find(wanted, end)
