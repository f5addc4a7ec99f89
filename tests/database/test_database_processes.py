"""Databases across processes: exits, kills, races, full disks, and users who may only read."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import backprompt_db as bp
from backprompt_db.database.database import Database
from tests.conftest import cases
from tests.support.databases import expected, new_part, values, wanted
from tests.support.faults import (
    IN_OTHER_SHOES,
    TIMEOUT_SECONDS,
    assert_reads_back,
    check,
    new_parts,
    prompt,
    public_directory,
    put_prompts,
    run,
    run_to_its_end,
    start,
)

assert sys.platform != "win32"

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with bp.open(tmp_path / "db") as db:
        yield db


def test_a_process_that_exits_right_after_put_loses_nothing(tmp_path: Path) -> None:
    script = "db = bp.open(place)\ndb.put([new_part(str(number), num_values=50_000) for number in range(200)])"
    run(script, tmp_path)
    assert check(tmp_path) == set(expected(*map(str, range(200))))


def test_what_is_put_while_the_interpreter_exits_is_stored(tmp_path: Path) -> None:
    script = "import atexit\ndb = bp.open(place)\natexit.register(lambda: db.put([new_part('late')]))\n"
    run(script, tmp_path)
    assert check(tmp_path) == set(expected("late"))


def test_a_process_that_fails_keeps_what_it_computed(tmp_path: Path) -> None:
    with start("db = bp.open(place)\ndb.put([new_part('a')])\nraise SystemExit(3)", tmp_path) as process:
        process.communicate(timeout=300)
    assert process.returncode == 3
    assert check(tmp_path) == set(expected("a"))


def test_two_databases_are_both_closed_at_exit_when_one_fails(tmp_path: Path) -> None:
    script = (
        "bad = FaultyStore(); bad.error = BROKEN\n"
        "from backprompt_db.database.database import Database\n"
        "broken = Database(bad, directory=None, strict=True)\nbroken.put([new_part('a')])\n"
        "db = bp.open(place)\ndb.put([new_part('b')])"
    )
    _, log = run(script, tmp_path)
    assert "could not be closed" in log
    assert check(tmp_path) == set(expected("b"))


def test_what_flush_acknowledged_survives_a_kill_at_any_moment(tmp_path: Path) -> None:
    script = (
        "db = bp.open(place)\nprint('open', flush=True)\nfor number in range(10**6):\n"
        "    db.put([new_part(f'{place} {number} {part}', num_values=300_000 * part) for part in (1, 2)])\n"
        "    if number % 3 == 0:\n        db.flush()\n        print(number, flush=True)\n"
    )
    dice = random.Random(5)
    for _ in range(5):
        with start(script, tmp_path) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(dice.uniform(0.01, 0.4))
            process.send_signal(signal.SIGKILL)
            acknowledged = [int(line) for line in process.stdout if line.endswith("\n")]
        texts = [
            f"{tmp_path} {number} {part}" for number in range(max(acknowledged, default=-1) + 1) for part in (1, 2)
        ]
        assert set(expected(*texts)) <= check(tmp_path)
        with bp.open(tmp_path) as db:
            assert len(db.fetch(wanted(*texts))) == len(texts)
            assert db.counters.num_quarantined == 0


def test_a_creation_that_was_killed_starts_over(tmp_path: Path) -> None:
    for step in ("create.store", "create.manifest"):
        place = tmp_path / step
        code, _, _ = run_to_its_end("bp.open(place)", place, failpoint=f"{step}=kill")
        assert code == -signal.SIGKILL
        assert not (place / "manifest.json").exists()
        with bp.open(place) as db:
            db.put([new_part("a")])
        assert check(place) == set(expected("a"))


@pytest.mark.exhaustive
def test_six_processes_that_create_at_once_share_one_database(tmp_path: Path) -> None:
    script = "db = bp.open(place)\ndb.put([new_part(str(os.getpid())), new_part('same')])\ndb.close()"
    place = tmp_path / "new" / "db"
    processes = [start(script, place) for _ in range(6)]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (0, "")
    assert len(check(place)) == 7
    assert json.loads((place / "manifest.json").read_text())["format"] == 1


def test_a_forked_child_reads_what_is_stored_and_writes_its_own(db: Database) -> None:
    db.put([new_part("parent")])
    db.flush()
    db.put([new_part("queued", num_values=500_000)])
    pid = os.fork()
    if pid == 0:
        try:
            found = values(db.fetch(wanted("parent")))
            db.put([new_part("child")])
            db.flush()
            os._exit(0 if found == expected("parent") and db.counters.num_read_failures == 0 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    db.flush()
    assert values(db.fetch(wanted("parent", "child"))) == expected("parent", "child")
    assert db.has(new_part("queued").key)
    assert (db.counters.num_stored, db.counters.num_write_failures) == (2, 0)


def test_forks_while_the_writer_is_busy_do_not_hang(db: Database) -> None:
    stop = threading.Event()

    def keep_putting() -> None:
        number = 0
        while not stop.is_set():
            db.put([new_part(f"busy {number}", num_values=20_000)])
            number += 1

    busy = threading.Thread(target=keep_putting)
    busy.start()
    try:
        for turn in range(3):
            pid = os.fork()
            if pid == 0:
                signal.alarm(15)
                try:
                    db.put([new_part(f"child {turn}")])
                    db.flush()
                    os._exit(0)
                finally:
                    os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        stop.set()
        busy.join(30)
    db.flush()
    texts = [f"child {turn}" for turn in range(3)]
    assert values(db.fetch(wanted(*texts))) == expected(*texts)
    assert db.counters.num_quarantined == db.counters.num_write_failures == 0


def put_and_leave(place: Path, number: int, db: Database | None = None) -> None:
    """Compute something and end without a word, in a process of multiprocessing."""
    db = db or bp.open(place)
    assert_reads_back(db, [0])
    db.put(new_parts(prompt(number)))


@pytest.mark.parametrize("method", cases(["fork", "spawn"], by_default=["fork"]))
def test_processes_of_multiprocessing_share_the_database_and_lose_nothing(tmp_path: Path, method: str) -> None:
    with bp.open(tmp_path / "db") as db:
        put_prompts(db, [0])
        context: Any = multiprocessing.get_context(method)
        handle = db if method == "fork" else None
        workers = [context.Process(target=put_and_leave, args=(db.directory, number, handle)) for number in (1, 2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(TIMEOUT_SECONDS)
        assert [worker.exitcode for worker in workers] == [0, 0]
        put_prompts(db, [3])
        assert_reads_back(db, [0, 1, 2, 3])


class Requests(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """What a model makes of requests, for the workers of a data loader."""

    def __init__(self, lm: bp.LanguageModel, requests: list[str]) -> None:
        self.lm = lm
        self.requests = requests

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        result = (self.lm.text("Pick the endpoint.\n") + self.requests[number])()
        return result.logits, result.num_computed_tokens


def test_workers_of_a_data_loader_read_what_is_stored_and_store_what_they_compute(lm: bp.LanguageModel) -> None:
    requests = Requests(lm, [f"Request: show me order {number}" for number in range(8)])
    before = [requests[number][0] for number in range(4)]
    lm.db.flush()
    loader = torch.utils.data.DataLoader(requests, batch_size=None, num_workers=2, multiprocessing_context="fork")
    logits, nums_computed = zip(*loader, strict=True)
    assert [num == 0 for num in nums_computed] == [True] * 4 + [False] * 4
    assert all(torch.equal(*pair) for pair in zip(logits, before, strict=False))
    again = [requests[number] for number in range(8)]
    assert [num for _, num in again] == [0] * 8
    assert all(torch.equal(now, then) for (now, _), then in zip(again, logits, strict=True))
    assert lm.db.counters.num_quarantined == lm.db.counters.num_read_failures == 0


@pytest.fixture
def public_place() -> Iterator[Path]:
    with public_directory() as directory:
        yield directory


def let_all_read(place: Path) -> None:
    for path in [*place.rglob("*"), place]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def test_a_user_who_may_only_read_finds_what_is_there_and_keeps_nothing(public_place: Path) -> None:
    place = public_place / "db"
    with bp.open(place) as db:
        db.put([new_part("a")])
    let_all_read(place)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in place.rglob("*")}
    script = (
        "import backprompt_db.catalog.catalog, backprompt_db.database.opening\n"
        + IN_OTHER_SHOES
        + "db = bp.open(place)\n"
        "for _ in range(3):\n    found = values(db.fetch(wanted('a', 'b')))\n"
        "    db.put([new_part('b')])\n    db.flush()\n"
        "c = db.counters\nprint(found == expected('a'), db.readonly, c.num_hits, c.num_misses, c.num_write_failures)\n"
        "db.close()"
    )
    words, log = run(script, place)
    assert words == ["True", "True", "3", "3", "0"]
    assert log.count("is not writable") == log.count("more people may use") == 1
    assert log.count("LOG") == 2
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in place.rglob("*")} == before


@pytest.mark.parametrize(
    ("mode", "error"), [(0o000, "StoreReadOnly"), (0o111, "StoreReadOnly"), (0o555, "UnsafeLocation")]
)
def test_a_user_who_may_not_enter_is_told_so(public_place: Path, mode: int, error: str) -> None:
    place = public_place / "private"
    place.mkdir()
    place.chmod(mode)
    script = (
        "import backprompt_db.database.opening\n" + IN_OTHER_SHOES + "try:\n    bp.open(place)\n"
        "except bp.BackpromptError as error:\n    print(type(error).__name__)"
    )
    assert run(script, place)[0] == [error]
    place.chmod(0o755)
    assert list(place.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None] | None]]:
    """A directory on a disk of 6 MB; where none can be mounted, one in which no file can grow beyond that."""
    disk, limit = tmp_path / "disk", 6 << 20
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={limit}", "tmpfs", str(disk)]
    is_mounted = not subprocess.run(command, check=False, capture_output=True).returncode
    limit_files = None if is_mounted else (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    yield disk, limit_files
    if is_mounted:
        subprocess.run(["umount", str(disk)], check=True)  # noqa: S607


def test_a_full_disk_costs_what_does_not_fit_and_nothing_else(
    small_disk: tuple[Path, Callable[[], None] | None],
) -> None:
    disk, preexec = small_disk
    script = (
        "from backprompt_db.database.creating import create_database\nfrom backprompt_db.errors import StoreFull\n"
        "create_database(Path(place), limits={'max_nbytes': None})\n"
        "db = bp.open(place)\ndb.put([new_part('a')])\ndb.flush()\nfull = 0\n"
        "for number in range(4):\n    db.put([new_part(str(number), num_values=700_000)])\n"
        "    try:\n        db.flush()\n    except StoreFull as error:\n        full += 1\n"
        "c = db.counters\nfound = db.fetch(wanted('a', *'0123'))\n"
        "print(full == c.num_write_failures > 0, c.num_stored + full == 5, len(found) == c.num_stored)\n"
        "print(values(db.fetch(wanted('a'))) == expected('a'), c.num_quarantined)\n"
        "print(db.store.delete([new_part('0').key]))\n"
        "db.put([new_part('b')])\ndb.close()\nprint(db.counters.num_stored == c.num_stored + 1)"
    )
    words, log = run(script, disk / "db", preexec=preexec)
    assert words == ["True", "True", "True", "True", "0", "1", "True"]
    assert log.count("parts could not be stored") == 1
    assert set(expected("a", "b")) <= check(disk / "db")
