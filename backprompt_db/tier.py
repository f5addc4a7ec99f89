"""The memory tier: what was used last stays in memory, within a budget of bytes that all models of a database share."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import psutil

_Value = TypeVar("_Value")

_SHARE_OF_FREE_MEMORY = 8
"""The default budget is the free memory divided by this."""


class _Entry(NamedTuple):
    value: Any
    nbytes: int


class MemoryTier:
    """Values by key within a budget of bytes; the one used longest ago goes first. For any number of threads."""

    def __init__(self, budget_nbytes: int) -> None:
        self.budget_nbytes = budget_nbytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self._nbytes

    def get(self, key: Hashable) -> Any:
        """Return the value under a key, None where there is none."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry.value

    def put(self, key: Hashable, value: object, *, nbytes: int) -> None:
        """Keep a value; those used longest ago go until all fit. One beyond the whole budget is not kept."""
        with self._lock:
            self._remove(key)
            if nbytes > self.budget_nbytes:
                return
            self._entries[key] = _Entry(value, nbytes)
            self._nbytes += nbytes
            while self._nbytes > self.budget_nbytes:
                self._remove(next(iter(self._entries)))

    def discard(self, key: Hashable) -> None:
        """Forget a value, if it is there."""
        with self._lock:
            self._remove(key)

    def take_best(self, kind: type[_Value], rank: Callable[[_Value], int]) -> _Value | None:
        """Remove and return the value of a kind that `rank` puts highest, None where all rank 0 or lower."""
        with self._lock:
            ranked = [(rank(entry.value), key) for key, entry in self._entries.items() if isinstance(entry.value, kind)]
            best, key = max(ranked, key=lambda pair: pair[0], default=(0, None))
            if best <= 0:
                return None
            value: _Value = self._entries[key].value
            self._remove(key)
            return value

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._nbytes = 0

    def after_fork_in_child(self) -> None:
        """Begin with nothing: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()
        self.clear()

    def _remove(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._nbytes -= entry.nbytes


def default_budget_nbytes() -> int:
    """Return an eighth of the memory that is free now."""
    return int(psutil.virtual_memory().available) // _SHARE_OF_FREE_MEMORY
