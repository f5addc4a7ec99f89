"""Databases with a limit, and what must hold in each of them at any moment."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import backprompt_db as bp
from backprompt_db.database.creating import create_database
from backprompt_db.database.database import Database
from backprompt_db.prompt.representation import OWN_PARTS, Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.store.contract import Key
from tests.support.faults import address_of, dangling, keys_of, new_parts, num_tokens_at, segments, wanted_of, wrong

MAX_NBYTES = 4_000_000
"""The longest keys and values of `tests/support/faults.py` fit into it twice or three times."""

HIGH_NBYTES = int(0.95 * MAX_NBYTES)
"""What may be live; the default share."""


def make_limited(place: Path, *, max_nbytes: int | None = MAX_NBYTES, **limits: Any) -> Path:
    """Make a database with a limit, and no grace."""
    create_database(place, limits={"max_nbytes": max_nbytes, "grace_seconds": 0.0, **limits})
    return place


def open_limited(place: Path, *, max_nbytes: int | None = MAX_NBYTES, **limits: Any) -> Database:
    """Make a database with a limit, and no grace, and open it. Nothing is found in memory."""
    return bp.open(make_limited(place, max_nbytes=max_nbytes, **limits), memory_nbytes=0)


def live(db: Database) -> int:
    return db.store.usage().live_nbytes


def stored(db: Database) -> set[Key]:
    return {key for key, _ in db.store.keys()}


def put(db: Database, some: Iterable[Segment], parts: Iterable[Part] = OWN_PARTS) -> None:
    """Store parts of segments, acknowledged."""
    db.put(new_parts(some, parts))
    db.flush()


def of_size(num_tokens: int, *, after: tuple[Segment, ...] = (), number: int = 0) -> tuple[Segment, ...]:
    """A chain of segments of which the last has just so many tokens. Which tokens it has, its address decides."""
    before = [segment.string for segment in after]
    for attempt in range(10_000):
        chain = segments(*before, f"{num_tokens} tokens, {number}, {attempt}.")
        if num_tokens_at(address_of(chain[-1])) == num_tokens:
            return chain
    raise AssertionError(f"no segment has {num_tokens} tokens")


def kv_of(segment: Segment) -> Key:
    return Key(address_of(segment), Part.KV)


def assert_sound(db: Database, *, high_nbytes: int = HIGH_NBYTES) -> None:
    """What must hold at any moment."""
    assert live(db) <= high_nbytes
    assert dangling(db) == []
    assert db.counters.num_quarantined == db.counters.num_read_failures == 0


def assert_whole(db: Database, some: Iterable[Segment], parts: Iterable[Part] = OWN_PARTS) -> None:
    """All parts of segments are there, and right."""
    chain, kinds = list(some), list(parts)
    found = db.fetch(wanted_of(chain, kinds))
    assert set(found) == set(keys_of(chain, kinds))
    assert wrong(found) == []
