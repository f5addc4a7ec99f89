"""Nothing left of disk, map, memory, files or readers: reading goes on, writing fails aloud, and later all is well."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import backprompt_db as bp
from backprompt_db.database.config import Config, write_config
from backprompt_db.database.database import Database
from backprompt_db.errors import BackpromptError, StoreError
from backprompt_db.operations.reindex import reindex
from backprompt_db.operations.verify import verify
from backprompt_db.store import environment
from backprompt_db.store.environment import release, shared_environment
from backprompt_db.system.platform import reserve
from tests.support.damage import NUM_PARTS, in_a_fork, look, use
from tests.support.damage import fill as fill_whole
from tests.support.faults import (
    LAG,
    assert_reads_back,
    assert_survived,
    keys_of,
    new_parts,
    prompt,
    put_prompts,
    wanted_of,
    wrong,
)

assert sys.platform != "win32"

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

PAGE_NBYTES = 4096
NUMBERS = [2, 5, 8]
"""The numbers of prompts that take a few pages each."""

NUMS_FREE_PAGES = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 512]


class Disk:
    """A filesystem of a few megabytes, on which as much can be left free as a test wants."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.db = place / "db"
        self._ballast = place / "ballast"

    def leave(self, num_pages: int) -> None:
        """Fill the disk up to so many pages."""
        self.empty()
        nbytes = shutil.disk_usage(self.place).free - num_pages * PAGE_NBYTES
        with self._ballast.open("wb") as file:
            reserve(file.fileno(), nbytes)

    def empty(self) -> None:
        self._ballast.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small filesystem can only be mounted by root, and not in every container")
    yield Disk(place)
    subprocess.run(["umount", str(place)], check=True)  # noqa: S607


def fill(place: Path) -> None:
    """Make a database with some prompts, and one that was deleted again; the limit is not that of a small disk."""
    with bp.open(place):
        pass
    write_config(place, Config())
    with bp.open(place) as db:
        put_prompts(db, [*NUMBERS, 99])
        db.store.delete(keys_of(prompt(99)[2:]))


def attempt(work: Callable[[], object]) -> str:
    """Do something; return the name of the error that says why it could not be done."""
    try:
        work()
    except BackpromptError as error:
        return type(error).__name__
    return ""


def opened(place: Path) -> contextlib.AbstractContextManager[Database]:
    return bp.open(place, memory_nbytes=0)


@pytest.mark.exhaustive
def test_a_database_that_cannot_be_made_on_a_full_disk_is_made_later(disk: Disk) -> None:
    answers = []
    for num_pages in NUMS_FREE_PAGES:
        disk.leave(num_pages)
        answers.append(in_a_fork(lambda: attempt(lambda: bp.open(disk.db).close())))
        disk.empty()
        assert in_a_fork(lambda: attempt(lambda: fill(disk.db))) == "", num_pages
        assert_survived(disk.db, NUMBERS)
        shutil.rmtree(disk.db)
    assert (answers[0], answers[-1]) == ("StoreFull", "")
    assert set(answers) <= {"StoreFull", "UnsafeLocation", "FormatError", ""}


def put_what_may_not_fit(place: Path, make_room: Callable[[], None]) -> list[Any]:
    """Read, write, and write again when there is room."""
    with opened(place) as db:
        assert_reads_back(db, NUMBERS)
        new = new_parts(prompt(20))
        db.put(new)
        error = attempt(db.flush)
        c = db.counters
        found = db.fetch(wanted_of(prompt(20)))
        assert wrong(found) == []
        is_told = bool(error) == (c.num_write_failures > 0)
        make_room()
        db.put(new)
        db.flush()
        found_later = db.fetch(wanted_of(prompt(20)))
        assert wrong(found_later) == []
        return [error, is_told, len(found), len(found_later), c.num_quarantined, c.num_read_failures]


def test_what_does_not_fit_on_the_disk_fails_aloud_and_costs_nothing_else(disk: Disk) -> None:
    fill(disk.db)
    shutil.copytree(disk.db, disk.place / "copy")
    errors = []
    for num_pages in NUMS_FREE_PAGES:
        shutil.rmtree(disk.db)
        shutil.copytree(disk.place / "copy", disk.db)
        disk.leave(num_pages)
        error, *rest = in_a_fork(lambda: put_what_may_not_fit(disk.db, disk.empty))
        errors.append(error)
        num_at_once = rest[1]
        assert num_at_once == 9 if not error else num_at_once < 9
        assert rest == [True, num_at_once, 9, 0, 0], num_pages
        assert_survived(disk.db, [*NUMBERS, 20])
    assert errors[0] == "StoreFull"
    assert errors[-1] == ""


def test_a_catalog_that_does_not_fit_catches_up(disk: Disk) -> None:
    fill(disk.db)

    def write_on_a_full_disk() -> list[Any]:
        with opened(disk.db) as db:
            reindex(db)
            size = (disk.db / "catalog.sqlite").stat().st_size
            disk.leave(0)
            errors = [attempt(lambda n=n: put_prompts(db, [n])) for n in range(40, 48)]  # type: ignore[misc]
            grown = (disk.db / "catalog.sqlite").stat().st_size - size
            return [errors, grown, db.counters.num_read_failures]

    errors, grown, num_read_failures = in_a_fork(write_on_a_full_disk)
    assert set(errors) <= {"", "StoreFull"}
    assert "StoreFull" in errors
    assert (grown, num_read_failures) == (0, 0)
    disk.empty()
    with opened(disk.db) as db:
        assert {problem.kind for problem in verify(db).problems} <= LAG
    assert_survived(disk.db, NUMBERS + [number for number, error in enumerate(errors, 40) if not error])


def test_on_a_full_disk_deleting_fails_aloud_or_makes_room(disk: Disk) -> None:
    fill(disk.db)
    gone = keys_of(prompt(8)[2:])

    def delete() -> list[Any]:
        with opened(disk.db) as db:
            disk.leave(0)
            error = attempt(lambda: db.store.delete(gone))
            assert_reads_back(db, [2, 5])
            room = attempt(lambda: put_prompts(db, [8])) if not error else ""
            disk.empty()
            db.store.delete(gone)
            return [error, room, len(db.fetch(wanted_of(prompt(8)[2:]))), db.counters.num_misses]

    error, room, num_found, num_misses = in_a_fork(delete)
    assert {error, room} <= {"", "StoreFull"}
    assert (num_found, num_misses) == (0, 1)
    assert_survived(disk.db, [2, 5])


MAINTENANCE: dict[str, Callable[[Database], object]] = {
    "compacting": lambda db: db.store.compact(),
    "reindexing": reindex,
}


@pytest.mark.parametrize("what", MAINTENANCE)
@pytest.mark.parametrize("num_pages", [0, 1, 8, 64])
def test_maintenance_that_a_full_disk_stops_costs_nothing_and_can_be_repeated(
    disk: Disk, what: str, num_pages: int
) -> None:
    fill(disk.db)

    def maintain() -> list[Any]:
        with opened(disk.db) as db:
            disk.leave(num_pages)
            error = attempt(lambda: MAINTENANCE[what](db))
            assert_reads_back(db, NUMBERS)
            disk.empty()
            MAINTENANCE[what](db)
            assert_reads_back(db, NUMBERS)
            return [error, db.counters.num_quarantined, db.counters.num_read_failures]

    error, *failures = in_a_fork(maintain)
    assert error in ({"StoreFull", "CatalogError"} if num_pages < 64 else {"", "StoreFull"})
    assert failures == [0, 0]
    assert_survived(disk.db, NUMBERS)


def test_a_lock_file_has_its_room_from_the_beginning(tmp_path: Path) -> None:
    fill(tmp_path / "db")
    lock = tmp_path / "db" / "store" / "lock.mdb"
    for remake in (lambda: None, lock.unlink, lambda: lock.write_bytes(b"")):
        remake()
        bp.open(tmp_path / "db").close()
        status = lock.stat()
        assert status.st_blocks * 512 >= status.st_size > environment.MAX_READERS * 60


def test_a_full_map_fails_aloud_reads_on_and_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "db")
    nbytes = (tmp_path / "db" / "store" / "data.mdb").stat().st_size
    monkeypatch.setattr(environment, "_MAP_NBYTES", nbytes + 2 * PAGE_NBYTES)

    def fill_up() -> list[Any]:
        with opened(tmp_path / "db") as db:
            errors = [attempt(lambda n=n: put_prompts(db, [n])) for n in range(40, 60)]  # type: ignore[misc]
            found = db.fetch(wanted_of(prompt(2)))
            deleted = attempt(lambda: db.store.delete(keys_of(prompt(5)[2:])))
            again = attempt(lambda: put_prompts(db, [5])) if not deleted else ""
            c = db.counters
            return [errors, len(found), deleted, again, c.num_write_failures > 0, c.num_read_failures]

    errors, num_found, deleted, again, has_failed, num_read_failures = in_a_fork(fill_up)
    assert "StoreFull" in errors
    assert set(errors) <= {"", "StoreFull"}, "how many fit depends on what is written in one transaction"
    assert (num_found, has_failed, num_read_failures) == (9, True, 0)
    assert {deleted, again} <= {"", "StoreFull"}
    monkeypatch.undo()
    assert_survived(tmp_path / "db", [2, 8, *(number for number, error in enumerate(errors, 40) if not error)])


def limited(kind: int, limit: int) -> None:
    resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))


def test_without_descriptors_opening_is_refused_or_works_and_reading_what_is_open_goes_on(tmp_path: Path) -> None:
    fill(tmp_path / "db")

    def open_with(num_files: int) -> str:
        free = os.open(os.devnull, os.O_RDONLY)
        os.close(free)
        limited(resource.RLIMIT_NOFILE, free + num_files)
        return attempt(lambda: opened(tmp_path / "db").__enter__())

    answers = [in_a_fork(lambda n=n: open_with(n)) for n in range(12)]  # type: ignore[misc]
    assert set(answers) <= {"", "StoreError", "UnsafeLocation", "StoreReadOnly"}
    assert answers[0] != ""
    assert answers[-1] == ""

    def use_without() -> list[Any]:
        with opened(tmp_path / "db") as db:
            free = os.open(os.devnull, os.O_RDONLY)
            os.close(free)
            before = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            limited(resource.RLIMIT_NOFILE, free)
            assert_reads_back(db, NUMBERS)
            error = attempt(lambda: put_prompts(db, [50]))
            c = db.counters
            limited(resource.RLIMIT_NOFILE, before)
            later = attempt(lambda: put_prompts(db, [50]))
            return [bool(error) == (c.num_write_failures > 0), c.num_hits, c.num_read_failures, later]

    assert in_a_fork(use_without) == [True, 9, 0, ""]
    assert_survived(tmp_path / "db", [*NUMBERS, 50])


@pytest.mark.parametrize("num_extra", [1 << 26, 1 << 28, 1 << 29, 1 << 32, 1 << 34])
def test_without_address_space_opening_is_refused_or_all_is_read(tmp_path: Path, num_extra: int) -> None:
    fill(tmp_path / "db")

    def use_with_little() -> list[Any]:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limited(resource.RLIMIT_AS, pages * resource.getpagesize() + num_extra)
        try:
            db = opened(tmp_path / "db").__enter__()
        except StoreError as error:
            return [type(error).__name__]
        assert_reads_back(db, NUMBERS)
        put_prompts(db, [50])
        return ["", db.counters.num_hits, db.counters.num_write_failures]

    answer = in_a_fork(use_with_little)
    assert answer == ["", 9, 0] or (num_extra < 1 << 29 and answer == ["StoreError"])
    assert_survived(tmp_path / "db", NUMBERS)


@pytest.mark.parametrize("num_pages", [0, 2, 16, 64, 256])
def test_a_limit_on_the_size_of_files_fails_aloud_and_reading_goes_on(tmp_path: Path, num_pages: int) -> None:
    fill(tmp_path / "db")
    largest = max(path.stat().st_size for path in (tmp_path / "db").rglob("*"))

    def use_with_limit() -> list[Any]:
        with opened(tmp_path / "db") as db:
            limited(resource.RLIMIT_FSIZE, largest + num_pages * PAGE_NBYTES)
            errors = [attempt(lambda n=n: put_prompts(db, [n])) for n in range(40, 70)]  # type: ignore[misc]
            found = db.fetch(wanted_of(prompt(2)))
            return [errors, len(found), db.counters.num_write_failures > 0, db.counters.num_read_failures]

    errors, num_found, has_failed, num_read_failures = in_a_fork(use_with_limit)
    assert "StoreFull" in errors
    assert set(errors) <= {"", "StoreFull"}, "how many fit depends on what is written in one transaction"
    assert num_pages < 64 or "" in errors
    assert (num_found, has_failed, num_read_failures) == (9, True, 0)
    assert_survived(tmp_path / "db", NUMBERS + [number for number, error in enumerate(errors, 40) if not error])


def test_a_full_table_of_readers_is_a_miss_that_is_counted_and_then_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_whole(tmp_path / "db")
    (tmp_path / "db" / "store" / "lock.mdb").unlink()
    monkeypatch.setattr(environment, "MAX_READERS", 2)

    def use_with_few() -> list[Any]:
        with opened(tmp_path / "db") as db:
            assert look(db) == (NUM_PARTS, 0)
            shared = shared_environment(tmp_path / "db" / "store", readonly=False)
            with shared.transaction(), shared.transaction():
                without = look(db)
            release(shared)
            return [without, look(db), db.counters.num_read_failures]

    assert in_a_fork(use_with_few) == [[0, 0], [NUM_PARTS, 0], NUM_PARTS]
    monkeypatch.undo()
    assert use(tmp_path / "db").is_whole
