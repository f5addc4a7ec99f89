"""What is measured in a process of its own: `python -m benchmarks.scale_probes NAME DIRECTORY [NUMBER]` prints JSON.

Like a program that uses the database, such a process imports neither torch nor what the other benchmarks are made of.
Every probe checks what it has read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import sqlite3
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

import backprompt_db as bp
from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import EvictionCandidate, Selection
from backprompt_db.database.reconcile import Reindexing
from backprompt_db.operations import reindex as reindexing
from backprompt_db.operations.stats import gather
from backprompt_db.prompt.ids import Address
from backprompt_db.prompt.representation import Arrays, Part
from backprompt_db.store.contract import Key
from benchmarks.scale_data import is_same, kv, origin, scores

NUM_LOOKUPS = 500
NUM_WARM = 20
"""Lookups that are not counted: the first ones find the code, not the data."""
READING_SECONDS = 2.0
"""How long each of the processes reads that do so at once."""
NUM_READ = 1_000
"""Representations of which each of them reads scores, in a random order, again and again."""

_DAY = 86_400.0
_GRACE_SECONDS = 3_600.0
_USES = "SELECT address, scores_nbytes, compute_seconds, coalesce(last_used_at, created_at) FROM representations"

Answer = dict[str, Any]


def lookup(directory: Path, num_representations: int) -> Answer:
    """Time fetches of scores that this process has not touched before, one by one."""
    numbers = random.sample(range(num_representations), NUM_WARM + NUM_LOOKUPS)
    origins = [origin(number) for number in numbers]
    addresses = [each.address for each in origins]
    seconds, found = [], {}
    with bp.open(directory, memory_nbytes=0) as db:
        for address in addresses:
            began = time.perf_counter()
            found.update(db.fetch({address: [Part.SCORES]}))
            seconds.append(time.perf_counter() - began)
        assert db.counters.num_misses == 0
    assert all(is_same(found[Key(each.address, Part.SCORES)], scores(each)) for each in origins)
    return {"seconds": statistics.median(seconds[NUM_WARM:])}


def opening(directory: Path, num_representations: int) -> Answer:
    """Time opening, up to the first hit, when everything is imported."""
    one = origin(random.randrange(num_representations))
    key = Key(one.address, Part.SCORES)
    open_database = bp.open  # names of the package are imported when they are first used
    began = time.perf_counter()
    with open_database(directory) as db:
        found = db.fetch({key.address: [key.part]})
        seconds = time.perf_counter() - began
    assert is_same(found[key], scores(one))
    return {"seconds": seconds}


def stats(directory: Path, num_representations: int) -> Answer:
    """Time what `stats` shows, and check it against sums over the store's own keys."""
    began = time.perf_counter()
    found = gather(directory)
    seconds = time.perf_counter() - began
    assert found.catalog_problem is None
    with bp.open(directory, memory_nbytes=0) as db:
        sizes = [nbytes for _, nbytes in db.store.keys()]
    assert (found.num_representations, found.nbytes[Part.SCORES]) == (len(sizes), sum(sizes))
    assert len(sizes) == num_representations
    return {"seconds": seconds, "nbytes": sum(sizes)}


def eviction_order(directory: Path, num_representations: int) -> Answer:
    """Time choosing a tenth of the bytes: as far as one call goes, and all of it; against the formula over all rows."""
    path, at = directory / "catalog.sqlite", time.time()
    limits = {"one call": 10_000, "all": num_representations}
    chosen, answer = dict[str, list[EvictionCandidate]](), Answer()
    with Catalog.open(path) as catalog:
        sum_nbytes = catalog.totals().nbytes[Part.SCORES]
        for name, limit in limits.items():
            began = time.perf_counter()
            chosen[name] = catalog.eviction_order(sum_nbytes // 10, at=at, grace_seconds=_GRACE_SECONDS, limit=limit)
            answer[name] = time.perf_counter() - began
    worths = _worths(path, at=at)  # not before: the garbage collector would look at a million of them meanwhile
    expected = sorted(worths.values())
    for name, limit in limits.items():
        assert [worths[candidate.address] for candidate in chosen[name]] == expected[: len(chosen[name])]
        nbytes = sum(candidate.nbytes for candidate in chosen[name])
        assert len(chosen[name]) == limit or sum_nbytes // 10 <= nbytes < sum_nbytes // 10 + 2_000
    return answer


def _worths(path: Path, *, at: float) -> dict[bytes, tuple[bool, float]]:
    """Return what each representation's scores are worth, those of the last hour the most."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(_USES).fetchall()
    return {
        address: (at - _GRACE_SECONDS < used_at, seconds / nbytes / (1.0 + (at - used_at) / _DAY))
        for address, nbytes, seconds, used_at in rows
    }


def listing(directory: Path, num_representations: int) -> Answer:
    """Time listing the newest 20, and finding one by the beginning of its address, with a catalog that is open."""
    one = origin(random.randrange(num_representations))
    with Catalog.open(directory / "catalog.sqlite", readonly=True) as catalog:
        began = time.perf_counter()
        newest = catalog.rows(limit=20)
        listed = time.perf_counter()
        found = catalog.find(one.address.hex()[:12])
        ended = time.perf_counter()
        recorded_at = [row.created_at for row in catalog.select(Selection(address_prefix=one.address.hex()[:2]))]
    assert len(newest) == 20
    assert newest[0].created_at >= max(recorded_at)
    assert [(row.address, row.text) for row in found] == [(one.address, one.text)]
    return {"ls": listed - began, "find": ended - listed}


def memory(directory: Path, num_representations: int) -> Answer:
    """Measure what an idle process holds when it has the database open and has found something there, and before."""
    one = origin(random.randrange(num_representations))
    open_database = bp.open
    before = _resident_nbytes()
    with open_database(directory) as db:
        found = db.fetch({one.address: [Part.SCORES]})
        assert db.catalog is not None
        after = _resident_nbytes()
    assert is_same(found[Key(one.address, Part.SCORES)], scores(one))
    return {"before": before, "after": after}


def _resident_nbytes() -> int:
    return int(psutil.Process().memory_info().rss)


def reindex(directory: Path, num_representations: int) -> Answer:
    """Time reindexing, with the catalog that is there or without; it must have added what that lacked, and no more."""
    was_there = (directory / "catalog.sqlite").exists()
    with bp.open(directory) as db:
        began = time.perf_counter()
        done = reindexing.reindex(db)
        seconds = time.perf_counter() - began
    assert done == Reindexing(0 if was_there else num_representations, 0, 0, None)
    assert gather(directory).num_representations == num_representations
    return {"seconds": seconds}


def read_scores(directory: Path, num_representations: int) -> Answer:
    """Read scores beside other processes that do the same."""
    origins = [
        origin(number) for number in random.sample(range(num_representations), min(num_representations, NUM_READ))
    ]
    return _read(directory, Part.SCORES, {each.address: scores(each) for each in origins})


def read_kv(directory: Path, num_representations: int) -> Answer:
    """Read keys and values beside other processes that do the same."""
    origins = [origin(number) for number in range(num_representations)]
    return _read(directory, Part.KV, {each.address: kv(each) for each in origins})


def _read(directory: Path, part: Part, expected: dict[Address, Arrays]) -> Answer:
    """Check all of it, then, when the caller says so, read for a while."""
    seconds, nbytes = list[float](), 0
    with bp.open(directory, memory_nbytes=0) as db:
        assert all(is_same(db.fetch({key: [part]})[Key(key, part)], arrays) for key, arrays in expected.items())
        order = itertools.cycle(random.sample(sorted(expected), len(expected)))
        print("ready", flush=True)
        input()
        began = time.perf_counter()
        while (now := time.perf_counter()) < began + READING_SECONDS:
            [arrays] = db.fetch({next(order): [part]}).values()
            seconds.append(time.perf_counter() - now)
            nbytes += sum(array.nbytes for array in arrays.values())
        taken = time.perf_counter() - began
        assert db.counters.num_misses == 0
    return {"rate": len(seconds) / taken, "nbytes_rate": nbytes / taken, "latency": statistics.median(seconds)}


PROBES: dict[str, Callable[[Path, int], Answer]] = {
    probe.__name__: probe
    for probe in (lookup, opening, stats, eviction_order, listing, memory, reindex, read_scores, read_kv)
}


if __name__ == "__main__":
    _, name, directory, number = sys.argv
    print(json.dumps(PROBES[name](Path(directory), int(number))))
