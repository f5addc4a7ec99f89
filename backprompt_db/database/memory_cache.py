"""The memory cache: what was used last stays, within a budget of bytes that all models of a database share."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

_SHARE_OF_FREE_MEMORY = 8
"""The default budget is the free memory divided by this."""

_MEASURED_FOR_SECONDS = 1
"""How long the free memory is taken for what it was: measuring it takes a quarter of a millisecond."""

_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("memory.max", "memory.current"),  # version 2
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # version 1
)
"""Where a container's limit and its usage are. The machine's own numbers know nothing of them."""


class _Entry(NamedTuple):
    value: Any
    nbytes: int
    group: Hashable


class MemoryCache:
    """Values by key within a budget of bytes; the one used longest ago goes first. For any number of threads.

    With `share`, which is called with the bytes that are held, the budget is what it says when something is put.
    """

    def __init__(self, budget_nbytes: int, *, share: Callable[[int], int] | None = None) -> None:
        self.budget_nbytes = budget_nbytes
        self._share = share
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._groups: dict[Hashable, dict[Hashable, Any]] = {}
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self._nbytes

    @property
    def room_nbytes(self) -> int:
        """Bytes that can be put without anything having to go."""
        return self.budget_nbytes - self._nbytes

    def get(self, key: Hashable) -> Any:
        """Return the value under a key, None where there is none."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry.value

    def size(self, key: Hashable) -> int | None:
        """Return the bytes of the value under a key, None where there is none. It is not thereby used."""
        with self._lock:
            entry = self._entries.get(key)
            return None if entry is None else entry.nbytes

    def grouped(self) -> list[Any]:
        """Return the values that were put with a group, which are not thereby used."""
        with self._lock:
            return [value for members in self._groups.values() for value in members.values()]

    def put(self, key: Hashable, value: object, *, nbytes: int, group: Hashable = None) -> None:
        """Keep a value; those used longest ago go until all fit. One beyond the whole budget is not kept.

        With a `group`, `take_best` finds it among the others of that group.
        """
        with self._lock:
            self._remove(key)
            if self._share is not None:
                self.budget_nbytes = self._share(self._nbytes)
            if nbytes > self.budget_nbytes or not self.budget_nbytes:  # a closed cache keeps not even what is empty
                return
            self._entries[key] = _Entry(value, nbytes, group)
            if group is not None:
                self._groups.setdefault(group, {})[key] = value
            self._nbytes += nbytes
            while self._nbytes > self.budget_nbytes:
                self._remove(next(iter(self._entries)))

    def discard(self, key: Hashable) -> None:
        """Forget a value, if it is there."""
        with self._lock:
            self._remove(key)

    def take_best(self, group: Hashable, rank: Callable[[Any], tuple[int, ...] | None]) -> Any | None:
        """Remove and return the value of a group that `rank` puts highest; None where it gives None for all.

        `rank` is called with the cache locked: it must be quick and not use the cache.
        """
        with self._lock:
            ranked = [(rank(value), key) for key, value in self._groups.get(group, {}).items()]
            known = [(best, key) for best, key in ranked if best is not None]
            if not known:
                return None
            _, key = max(known, key=lambda pair: pair[0])  # keys need not have an order
            value = self._entries[key].value
            self._remove(key)
            return value

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._groups.clear()
            self._nbytes = 0

    def close(self) -> None:
        """Forget everything and keep nothing from now on, not even what a pass that is still running puts."""
        with self._lock:
            self._share = None
            self.budget_nbytes = 0  # before: what another thread puts in between is cleared
        self.clear()

    def after_fork_in_child(self) -> None:
        """Begin with nothing: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()
        self.clear()

    def _remove(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self._nbytes -= entry.nbytes
        if entry.group is not None:
            members = self._groups[entry.group]
            del members[key]
            if not members:
                del self._groups[entry.group]


class FreeShare:
    """Says how much a process may hold: an eighth of the memory that would be free if it held nothing.

    What others take in the meantime is not free any more: eight processes together never hold all of it, but half.
    """

    def __init__(self, measure: Callable[[], int] | None = None) -> None:
        self._measure = measure or free_nbytes
        self._share_nbytes = self._held_nbytes = 0
        self._measured_at = -math.inf

    def __call__(self, held_nbytes: int) -> int:
        """Return the share of a process that holds so much; measured again after a second, or growth."""
        has_grown = held_nbytes > self._held_nbytes + self._share_nbytes // _SHARE_OF_FREE_MEMORY
        if has_grown or time.monotonic() > self._measured_at + _MEASURED_FOR_SECONDS:
            self._share_nbytes = (self._measure() + held_nbytes) // _SHARE_OF_FREE_MEMORY
            self._held_nbytes, self._measured_at = held_nbytes, time.monotonic()
        return self._share_nbytes


def default_budget_nbytes(*, cgroups: Path = _CGROUPS) -> int:
    """Return an eighth of the memory that is free now."""
    return free_nbytes(cgroups=cgroups) // _SHARE_OF_FREE_MEMORY


def free_nbytes(*, cgroups: Path = _CGROUPS) -> int:
    """Return the memory that is free now, in the machine or in the container, whichever has less."""
    free = [int(psutil.virtual_memory().available)]
    for limit, usage in _CGROUP_FILES:
        try:
            free.append(_number(cgroups / limit) - _number(cgroups / usage) + _cached_nbytes(cgroups / limit))
        except (OSError, ValueError):  # the other version of cgroups, none at all, or no limit: "max"
            continue
    return max(0, min(free))


def _number(path: Path) -> int:
    return int(path.read_text())


def _cached_nbytes(limit: Path) -> int:
    """Bytes of files that the kernel keeps in memory and counts as used, but gives up when memory is needed."""
    numbers = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
    return int(numbers.get("active_file", 0)) + int(numbers.get("inactive_file", 0))
