"""Counting: what one database handle did, and what went wrong, in its own memory and then in the catalog.

The catalog keeps the sums over all processes. It is told what was counted when a group was stored, at a flush and at
the end, so a process that is killed loses only what was counted since.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from backprompt_db.errors import CatalogError
from backprompt_db.system.platform import register_at_fork

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backprompt_db.catalog.catalog import Catalog
    from backprompt_db.catalog.records import Event
    from backprompt_db.prompt.ids import Address
    from backprompt_db.store.contract import Store

logger = logging.getLogger(__name__)

NAMES_IN_CATALOG = {
    "num_memory_hits": "memory_hits",
    "num_disk_hits": "disk_hits",
    "num_base_hits": "base_hits",
    "num_part_misses": "misses",
    "num_evicted": "evicted_parts",
    "num_evicted_nbytes": "evicted_nbytes",
    "num_quarantined": "quarantined_parts",
    "num_write_failures": "write_failures",
    "num_read_failures": "read_failures",
    "num_waits": "waits",
    "num_computed_tokens": "computed_tokens",
    "computed_seconds": "computed_seconds",
}
"""The counters of which the catalog keeps sums, and the names of those."""

_MAX_INCIDENTS_PER_SECOND = 5
_MAX_INCIDENTS = 100
"""How many incidents are remembered until the catalog is told. All of them are counted."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What one database handle did since it was opened.

    Representations are counted as they were asked for: one is a hit when every part that was asked for was found.
    Parts are counted by the tier that had them.
    """

    num_hits: int = 0
    """Representations whose wanted parts were all found."""
    num_misses: int = 0
    """Representations with a wanted part that was not found."""
    num_stored: int = 0
    """Parts written."""
    num_stored_nbytes: int = 0
    num_read_failures: int = 0
    """Reads that the store failed, each of which counts as a miss."""
    num_write_failures: int = 0
    """Parts that were computed but could not be stored."""
    num_quarantined: int = 0
    """Damaged or malformed parts met, which count as misses and are computed again."""
    num_memory_hits: int = 0
    """Parts found in memory: still queued for writing, or kept by the memory cache."""
    num_disk_hits: int = 0
    """Parts read from the store of this database."""
    num_base_hits: int = 0
    """Parts read from the database below, in a layered one."""
    num_part_misses: int = 0
    """Parts that were asked for and were nowhere."""
    num_computed_tokens: int = 0
    """Tokens of the segments that were computed and put."""
    computed_seconds: float = 0.0
    """What computing them took."""
    num_evicted: int = 0
    """Parts that this handle removed to stay below the limit."""
    num_evicted_nbytes: int = 0
    num_orphaned: int = 0
    """Keys and values that were not stored, because those of an ancestor were gone by then."""
    num_waits: int = 0
    """Computations of another process that this one waited for instead of repeating them."""


class Incident(NamedTuple):
    """One thing that went wrong, for people to look at."""

    at: float
    """POSIX seconds."""
    kind: str
    """`read-failure`, `write-failure` or `quarantine`."""
    address: Address | None
    detail: str


class Tally:
    """The counts of one handle. They only grow, under the names of `Counters`; for any number of threads.

    What the store counts itself (damaged parts, parts read from the database below) is added from there.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._counts: dict[str, float] = {}
        self._recorded: dict[str, float] = {}
        self._incidents: deque[Incident] = deque(maxlen=_MAX_INCIDENTS)
        self._latest: deque[float] = deque(maxlen=_MAX_INCIDENTS_PER_SECOND)
        _tallies.add(self)

    def add(self, name: str, number: float = 1) -> None:
        """Add to one count."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + number

    def report(self, kind: str, detail: str, *, address: Address | None = None) -> None:
        """Remember something that went wrong, for the catalog's list; more than a few per second are left out."""
        now = time.monotonic()
        with self._lock:
            if len(self._latest) == self._latest.maxlen and now - self._latest[0] < 1:
                return
            self._latest.append(now)
            self._incidents.append(Incident(time.time(), kind, address, detail))

    @property
    def counters(self) -> Counters:
        """The counts as they are now."""
        with self._lock:
            totals: dict[str, Any] = self._totals()
        return Counters(**totals)

    @property
    def untold(self) -> list[Incident]:
        """What went wrong and the catalog was not told yet, the oldest first."""
        with self._lock:
            return list(self._incidents)

    def has_news(self) -> bool:
        """Whether there is something that the catalog was not told."""
        with self._lock:
            return bool(self._incidents or self._increments())

    def record(self, catalog: Catalog) -> None:
        """Tell the catalog what was counted since it was last told. Counts that it misses are told the next time."""
        increments, incidents = self._take()
        try:
            if increments:
                catalog.count({NAMES_IN_CATALOG[name]: number for name, number in increments.items()})
                increments = {}
            if incidents:
                catalog.log(_events(incidents))
        except CatalogError as error:
            self._give_back(increments)
            logger.warning("the catalog missed counts or events: %s", error)

    def after_fork_in_child(self) -> None:
        """Leave to the parent what was counted until now; one of its threads may have held the lock."""
        self._lock = threading.Lock()
        self._incidents.clear()
        self._recorded = self._totals()

    def _totals(self) -> dict[str, float]:
        """Return all counts. The store says how many parts were read from the database below."""
        totals = dict(self._counts)
        num_base_hits = getattr(self._store, "num_base_hits", 0)
        # The store counts before the tally does, and also what other handles have found.
        totals["num_disk_hits"] = max(0, totals.get("num_disk_hits", 0) - num_base_hits)
        totals["num_base_hits"] = num_base_hits
        totals["num_quarantined"] = totals.get("num_quarantined", 0) + self._store.num_quarantined
        return totals

    def _increments(self) -> dict[str, float]:
        totals = self._totals()
        added = {name: totals.get(name, 0) - self._recorded.get(name, 0) for name in NAMES_IN_CATALOG}
        return {name: number for name, number in added.items() if number > 0}

    def _take(self) -> tuple[dict[str, float], list[Incident]]:
        with self._lock:
            increments, incidents = self._increments(), list(self._incidents)
            self._add_recorded(increments, sign=1)
            self._incidents.clear()
        return increments, incidents

    def _give_back(self, increments: Mapping[str, float]) -> None:
        with self._lock:
            self._add_recorded(increments, sign=-1)

    def _add_recorded(self, increments: Mapping[str, float], *, sign: int) -> None:
        for name, number in increments.items():
            self._recorded[name] = self._recorded.get(name, 0) + sign * number


def _events(incidents: Sequence[Incident]) -> list[Event]:
    from backprompt_db.catalog.records import Event

    return [Event(at=at, kind=kind, address=address, detail=detail) for at, kind, address, detail in incidents]


_tallies: weakref.WeakSet[Tally] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for tally in list(_tallies):
        tally.after_fork_in_child()


register_at_fork(after_in_child=_after_fork_in_child)
