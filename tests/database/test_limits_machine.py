"""A database with a limit, told anything in any order: never a wrong value, never one of no use, never too much."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import backprompt_db as bp
from backprompt_db.catalog.records import Selection
from backprompt_db.codec.blob import encode_pieces
from backprompt_db.database.database import Database
from backprompt_db.errors import StoreFull
from backprompt_db.operations.evict import evict
from backprompt_db.operations.verify import verify
from backprompt_db.prompt.representation import Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.store.contract import Blob, Key, needs_of
from tests.support.faults import LAG, address_of, dangling, keys_of, new_parts, segments, wanted_of, wrong
from tests.support.limits import live, make_limited, stored

MAX_NBYTES = 300_000
HIGH_NBYTES = int(0.95 * MAX_NBYTES)

CHAINS = st.lists(st.sampled_from(range(4)), min_size=1, max_size=4)
PARTS = st.sets(st.sampled_from(Part), min_size=1)


class Killed(BaseException):
    """A process died here."""


def chain_of(numbers: list[int]) -> tuple[Segment, ...]:
    """A chain of texts, of which some are too large for the database."""
    return segments(*(f"Text {number}." for number in numbers))


class LimitMachine(RuleBasedStateMachine):
    """The only right value under each key is known, and what may be missing is all but what was pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.place = make_limited(self.directory / "db", max_nbytes=MAX_NBYTES)
        self.db = self.open()
        self.kept: set[Key] = set()
        """Parts of pinned representations that were stored since they were pinned."""

    def open(self) -> Database:
        return bp.open(self.place, memory_nbytes=0)

    @rule(numbers=CHAINS, parts=PARTS)
    def put(self, numbers: list[int], parts: set[Part]) -> None:
        self.db.put(new_parts(chain_of(numbers), parts))
        with contextlib.suppress(StoreFull):
            self.db.flush()

    @rule(numbers=CHAINS, parts=PARTS)
    def fetch(self, numbers: list[int], parts: set[Part]) -> None:
        some = chain_of(numbers)
        present = stored(self.db) & set(keys_of(some, parts))
        found = self.db.fetch(wanted_of(some, parts))
        assert set(found) == present
        assert wrong(found) == []

    @rule(numbers=CHAINS)
    def pin(self, numbers: list[int]) -> None:
        addresses = {address_of(segment) for segment in chain_of(numbers)}
        assert self.db.catalog is not None
        self.db.evictor.catch_up()  # what is not recorded cannot be pinned
        self.db.catalog.pin(addresses)
        self.kept |= {key for key in stored(self.db) if key.address in addresses}

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted({key.address for key in self.kept})))
        assert self.db.catalog is not None
        self.db.catalog.pin([address], is_pinned=False)
        self.kept = {key for key in self.kept if key.address != address}

    @rule(share=st.sampled_from([0.0, 0.3, 0.9]), number=st.none() | st.integers(0, 3))
    def evict(self, share: float, number: int | None) -> None:
        selection = Selection(text_prefix=None if number is None else f"Text {number}.")
        evict(self.db, to_nbytes=int(share * MAX_NBYTES), selection=selection)

    @rule()
    def close_and_open(self) -> None:
        self.db.close()
        self.db = self.open()

    @rule(numbers=CHAINS, parts=PARTS)
    def be_killed_between_store_and_catalog(self, numbers: list[int], parts: set[Part]) -> None:
        """What another process leaves that has stored a group and did not come to record it."""
        blobs = [
            Blob(part.key, encode_pieces(part.key.part, part.arrays, part.origin), needs_of(part.key, part.origin))
            for part in new_parts(chain_of(numbers), parts)
        ]
        with (
            contextlib.suppress(Killed, StoreFull),
            self.db.evictor.journal.writing([blob.key for blob in blobs]),
        ):
            self.db.store.put(blobs, max_nbytes=HIGH_NBYTES)
            raise Killed

    @invariant()
    def holds_no_more_than_it_may(self) -> None:
        assert live(self.db) <= HIGH_NBYTES

    @invariant()
    def holds_nothing_of_no_use(self) -> None:
        assert dangling(self.db) == []

    @invariant()
    def holds_what_is_pinned(self) -> None:
        assert self.kept <= stored(self.db)

    @invariant()
    def reads_without_failures(self) -> None:
        assert self.db.counters.num_quarantined == self.db.counters.num_read_failures == 0

    def teardown(self) -> None:
        self.db.close()
        try:
            with self.open() as db:
                assert db.catalog is not None
                assert {problem.kind for problem in verify(db).problems} <= LAG
                db.evictor.catch_up()
                assert verify(db).is_clean
        finally:
            shutil.rmtree(self.directory)


TestLimitMachine = LimitMachine.TestCase
