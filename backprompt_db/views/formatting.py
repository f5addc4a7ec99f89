"""How sizes, times and strings are shown to people."""

from __future__ import annotations

import itertools

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_PERIODS = ((86400 * 365, "y"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def visible(string: str) -> str:
    """Return the string with escapes in place of all control characters and other characters that cannot be seen."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in string
    )


def shortened(string: str, *, num_characters: int) -> str:
    """Return the beginning of a string, with an ellipsis where something is left out."""
    return string if len(string) <= num_characters else string[: num_characters - 1] + "…"


def plural(number: int, noun: str) -> str:
    """Return a number of things for people.

    >>> plural(1, "segment"), plural(1000, "segment"), plural(2, "pass")
    ('1 segment', '1,000 segments', '2 passes')
    """
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def size(nbytes: int) -> str:
    """Return a number of bytes for people: `1.5 MiB`.

    >>> size(0), size(1023), size(1536)
    ('0 B', '1023 B', '1.5 KiB')
    """
    if nbytes < 1024:
        return f"{nbytes} B"
    exponent = min((nbytes.bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{nbytes / 1024**exponent:,.1f} {_UNITS[exponent]}"


def duration(seconds: float) -> str:
    """Return a length of time for people, in its two largest units.

    >>> duration(0.25), duration(59.9), duration(3725), duration(86400)
    ('0.25 s', '59.9 s', '1 h 2 min', '1 d')
    """
    if seconds < 60:
        return f"{seconds:.3g} s"
    remaining, units = int(seconds), []
    for length, unit in _PERIODS:
        count, remaining = divmod(remaining, length)
        units.append((count, unit))
    largest = itertools.dropwhile(lambda unit: not unit[0], units)
    return " ".join(f"{count} {unit}" for count, unit in itertools.islice(largest, 2) if count)


def age(moment: float | None, *, now: float) -> str:
    """Return how long ago a POSIX time was, in its largest unit; `-` for never."""
    if moment is None:
        return "-"
    seconds = max(0, int(now - moment))
    length, unit = next((period for period in _PERIODS if seconds >= period[0]), _PERIODS[-1])
    return f"{seconds // length} {unit}"
