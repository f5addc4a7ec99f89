"""Writers that put far more than the limit through one database, beside a reader."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import backprompt_db as bp
from backprompt_db.database.creating import create_database
from backprompt_db.database.database import Database
from backprompt_db.database.writer import NewPart
from backprompt_db.operations.inspection import inspect
from backprompt_db.prompt.ids import TokenizerId, WeightsId, address
from backprompt_db.prompt.representation import OWN_PARTS, Array, Arrays, Origin, Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.prompt.text import Text
from backprompt_db.store.contract import Key, needs_of
from benchmarks.report import Measurement

LIMIT_NBYTES = 300_000_000
TOTAL_NBYTES = int(os.environ.get("BACKPROMPT_BENCH_CHURN_NBYTES", "10000000000"))
NUM_WRITERS = 4
NUM_CONTEXTS = 30
REQUESTS_PER_SECTION = 8
NBYTES_PER_REQUEST = 2_000_000
"""About, of one writer, with its share of the section: the reader looks only where something may have been."""
MAX_FILE_SHARE = 1.25
GROWTH_BOUND = 1.5
"""The 99th percentile of the last third of the puts over that of the first; noise on a shared machine is most of it."""

TIMEOUT_SECONDS = 3600
_WEIGHTS, _TOKENIZER = WeightsId(b"w" * 32), TokenizerId(b"t" * 32)
_NUM_TOKENS = {0: 900, 1: 200, 2: 60}
"""How many tokens a context, a section and a request have; 4 KiB of keys and values for each token."""

_SPAWN: Any = multiprocessing.get_context("spawn")


class Work(NamedTuple):
    """What one writer did."""

    nbytes: int
    latencies: list[float]
    """Seconds from putting a prompt until it was on disk, in order."""
    num_refused: int
    num_orphaned: int
    num_evicted: int


class Looks(NamedTuple):
    """What the reader saw."""

    num_read: int
    num_wrong: int


def churn(directory: Path) -> list[Measurement]:
    """Put 10 GB through a limit of 300 MB from four processes, while a fifth reads and checks every value."""
    place = directory / "scratch" / "churn"
    create_database(place, limits={"max_nbytes": LIMIT_NBYTES, "grace_seconds": 1.0})
    stop, queue = _SPAWN.Event(), _SPAWN.Queue()
    largest = _Largest(place / "store" / "data.mdb")
    reader = _SPAWN.Process(target=_read, args=(place, stop, queue), daemon=True)
    writers = [_SPAWN.Process(target=_write, args=(place, number, queue), daemon=True) for number in range(NUM_WRITERS)]
    began = time.monotonic()
    for process in (reader, *writers):
        process.start()
    works: list[Work] = [queue.get(timeout=TIMEOUT_SECONDS) for _ in writers]
    seconds = time.monotonic() - began
    stop.set()
    looks: Looks = queue.get(timeout=TIMEOUT_SECONDS)
    for process in (reader, *writers):
        process.join()
    assert looks.num_read > 0
    assert looks.num_wrong == 0
    with bp.open(place) as db:
        assert _dangling(db) == []
    return _figures(works, looks, seconds, largest.stop())


def _figures(works: list[Work], looks: Looks, seconds: float, largest_nbytes: int) -> list[Measurement]:
    nbytes = sum(work.nbytes for work in works)
    first = [latency for work in works for latency in work.latencies[: len(work.latencies) // 3]]
    last = [latency for work in works for latency in work.latencies[-len(work.latencies) // 3 :]]
    early, late = (float(np.percentile(each, 99)) for each in (first, last))
    median = statistics.median(latency for work in works for latency in work.latencies)
    what = f"{NUM_WRITERS} writers, {nbytes / 1e9:.1f} GB through a limit of {LIMIT_NBYTES / 1e6:.0f} MB"
    counts = (
        f"{sum(work.num_evicted for work in works):,} parts evicted, {sum(work.num_orphaned for work in works):,} left"
        f" out because what they build on was gone, {sum(work.num_refused for work in works):,} refused"
    )
    latencies = f"{early * 1e3:.0f} / {late * 1e3:.0f} ms, median {median * 1e3:.0f} ms"
    return [
        Measurement(
            "churn, file",
            f"{what}: the largest that the file ever was, over the limit",
            largest_nbytes / LIMIT_NBYTES,
            "x",
            MAX_FILE_SHARE,
            is_lower_better=True,
        ),
        Measurement("churn, throughput", f"{what}, {counts}", nbytes / seconds / 1e6, "MB/s"),
        Measurement(
            "churn, latency",
            f"{what}: the 99th percentile of put and flush, last third over first ({latencies})",
            late / early,
            "x",
            GROWTH_BOUND,
            is_lower_better=True,
        ),
        Measurement(
            "churn, wrong values",
            f"{what}: of {looks.num_read:,} values read meanwhile; no descendant dangles at the end",
            looks.num_wrong,
            "",
            0,
            is_lower_better=True,
        ),
    ]


class _Largest:
    """Looks at the size of a file every few milliseconds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._largest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._largest

    def _look(self) -> None:
        while not self._stop.wait(0.005):
            self._largest = max(self._largest, self._path.stat().st_size)


def _write(place: Path, number: int, queue: Any) -> None:
    latencies, nbytes, num_refused = list[float](), 0, 0
    with bp.open(place, memory_nbytes=0) as db:
        for section in itertools.count():
            parts = _missing(db, number, section)
            began = time.monotonic()
            db.put(parts)
            try:
                db.flush()
            except bp.errors.StoreFull:
                num_refused += 1
            latencies.append(time.monotonic() - began)
            nbytes += sum(part.nbytes for part in parts)
            if nbytes > TOTAL_NBYTES / NUM_WRITERS:
                break
        counters = db.counters
    queue.put(Work(nbytes, latencies, num_refused, counters.num_orphaned, counters.num_evicted))


def _missing(db: Database, writer: int, section: int) -> list[NewPart]:
    """Return what is not stored of the prompts with one section: what one pass of a model gives."""
    requests = range(section * REQUESTS_PER_SECTION, (section + 1) * REQUESTS_PER_SECTION)
    segments = dict.fromkeys(segment for request in requests for segment in _prompt(writer, request))
    missing = [segment for segment in segments if not db.has(_key(segment, Part.KV))]
    return [NewPart(_key(each, part), _contents(each, part), _origin(each)) for each in missing for part in OWN_PARTS]


def _read(place: Path, stop: Any, queue: Any) -> None:
    num_read = num_wrong = 0
    dice = np.random.default_rng(0)
    with bp.open(place, mode="r", memory_nbytes=0) as db:
        while not stop.is_set():
            segments = _prompt(
                int(dice.integers(NUM_WRITERS)), int(dice.integers(max(1, TOTAL_NBYTES // NBYTES_PER_REQUEST)))
            )
            found = db.fetch({_key(segment, Part.KV).address: list(OWN_PARTS) for segment in segments})
            right = {_key(segment, part): (segment, part) for segment in segments for part in OWN_PARTS}
            num_read += len(found)
            num_wrong += sum(not _is_equal(arrays, _contents(*right[key])) for key, arrays in found.items())
    queue.put(Looks(num_read, num_wrong))


def _prompt(writer: int, request: int) -> list[Segment]:
    section = request // REQUESTS_PER_SECTION
    text = Text(f"Context {section % NUM_CONTEXTS}. ") + f"Section {section} of {writer}. " + f"Request {request}."
    return text.segments("")


def _key(segment: Segment, part: Part) -> Key:
    return Key(address(segment.id, _WEIGHTS, _TOKENIZER), part)


def _num_tokens(segment: Segment) -> int:
    depth = 0
    while segment.parents:
        depth, segment = depth + 1, segment.parents[0]
    return _NUM_TOKENS[depth]


def _contents(segment: Segment, part: Part) -> Arrays:
    """The only right values of a part: they follow from its key."""
    num_tokens = _num_tokens(segment)
    dice = np.random.default_rng([*segment.id[:16], *part.value])
    if part is Part.SCORES:
        ids = Array.from_numpy(dice.integers(0, 1000, num_tokens, dtype=np.int32))
        return {"input_ids": ids, "token_logprobs": _floats(dice, num_tokens)}
    if part is Part.LOGITS:
        return {"logits": _floats(dice, 8192)}
    return {name: _floats(dice, 4, 2, num_tokens, 64) for name in ("keys", "values")}


def _floats(dice: np.random.Generator, *shape: int) -> Array:
    return Array("F32", shape, memoryview(dice.bytes(4 * int(np.prod(shape)))))


def _origin(segment: Segment) -> Origin:
    num_tokens = _num_tokens(segment)
    return Origin(segment.string, segment.parent_ids, None, _WEIGHTS, _TOKENIZER, num_tokens, 0.002 * num_tokens)


def _is_equal(found: Arrays, right: Arrays) -> bool:
    return found.keys() == right.keys() and all(found[name].data == right[name].data for name in right)


def _dangling(db: Database) -> list[Key]:
    """Stored keys and values of which those before them are not stored."""
    stored = {key for key, _ in db.store.keys()}
    origins = {key: inspect(db.store, key).origin for key in stored if key.part is Part.KV}
    return [key for key, origin in origins.items() if origin is None or not set(needs_of(key, origin)) <= stored]
