"""What every process of the torture has: a database that is opened again now and then, dice, and a journal."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import backprompt_db as bp
from backprompt_db.database.database import Database
from backprompt_db.prompt.representation import Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.store.contract import Key
from tests.support.faults import address_of, keys_of, prompt, wanted_of
from tests.torture.journal import Acknowledged, Journal
from tests.torture.values import dtype_of, empty_span, is_right_in_place, wrong

NUMBERS_PER_INCARNATION = 1_000_000


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
        self._count_checked(list(found), wrong(found, db.fidelity))
        return [segment for segment in some if not all(key in found for key in keys_of([segment]))]

    def look_in_place(self, db: Database, segment: Segment) -> None:
        """Read keys and values the way a model does."""
        (key,) = keys_of([segment], [Part.KV])
        span = empty_span(address_of(segment))
        if db.load(key, span, dtype_of(key.address)):
            self._count_checked([key], [] if is_right_in_place(key, span, db.fidelity) else [key])

    def read_some(self, db: Database, known: Sequence[Acknowledged]) -> None:
        """Read some of what was acknowledged, which must be there unless there is a limit."""
        for author, number in self.dice.choices(known, k=8) if known else ():
            some = prompt(number, author=author)
            if self.dice.random() < 0.3:
                self.look_in_place(db, self.dice.choice(some))
                continue
            missing = self.look(db, some)
            if missing and not self.is_limited:
                self.journal.problem("lost", author, number, [segment.string for segment in missing])
                self.journal.counts["lost"] += 1

    def fork(self, work: Callable[[], None]) -> None:
        """Do something in a forked child, and wait for it."""
        self.journal.counts["forks"] += 1
        if sys.platform == "win32":
            raise NotImplementedError("nothing forks here")
        else:  # noqa: RET506 - so that mypy knows what is there on which platform
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    work()
                    code = 0
                finally:
                    os._exit(code)
            if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
                self.journal.problem("a forked child failed")

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
