"""The roles that every round has: who writes, who reads, and who tidies up."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial

import backprompt_db as bp
from backprompt_db.errors import StoreFull, StoreLocked
from backprompt_db.operations.reindex import reindex
from backprompt_db.operations.stats import gather
from backprompt_db.operations.verify import Checks, Found, verify
from tests.support.faults import prompt
from tests.torture.journal import acknowledged
from tests.torture.values import new_parts
from tests.torture.worker import Worker

_MOST_PROMPTS_PER_FLUSH = 6
_SECONDS_BETWEEN_LOOKS = 0.5
_LONGEST_PAUSE_SECONDS = 0.02


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
            worker.fork(partial(worker.read_some, db, known))
        else:
            worker.read_some(db, known)
        worker.note_counters(before, db.counters)
        worker.journal.beat()
        time.sleep(worker.dice.random() * _LONGEST_PAUSE_SECONDS)


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
