"""How answers are written, tables for people and JSON for programs, and the bars that show progress."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, TypeVar

import typer

from backprompt_db.prompt.representation import Part

if TYPE_CHECKING:
    from rich.console import RenderableType

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
    typer.echo(json.dumps(json_value(value), indent=2, allow_nan=False))


def json_value(value: object) -> Any:
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
            return {json_value(key): json_value(item) for key, item in value.items()}
        case tuple() | list():
            return [json_value(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {field.name: json_value(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def short_name(model_name: str | None) -> str:
    """Return the last part of a model's name or path; `?` for a model without a name."""
    return (model_name or "?").rstrip("/").rpartition("/")[2]


_Each = TypeVar("_Each")


def progress_bar(each: Iterable[_Each], what: str, *, total: float | None) -> Iterable[_Each]:
    """Yield from `each` behind a progress bar; without a total, the bar only moves."""
    if not sys.stderr.isatty():
        return each
    from rich.console import Console
    from rich.progress import track

    return track(each, what, total=total, console=Console(stderr=True), transient=True)


def reading_bar(file: BinaryIO, what: str, *, nbytes: int) -> contextlib.AbstractContextManager[BinaryIO]:
    """Return a file that shows a progress bar while it is read."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext(file)
    from rich.console import Console
    from rich.progress import wrap_file

    return wrap_file(file, nbytes, description=what, console=Console(stderr=True), transient=True)
