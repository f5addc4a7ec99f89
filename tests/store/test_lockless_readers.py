"""Who may not write to the lock file reads while nobody has the store open, and is told to wait while somebody has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import backprompt_db as bp
from backprompt_db.database.database import Database
from tests.support.databases import new_part
from tests.support.faults import IN_OTHER_SHOES, child, next_line, public_directory, run

assert sys.platform != "win32"

READER = (
    "import backprompt_db.catalog.catalog, backprompt_db.database.opening\n"
    + IN_OTHER_SHOES
    + """
db = bp.open(place, mode='r', memory_nbytes=0)
def look():
    before, found = db.counters, values(db.fetch(wanted('a')))
    assert found in ({}, expected('a'))
    after = db.counters
    print(after.num_hits - before.num_hits, after.num_misses - before.num_misses,
          after.num_read_failures - before.num_read_failures, after.num_quarantined, flush=True)
for _ in sys.stdin:
    look()
"""
)
HIT, REFUSED = "1 0 0 0", "0 1 1 0"


def let_others_read(place: Path, *, lock_mode: int = 0o644) -> None:
    for path in [*place.rglob("*"), place]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    (place / "store" / "lock.mdb").chmod(lock_mode)


@pytest.fixture
def place() -> Iterator[Path]:
    """A database with one part in it, which others may read."""
    with public_directory() as directory:
        with bp.open(directory / "db") as db:
            db.put([new_part("a")])
        let_others_read(directory / "db")
        yield directory / "db"


def ask(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return next_line(process)


def test_a_reader_without_a_lock_waits_for_the_end_of_a_writer(place: Path) -> None:
    with child(READER, place) as reader:
        assert ask(reader) == HIT
        with bp.open(place) as writer:
            assert ask(reader) == REFUSED, "a writer that does nothing may begin to write at any moment"
            writer.put([new_part("b")])
            writer.flush()
            assert ask(reader) == REFUSED
        assert ask(reader) == HIT
        with bp.open(place):
            assert ask(reader) == REFUSED


def test_a_reader_without_a_lock_may_come_while_somebody_writes(place: Path) -> None:
    with bp.open(place), child(READER, place) as reader:
        assert ask(reader) == REFUSED
    with child(READER, place) as reader:
        assert ask(reader) == HIT


def test_who_may_write_to_the_lock_file_reads_beside_a_writer(place: Path) -> None:
    (place / "store" / "lock.mdb").chmod(0o666)
    with bp.open(place) as writer, child(READER, place) as reader:
        assert ask(reader) == HIT
        writer.put([new_part("b")])
        writer.flush()
        assert ask(reader) == HIT


def test_without_a_lock_file_nobody_writes(place: Path) -> None:
    (place / "store" / "lock.mdb").unlink()
    with child(READER, place) as reader:
        assert ask(reader) == HIT
        with bp.open(place):
            (place / "store" / "lock.mdb").chmod(0o644)
            assert ask(reader) == REFUSED, "the writer has made one"
        assert ask(reader) == HIT


def test_a_lock_file_that_may_not_be_looked_at_says_nothing_so_nothing_is_read(place: Path) -> None:
    (place / "store" / "lock.mdb").chmod(0o600)
    with child(READER, place) as reader:
        assert ask(reader) == REFUSED


def test_a_strict_reader_is_told_what_to_ask_for(place: Path) -> None:
    script = (
        "import backprompt_db.database.opening\n" + IN_OTHER_SHOES + "db = bp.open(place, mode='r', strict=True)\n"
        "try:\n    db.fetch(wanted('a'))\nexcept bp.BackpromptError as error:\n    print(type(error).__name__, error)"
    )
    with bp.open(place):
        words, _ = run(script, place)
    told = " ".join(words)
    assert told.startswith("StoreLocked ")
    assert f"{place / 'store'} is open elsewhere, and you may not write to its lock.mdb" in told
    assert "`backprompt-db config --shared readers`" in told


OVERTAKEN = (
    "from backprompt_db.errors import StoreLocked\nfrom backprompt_db.store.environment import shared_environment\n"
    + IN_OTHER_SHOES
    + """
environment = shared_environment(Path(place) / 'store', readonly=True)
try:
    with environment.transaction() as transaction:
        transaction.get(b'something')
        print('reading', flush=True)
        sys.stdin.readline()
    print('right')
except StoreLocked:
    print('wrong')
"""
)


@pytest.mark.parametrize(("num_commits", "verdict"), [(0, "right"), (1, "right"), (2, "wrong"), (5, "wrong")])
def test_what_was_read_while_somebody_came_wrote_and_went_is_not_trusted(
    place: Path, num_commits: int, verdict: str
) -> None:
    with child(OVERTAKEN, place) as reader:
        assert next_line(reader) == "reading"
        with bp.open(place) as writer:
            for number in range(num_commits):
                put(writer, str(number))
        assert ask(reader) == verdict


def put(db: Database, text: str) -> None:
    db.put([new_part(text)])
    db.flush()


@pytest.fixture
def readonly_place(place: Path) -> Iterator[Path]:
    """The same database, where nobody can write."""
    mounted = place.parent / "mounted"
    mounted.mkdir()
    commands = (["mount", "--bind"], [str(place), str(mounted)]), (["mount", "-o", "remount,bind,ro"], [str(mounted)])
    for command, places in commands:
        if os.geteuid() or subprocess.run([*command, *places], check=False, capture_output=True).returncode:
            pytest.skip("nothing can be mounted")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)  # noqa: S607


def test_on_a_read_only_filesystem_who_writes_elsewhere_is_seen(place: Path, readonly_place: Path) -> None:
    with child(READER.replace(IN_OTHER_SHOES, ""), readonly_place) as reader:
        assert ask(reader) == HIT
        with bp.open(place):
            assert ask(reader) == REFUSED
        assert ask(reader) == HIT
        (place / "store" / "lock.mdb").unlink()
        assert ask(reader) == HIT
