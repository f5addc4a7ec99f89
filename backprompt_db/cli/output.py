"""How answers are written: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backprompt_db.representation import Part

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_PERIODS = ((86400 * 365, "y"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def emit(*renderables: RenderableType, wrap: bool = True) -> None:
    """Print what rich can render, as wide and as colourful as stdout allows."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=not wrap)
    # Printed by typer and not by rich, which would exit on its own when the pipe is closed.
    with console.capture() as captured:
        for renderable in renderables:
            console.print(renderable)
    typer.echo(captured.get(), nl=False)


def emit_json(value: object) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(plain(value), indent=2, allow_nan=False))


def plain(value: object) -> Any:
    """Return a value in JSON's types: ids in hex, parts by name, NaN as null, dataclasses by field."""
    match value:
        case bytes():
            return value.hex()
        case Part():
            return value.name.lower()
        case enum.Enum():
            return value.value
        case Path():
            return str(value)
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {plain(key): plain(item) for key, item in value.items()}
        case tuple() | list():
            return [plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def grid(rows: Mapping[str, object]) -> Table:
    """Return names and values side by side."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, literal(str(value)))
    return table


def literal(string: str) -> Text:
    """Return text that is shown as it is, control characters escaped."""
    from rich.text import Text

    return Text(visible(string))


def visible(string: str) -> str:
    """Return the string with every character that a terminal would obey, or not show, as its escape."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in string
    )


def shortened(string: str, *, num_characters: int) -> str:
    """Return the beginning of a string, with an ellipsis where something is left out."""
    return string if len(string) <= num_characters else string[: num_characters - 1] + "…"


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
