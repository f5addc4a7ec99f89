"""What a killed process has stored and not recorded, the next one enters; and nobody waits for ever for a lock."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import backprompt_db as bp
from backprompt_db.database.config import Limits, read_config, write_config
from backprompt_db.database.database import Database
from backprompt_db.database.journal import WriteJournal, keys_of_entry
from backprompt_db.errors import StoreError, StoreLocked, UnsafeLocation
from backprompt_db.operations.verify import verify
from backprompt_db.prompt.representation import Part
from tests.support.faults import (
    address_of,
    assert_reads_back,
    child,
    dangling,
    keys_of,
    new_parts,
    prompt,
    put_prompts,
    run_to_its_end,
    segments,
    wait_until_stopped,
)
from tests.support.limits import assert_sound, assert_whole, put, stored

assert sys.platform != "win32"

WRITE = "db = bp.open(place)\nput_prompts(db, [0], author='who dies')\n"
POINTS = ["store.put.after", "catalog.record.inside"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A database with one prompt."""
    with bp.open(tmp_path / "db") as db:
        put_prompts(db, [0])
    return tmp_path / "db"


def entries(place: Path) -> list[Path]:
    return sorted((place / "pending").iterdir())


def recorded(db: Database) -> set[tuple[bytes, Part]]:
    assert db.catalog is not None
    return set(db.catalog.keys())


def die(place: Path, point: str, *, script: str = WRITE) -> None:
    code, _, log = run_to_its_end(script, place, failpoint=f"{point}=kill")
    assert code == -signal.SIGKILL, log


class TestKilled:
    @pytest.mark.parametrize("point", POINTS)
    def test_the_next_writer_enters_what_was_stored(self, place: Path, point: str) -> None:
        die(place, point)
        [entry] = entries(place)
        assert set(keys_of_entry(entry) or ()) <= set(keys_of(prompt(0, author="who dies")))
        with bp.open(place) as db:
            assert set() < stored(db) - recorded(db) <= set(keys_of_entry(entry) or ())
            put_prompts(db, [1])
            assert recorded(db) == stored(db)
            assert entries(place) == []
            assert verify(db).is_clean
            assert_reads_back(db, [0, 1])

    def test_before_the_store_has_committed_there_is_nothing_to_enter(self, place: Path) -> None:
        die(place, "store.put.before-commit")
        assert len(entries(place)) == 1
        with bp.open(place) as db:
            before = recorded(db)
            db.evictor.catch_up()
            assert recorded(db) == before == stored(db)
        assert entries(place) == []

    @pytest.mark.parametrize("point", POINTS)
    def test_an_evictor_knows_what_was_built_and_not_recorded(self, tmp_path: Path, point: str) -> None:
        place = tmp_path / "db"
        with bp.open(place) as db:
            put(db, segments("Before"))
        script = "db = bp.open(place)\ndb.put(new_parts(segments('Before', ' after.')[1:]))\ndb.flush()\n"
        die(place, point, script=script)
        with bp.open(place) as db:
            assert db.catalog is not None
            child = address_of(segments("Before", " after.")[1])
            db.evictor.catch_up()
            db.catalog.pin([child])
            db.evictor.evict(to_nbytes=0)
            assert dangling(db) == []
            assert set(keys_of(segments("Before", " after.")[1:])) <= stored(db)
            assert stored(db) - set(keys_of(segments("Before", " after.")[1:])) == set(
                keys_of(segments("Before"), [Part.KV])
            )

    def test_what_many_have_left_is_entered_at_once(self, place: Path) -> None:
        shutil.move(place / "catalog.sqlite", place / "aside")
        (place / "catalog.sqlite").write_bytes(b"garbage" * 999)
        for number in (1, 2, 3):
            with bp.open(place) as db:
                put_prompts(db, [number])
        assert len(entries(place)) >= 3
        shutil.move(place / "aside", place / "catalog.sqlite")
        script = "with bp.open(place) as db:\n    db.evictor.catch_up()\n"
        code, _, log = run_to_its_end(script, place, failpoint="catalog.record.inside=kill@2")
        assert code == 0, log
        assert entries(place) == []
        with bp.open(place) as db:
            assert recorded(db) == stored(db)

    def test_entries_do_not_accumulate(self, place: Path) -> None:
        for _ in range(3):
            die(place, "store.put.after")
        assert 1 <= len(entries(place)) <= 3
        with bp.open(place) as db:
            for number in range(20):
                put_prompts(db, [number])
                assert entries(place) == []

    def test_what_another_user_of_no_catalog_stored_is_entered_by_one_who_has_it(self, place: Path) -> None:
        shutil.move(place / "catalog.sqlite", place / "aside")
        (place / "catalog.sqlite").write_bytes(b"garbage" * 999)
        (place / "catalog.sqlite").chmod(0o600)
        with bp.open(place) as db:
            put_prompts(db, [1, 2])
            assert db.counters.num_write_failures == 0
        assert len(entries(place)) > 0
        shutil.move(place / "aside", place / "catalog.sqlite")
        with bp.open(place) as db:
            put_prompts(db, [3])
            assert recorded(db) == stored(db)
            assert_reads_back(db, [0, 1, 2, 3])
        assert entries(place) == []

    def test_a_failure_that_stores_nothing_leaves_no_entry(self, place: Path) -> None:
        journal = WriteJournal(place, Limits(place))
        with pytest.raises(StoreError), journal.writing(keys_of(prompt(0))):
            raise StoreError("nothing was stored", hint="Wait.")
        assert entries(place) == []


class TestStopped:
    """A process that is stopped holds its locks."""

    @pytest.fixture(autouse=True)
    def _short_waits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("backprompt_db.system.locks.PATIENCE_SECONDS", 0.3)

    def test_writers_go_on_beside_an_evictor_that_is_stopped(self, place: Path) -> None:
        script = "db = bp.open(place)\ndb.evictor.evict(to_nbytes=0)\n"
        with stopped(script, place, "collect.deleted"), bp.open(place) as db:
            put_prompts(db, [1])
            assert db.counters.num_write_failures == 0
            assert_reads_back(db, [1])
            with pytest.raises(StoreLocked, match=r"another process holds .*collect\.lock.*Try again"):
                db.evictor.evict(to_nbytes=0)
        assert entries(place) == []

    def test_an_evictor_gives_up_on_a_writer_that_is_stopped_and_others_write(self, place: Path) -> None:
        with stopped(WRITE, place, "store.put.after"), bp.open(place) as db:
            before = stored(db)
            with pytest.raises(StoreLocked, match=r"another process holds .*writing\.lock"):
                db.evictor.evict(to_nbytes=0)
            assert stored(db) == before
            put_prompts(db, [1])
            assert_reads_back(db, [0, 1])
        with bp.open(place) as db:
            db.evictor.catch_up()
            assert recorded(db) == stored(db)
        assert entries(place) == []

    def test_a_full_database_says_that_it_waited_in_vain(self, place: Path) -> None:
        with stopped(WRITE, place, "store.put.after"), bp.open(place) as db:
            limit(place, db.store.usage().live_nbytes)
            db.put(new_parts(prompt(1)))
            with pytest.raises(StoreLocked, match="another process holds"):
                db.flush()
            assert db.counters.num_write_failures > 0
            assert_whole(db, prompt(0))

    def test_a_writer_that_is_stopped_and_goes_on_records_what_it_stored(self, place: Path) -> None:
        with stopped(WRITE, place, "store.put.after") as process:
            with bp.open(place) as db:
                put_prompts(db, [1])
            process.send_signal(signal.SIGCONT)
            assert process.wait(300) == 0
        assert entries(place) == []
        with bp.open(place) as db:
            assert recorded(db) == stored(db)


def limit(place: Path, nbytes: int) -> None:
    write_config(place, dataclasses.replace(read_config(place), max_nbytes=nbytes, grace_seconds=0.0))


@contextlib.contextmanager
def stopped(script: str, place: Path, point: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has stopped itself at a point."""
    with child(script, place, failpoint=f"{point}=stop@1") as process:
        wait_until_stopped(process)
        yield process


def garbage(place: Path) -> None:
    (place / "pending" / "1-garbage-0").write_bytes(os.urandom(10_000))


def cut_off(place: Path) -> None:
    content = b"".join(key.address + key.part.value for key in keys_of(prompt(0)))
    (place / "pending" / "1-cut-0").write_bytes(content[:-7])


def unknown_keys(place: Path) -> None:
    content = b"".join(key.address + key.part.value for key in keys_of(prompt(99)))
    (place / "pending" / "1-unknown-0").write_bytes(content)


def empty(place: Path) -> None:
    (place / "pending" / "1-empty-0").touch()


def link_to_a_file(place: Path) -> None:
    (place.parent / "precious").write_text("precious")
    (place / "pending" / "1-link-0").symlink_to(place.parent / "precious")


def link_to_nowhere(place: Path) -> None:
    (place / "pending" / "1-nowhere-0").symlink_to(place.parent / "nowhere")


def fifo(place: Path) -> None:
    os.mkfifo(place / "pending" / "1-fifo-0")


def link_to_a_fifo(place: Path) -> None:
    os.mkfifo(place.parent / "fifo")
    (place / "pending" / "1-fifolink-0").symlink_to(place.parent / "fifo")


def folder(place: Path) -> None:
    (place / "pending" / "1-folder-0").mkdir()
    (place / "pending" / "1-folder-0" / "file").touch()


@pytest.mark.parametrize(
    "plant", [garbage, cut_off, unknown_keys, empty, link_to_a_file, link_to_nowhere, fifo, link_to_a_fifo, folder]
)
def test_what_others_planted_among_the_entries_does_no_harm(place: Path, plant: Callable[[Path], None]) -> None:
    plant(place)
    with bp.open(place) as db:
        put_prompts(db, [1])
        db.evictor.evict(to_nbytes=0)
        assert db.counters.num_evicted == len(set(keys_of(prompt(0) + prompt(1))))
        put_prompts(db, [0, 1])
        assert_reads_back(db, [0, 1])
        assert verify(db).is_clean
        assert_sound(db, high_nbytes=2**40)
    if (place.parent / "precious").exists():
        assert (place.parent / "precious").read_text() == "precious"
    assert not (place.parent / "nowhere").exists()


def test_a_link_in_the_place_of_the_journal_is_refused(place: Path) -> None:
    elsewhere = place.parent / "elsewhere"
    shutil.move(place / "pending", elsewhere)
    (place / "pending").symlink_to(elsewhere)
    with pytest.raises(UnsafeLocation, match="is a symbolic link"):
        bp.open(place)
    assert list(elsewhere.iterdir()) == []


def test_a_database_of_an_earlier_version_gets_its_journal(place: Path) -> None:
    (place / "pending").rmdir()
    with bp.open(place) as db:
        put_prompts(db, [1])
        assert_whole(db, prompt(1))
    assert ((place / "pending").stat().st_mode & 0o7777, entries(place)) == (0o700, [])
