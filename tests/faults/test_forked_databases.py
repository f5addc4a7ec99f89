"""A database that a process has open in one way, and a child that was forked from it in another."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import backprompt_db as bp
from backprompt_db.database.database import Database
from backprompt_db.operations.evict import compact
from tests.conftest import cases
from tests.support.faults import garbage, keys_of, new_parts, prompt, put_prompts, wanted_of, wrong

assert sys.platform != "win32"

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

WAYS = ["r", "a", "base"]
"""Ways to have a database open: for reading, for writing, below another one."""

MEANWHILE = ["nothing", "a compaction before the fork", "a compaction after the fork"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A database with one prompt, and pages that a compaction gives back."""
    with bp.open(tmp_path / "db") as db:
        put_prompts(db, [0])
        db.put(new_parts(garbage()))
        db.flush()
        db.store.delete(keys_of(garbage()))
    return tmp_path / "db"


def opened(place: Path, way: str) -> Database:
    if way == "base":
        return bp.open(place.parent / f"front of {os.getpid()}", base=place, memory_nbytes=0)
    return bp.open(place, mode=way, memory_nbytes=0)


def fork(work: Callable[[], None]) -> int:
    """Start a child that ends when it has done its work, with 0 unless that failed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - it must not go on as the test
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return child


@contextlib.contextmanager
def compactor(place: Path) -> Iterator[Callable[[], None]]:
    """Another process, which has nothing of this one's open, and compacts the database when it is told to."""
    ours, theirs = os.pipe()

    def wait_and_compact() -> None:
        os.close(theirs)
        if os.read(ours, 1):
            with bp.open(place) as db:
                compact(db)
        os.close(answer_theirs)

    answer_ours, answer_theirs = os.pipe()
    child = fork(wait_and_compact)
    os.close(answer_theirs)

    def tell() -> None:
        before = (place / "store" / "data.mdb").stat().st_ino
        os.write(theirs, b"!")
        os.read(answer_ours, 1)  # which ends when the child closes it
        assert (place / "store" / "data.mdb").stat().st_ino != before

    try:
        yield tell
    finally:
        os.close(theirs)
        assert os.waitpid(child, 0)[1] == 0


def assert_found(db: Database, *numbers: int) -> None:
    """These prompts are there, here or below, and right."""
    for number in numbers:
        found = db.fetch(wanted_of(prompt(number)))
        assert set(found) == set(keys_of(prompt(number))), number
        assert wrong(found) == []
    assert (db.counters.num_read_failures, db.counters.num_write_failures, db.counters.num_quarantined) == (0, 0, 0)


def use(db: Database, *, number: int, is_read_only: bool) -> None:
    """Read what is there, and write something."""
    assert_found(db, 0)
    assert db.readonly is is_read_only
    if not is_read_only:
        put_prompts(db, [number])
        assert db.counters.num_stored > 0
        assert_found(db, 0, number)


OPENING = [f"opens as {way}" for way in WAYS]
PRODUCT = list(itertools.product(WAYS, [*OPENING, "goes on"], MEANWHILE))


@pytest.mark.parametrize(
    "case", cases(PRODUCT, by_default=[each for each in PRODUCT if each[2] != MEANWHILE[2]]), ids=", ".join
)
def test_a_child_opens_or_uses_what_its_parent_has_open(place: Path, case: tuple[str, str, str]) -> None:
    parents, child, meanwhile = case
    with compactor(place) as compact_elsewhere, opened(place, parents) as db:
        assert_found(db, 0)
        if meanwhile == MEANWHILE[1]:
            compact_elsewhere()

        def work() -> None:
            if meanwhile == MEANWHILE[2]:
                compact_elsewhere()
            if child == "goes on":
                use(db, number=1, is_read_only=parents == "r")
            else:
                way = child.removeprefix("opens as ")
                with opened(place, way) as own:
                    use(own, number=1, is_read_only=way == "r")
                assert_found(db, 0)

        assert os.waitpid(fork(work), 0)[1] == 0
        use(db, number=2, is_read_only=parents == "r")
    is_kept_here = child == "opens as a" or (child == "goes on" and parents == "a")
    with bp.open(place) as db:
        assert_found(db, *([0, 1] if is_kept_here else [0]))
