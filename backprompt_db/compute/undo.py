"""Changes to a model that last for one pass, and are undone also in a child that was forked in the middle of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_undo: list[Callable[[], None]] = []


@contextmanager
def undone_afterwards(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` at the end, or in a forked child, where the thread that would come to the end does not exist."""
    _undo.append(undo)
    try:
        yield
    finally:
        if undo in _undo:
            _undo.remove(undo)
        undo()


def _after_fork_in_child() -> None:
    while _undo:
        _undo.pop()()


os.register_at_fork(after_in_child=_after_fork_in_child)
