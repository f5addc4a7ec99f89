"""Forks: a parent that has the database open in one way, and a child that goes on with it or opens it in another."""

from __future__ import annotations

import itertools
from functools import partial

import backprompt_db as bp
from backprompt_db.database.database import Database
from backprompt_db.errors import StoreFull
from tests.support.faults import keys_of, prompt, wanted_of
from tests.torture.journal import acknowledged
from tests.torture.values import new_parts
from tests.torture.worker import Worker

_WAYS = ("r", "a", "base")
"""For reading, for writing, below another database of this process."""


def fork(worker: Worker) -> None:
    """Open the database in some way, fork, use it in the child in any way, and go on."""
    for number in itertools.count(worker.first_number, 2):
        way = worker.dice.choice(_WAYS)
        with _opened(worker, way) as db:
            worker.read_some(db, acknowledged(worker.journals))
            worker.fork(partial(_be_a_child, worker, db, way, number))
            _use(worker, db, way, number + 1)
        worker.journal.counts["openings"] += 1
        worker.journal.beat()


def _opened(worker: Worker, way: str) -> Database:
    if way == "base":
        return bp.open(worker.place.with_name(f"front of {worker.name}"), base=worker.place, memory_nbytes=0)
    return bp.open(worker.place, mode=way, memory_nbytes=0)


def _be_a_child(worker: Worker, db: Database, parents: str, number: int) -> None:
    child = worker.dice.choice(["goes on", *_WAYS])
    if child == "goes on":
        _use(worker, db, parents, number)
        return
    with _opened(worker, child) as own:
        _use(worker, own, child, number)
    worker.read_some(db, acknowledged(worker.journals))


def _use(worker: Worker, db: Database, way: str, number: int) -> None:
    """Read something, and write something unless the database is only to be read."""
    before = db.counters
    worker.read_some(db, acknowledged(worker.journals))
    if way != "r":
        _write(worker, db, way, number)
    worker.note_counters(before, db.counters)


def _write(worker: Worker, db: Database, way: str, number: int) -> None:
    some = prompt(number, author=worker.name)
    db.put(new_parts(some))
    try:
        db.flush()
    except StoreFull as error:
        if not worker.is_limited:
            worker.journal.problem("a write failed", error)
        return
    if way == "a":
        worker.journal.acknowledge([number])
    if not worker.is_limited and len(db.fetch(wanted_of(some))) < len(keys_of(some)):
        worker.journal.problem("a prompt is not there after it was written", way, number)
