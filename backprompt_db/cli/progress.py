"""Progress bars: on stderr, in a terminal, gone when the work is done."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import BinaryIO, TypeVar

_Each = TypeVar("_Each")


def bar(each: Iterable[_Each], what: str, *, total: float | None) -> Iterable[_Each]:
    """Put a progress bar around what is done; without a total, one that only moves."""
    if not sys.stderr.isatty():
        return each
    from rich.console import Console
    from rich.progress import track

    return track(each, what, total=total, console=Console(stderr=True), transient=True)


def reading_bar(file: BinaryIO, what: str, *, nbytes: int) -> contextlib.AbstractContextManager[BinaryIO]:
    """Put a progress bar around reading a file."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext(file)
    from rich.console import Console
    from rich.progress import wrap_file

    return wrap_file(file, nbytes, description=what, console=Console(stderr=True), transient=True)
