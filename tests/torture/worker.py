"""One process of the torture: `python -m tests.torture.worker DIRECTORY ROLE NAME INCARNATION SEED LOST|KEPT`."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

import backprompt_db as bp
from backprompt_db.codec.kv_reader import KVSpan
from backprompt_db.database.database import Database
from backprompt_db.errors import BackpromptError, StoreFull, StoreLocked
from backprompt_db.operations.reindex import reindex
from backprompt_db.operations.stats import gather
from backprompt_db.operations.verify import Checks, Found, verify
from backprompt_db.prompt.representation import Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.store.contract import Key
from tests.support.faults import address_of, contents, keys_of, new_parts, num_tokens_at, prompt, wanted_of, wrong
from tests.torture.journal import Journal, acknowledged

assert sys.platform != "win32"

NUMBERS_PER_INCARNATION = 1_000_000
_MOST_PROMPTS_PER_FLUSH = 6
_SECONDS_BETWEEN_LOOKS = 0.5
_LONGEST_PAUSE_SECONDS = 0.02


class Worker:
    """What every role has: a database that is opened again now and then, dice, and a journal."""

    def __init__(self, directory: Path, name: str, *, incarnation: int, seed: int, is_limited: bool) -> None:
        self.place = directory / "db"
        self.journals = directory / "journals"
        self.name = name
        self.is_limited = is_limited
        self.first_number = incarnation * NUMBERS_PER_INCARNATION
        self.journal = Journal(self.journals / f"{name}.{incarnation}")
        self.dice = random.Random(f"{seed} {name} {incarnation}")
        self._db: Database | None = None

    @property
    def db(self) -> Database:
        """The database, now and then a new handle; with or without memory."""
        if self._db is None or self.dice.random() < 0.02:
            if self._db is not None:
                self._db.close()
            self._db = bp.open(self.place, memory_nbytes=self.dice.choice([0, 50_000_000]))
            self.journal.counts["openings"] += 1
        return self._db

    def look(self, db: Database, some: Sequence[Segment]) -> list[Segment]:
        """Read segments and check every value; return those of which something is missing."""
        found = db.fetch(wanted_of(some))
        self._count_checked(list(found), wrong(found))
        return [segment for segment in some if not all(key in found for key in keys_of([segment]))]

    def look_in_place(self, db: Database, segment: Segment) -> None:
        """Read keys and values the way a model does."""
        (key,) = keys_of([segment], [Part.KV])
        shape = (1, 2, num_tokens_at(address_of(segment)), 16)
        span = KVSpan(np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32))
        if db.load(key, span, "F32"):
            right = contents(key)
            is_right = all(
                read.tobytes() == bytes(right[name].data)
                for name, read in (("keys", span.keys), ("values", span.values))
            )
            self._count_checked([key], [] if is_right else [key])

    def _count_checked(self, found: Sequence[Key], wrong_keys: Sequence[Key]) -> None:
        self.journal.counts["checked"] += len(found)
        self.journal.counts["wrong"] += len(wrong_keys)
        for key in wrong_keys:
            self.journal.problem("wrong value", key.address.hex(), key.part.name)

    def note_counters(self, before: bp.Counters, after: bp.Counters) -> None:
        """Add what a handle has counted."""
        for name in ("num_hits", "num_misses", "num_quarantined", "num_read_failures", "num_evicted", "num_orphaned"):
            self.journal.counts[name] += getattr(after, name) - getattr(before, name)
        if after.num_quarantined > before.num_quarantined or after.num_read_failures > before.num_read_failures:
            self.journal.problem("damage or a failure to read where nothing was damaged", after)


def write(worker: Worker) -> None:
    """Compute what is missing of prompts, a few at a time, and write down which were acknowledged."""
    numbers = itertools.count(worker.first_number)
    while True:
        db = worker.db
        before = db.counters
        some = list(itertools.islice(numbers, worker.dice.randint(1, _MOST_PROMPTS_PER_FLUSH)))
        for number in some:
            missing = worker.look(db, prompt(number, author=worker.name))
            db.put(new_parts(missing))
        try:
            db.flush()
            worker.journal.acknowledge(some)
        except StoreFull as error:
            worker.journal.counts["full"] += 1
            if not worker.is_limited:
                worker.journal.problem("a write failed", error)
        worker.note_counters(before, db.counters)
        worker.journal.beat()


def read(worker: Worker) -> None:
    """Read what was acknowledged to anyone, sometimes in a forked child."""
    known, looked_at = acknowledged(worker.journals), time.monotonic()
    while True:
        if time.monotonic() - looked_at > _SECONDS_BETWEEN_LOOKS or not known:
            known, looked_at = acknowledged(worker.journals), time.monotonic()
        db = worker.db
        before = db.counters
        if worker.dice.random() < 0.01:
            _in_child(worker, partial(_read_some, worker, db, known))
        else:
            _read_some(worker, db, known)
        worker.note_counters(before, db.counters)
        worker.journal.beat()
        time.sleep(worker.dice.random() * _LONGEST_PAUSE_SECONDS)


def _read_some(worker: Worker, db: Database, known: Sequence[tuple[str, int]]) -> None:
    for author, number in worker.dice.choices(known, k=8) if known else ():
        some = prompt(number, author=author)
        if worker.dice.random() < 0.3:
            worker.look_in_place(db, worker.dice.choice(some))
            continue
        missing = worker.look(db, some)
        if missing and not worker.is_limited:
            worker.journal.problem("lost", author, number, [segment.string for segment in missing])
            worker.journal.counts["lost"] += 1


def _in_child(worker: Worker, work: Callable[[], None]) -> None:
    worker.journal.counts["forks"] += 1
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        worker.journal.problem("a forked child failed")


def tidy(worker: Worker) -> None:
    """Verify, reindex, compact, evict, look at statistics: whatever comes up."""
    chores = CHORES | CHORES_THAT_LOSE if worker.is_limited else CHORES
    while True:
        name, chore = worker.dice.choice(list(chores.items()))
        try:
            chore(worker)
            worker.journal.counts[name] += 1
        except StoreLocked:  # another one is at it
            worker.journal.counts["locked"] += 1
        worker.journal.beat()
        time.sleep(worker.dice.random() * 0.2)


def _verify(worker: Worker) -> None:
    found = verify(worker.db, checks=Checks(share=0.1))
    if found.found & ~Found.CATALOG:
        worker.journal.problem("verify found", found.problems, found.store_problem)


def _open_and_close(worker: Worker) -> None:
    for _ in range(20):
        bp.open(worker.place).close()
        worker.journal.counts["openings"] += 1


def _compact(worker: Worker) -> None:
    worker.db.store.compact()


def _evict(worker: Worker) -> None:
    live_nbytes = worker.db.store.usage().live_nbytes
    worker.db.evictor.evict(to_nbytes=int(live_nbytes * worker.dice.uniform(0.5, 1.0)))


CHORES: dict[str, Callable[[Worker], object]] = {
    "verifications": _verify,
    "reindexings": lambda worker: reindex(worker.db),
    "compactions": _compact,
    "statistics": lambda worker: gather(worker.place),
    "openings in a row": _open_and_close,
}
CHORES_THAT_LOSE: dict[str, Callable[[Worker], object]] = {"evictions": _evict}
ROLES = {"writer": write, "reader": read, "janitor": tidy}


def main() -> None:
    """Work until something ends this process."""
    directory, role, name, incarnation, seed, limit = sys.argv[1:]
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    worker = Worker(Path(directory), name, incarnation=int(incarnation), seed=int(seed), is_limited=limit == "limited")
    if worker.dice.random() < 0.5:  # one of two ways to end at SIGTERM
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        ROLES[role](worker)
    except BackpromptError as error:
        worker.journal.problem(type(error).__name__, error)
        raise
    finally:
        with contextlib.suppress(BackpromptError):
            worker.journal.beat()


if __name__ == "__main__":
    main()
