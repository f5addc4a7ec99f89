"""Processes that are stopped for good while they hold a lock, and those beside them, who never wait without end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import backprompt_db as bp
from backprompt_db.cli.app import app
from backprompt_db.database.creating import create_database
from backprompt_db.database.single_flight import SingleFlight
from backprompt_db.errors import BackpromptError, CatalogError, StoreLocked
from backprompt_db.operations.doctor import diagnose
from backprompt_db.operations.verify import verify
from backprompt_db.store.files import Sharing
from backprompt_db.system import locks
from tests.conftest import cases, plain_logprobs
from tests.support.faults import (
    IN_OTHER_SHOES,
    LAG,
    TIMEOUT_SECONDS,
    address_of,
    child,
    new_parts,
    next_line,
    prompt,
    public_directory,
    put_prompts,
    wait_until_stopped,
    wanted_of,
    wrong,
)

assert sys.platform != "win32"

LIMIT_SECONDS = 10.0
"""No operation takes longer, whatever others do."""

WRITE = "db = bp.open(place)\nput_prompts(db, [1])\ndb.close()"
EVICT = "db = bp.open(place)\ndb.evictor.evict(to_nbytes=0)\ndb.close()"
COMPACT = "db = bp.open(place)\ndb.store.compact()\ndb.close()"
REINDEX = (
    "from backprompt_db.operations.reindex import reindex\n(Path(place) / 'catalog.sqlite').unlink()\n"
    "db = bp.open(place)\nreindex(db)\ndb.close()"
)

HOLDERS = {
    "store.put.inside": WRITE,
    "store.put.after": WRITE,
    "catalog.record.inside": WRITE,
    "store.delete.inside": EVICT,
    "collect.deleted": EVICT,
    "catalog.evict.inside": EVICT,
    "store.compact.copied": COMPACT,
    "reindex.batch": REINDEX,
}
"""Where a process is stopped, and what it does there: for each lock there is one who holds it."""

NOBODY_STORES = ["store.put.inside", "store.delete.inside", "store.compact.copied"]
"""Where the process has the turn to write."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A database with a prompt that no holder is stopped before."""
    with bp.open(tmp_path / "db") as db:
        put_prompts(db, [0])
    return tmp_path / "db"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.3)
    for module in ("backprompt_db.system.locks", "backprompt_db.catalog.connection"):
        monkeypatch.setattr(f"{module}.NOTICE_SECONDS", 0.1)


@contextlib.contextmanager
def stopped(script: str, place: Path, point: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has stopped itself at a point; who waits for it without end sees it die, after too long."""
    with child(script, place, failpoint=f"{point}=stop@1") as process:
        wait_until_stopped(process)
        rescue = threading.Timer(6 * LIMIT_SECONDS, process.kill)
        rescue.start()
        try:
            yield process
        finally:
            rescue.cancel()


def go_on(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, err


def in_time(do: Callable[[], object]) -> BackpromptError | None:
    """Do something, which may fail but not take long."""
    began, failure = time.monotonic(), None
    try:
        do()
    except BackpromptError as error:
        failure = error
    assert time.monotonic() - began < LIMIT_SECONDS
    return failure


def is_recording(db: bp.Database) -> bool:
    return db.catalog is not None


def list_all(place: Path) -> None:
    CliRunner().invoke(app, ["ls", "--db", str(place)])


def assert_nobody_waits_long(place: Path, point: str) -> None:
    with stopped(HOLDERS[point], place, point) as holder, bp.open(place, memory_nbytes=0) as db:
        assert wrong(db.fetch(wanted_of(prompt(0)))) == []
        failure = in_time(lambda: put_prompts(db, [2]))
        assert (point in NOBODY_STORES) == isinstance(failure, StoreLocked)
        assert (point in NOBODY_STORES) == (db.counters.num_write_failures > 0)
        in_time(lambda: db.evictor.evict(to_nbytes=db.store.usage().live_nbytes))
        in_time(lambda: list_all(place))
        in_time(lambda: diagnose(place))
        go_on(holder)
        put_prompts(db, [3])
        assert wrong(db.fetch(wanted_of(prompt(3)))) == []
        assert all(db.store.has(part.key) for part in new_parts(prompt(3)))
    with bp.open(place) as db:
        assert {problem.kind for problem in verify(db).problems} <= LAG
        put_prompts(db, [4])
        assert db.counters.num_write_failures == 0


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("point", cases(list(HOLDERS), by_default=["store.put.inside", "catalog.evict.inside"]))
def test_beside_a_holder_that_is_stopped_for_good_everything_returns(place: Path, point: str) -> None:
    assert_nobody_waits_long(place, point)


@pytest.mark.exhaustive
@pytest.mark.parametrize("point", ["store.put.inside", "catalog.evict.inside"])
def test_with_the_patience_of_users_everything_returns_within_ten_seconds(place: Path, point: str) -> None:
    assert_nobody_waits_long(place, point)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("impatient")
def test_a_lock_that_was_waited_for_in_vain_is_not_waited_for_with_each_group(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr("backprompt_db.database.writer._GROUP_NBYTES", 1)
    with stopped(WRITE, place, "store.put.inside") as holder, bp.open(place) as db:
        began = time.monotonic()
        with pytest.raises(
            StoreLocked, match=rf"another process holds .*turn\.lock: {holder.pid} \('.*', which is stopped\)"
        ):
            put_prompts(db, range(10, 18))
        num_failures = db.counters.num_write_failures
        assert num_failures > 50
        assert time.monotonic() - began < num_failures / 3  # and each would have taken a second
        notices = [message for message in caplog.messages if message.startswith("waiting for")]
        assert len(set(notices)) == len(notices)
        assert any(f"turn.lock, which another process holds: {holder.pid} (" in notice for notice in notices)
        go_on(holder)
        put_prompts(db, [2])
        assert db.counters.num_write_failures == num_failures


@pytest.mark.usefixtures("impatient")
def test_a_database_that_another_process_is_stopped_while_making_is_locked(tmp_path: Path) -> None:
    place = tmp_path / "db"
    with stopped(WRITE, place, "create.store") as holder:
        assert isinstance(in_time(lambda: bp.open(place)), StoreLocked)
        go_on(holder)
    with bp.open(place) as db:
        assert wrong(db.fetch(wanted_of(prompt(1)))) == []
        assert db.counters.num_hits > 0


@pytest.mark.usefixtures("impatient")
def test_without_the_catalog_that_a_stopped_process_is_making_all_is_stored(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backprompt_db.database.catalogs.AGAIN_SECONDS", 0.0)
    (place / "catalog.sqlite").unlink()
    with stopped(WRITE, place, "migration.first") as holder, bp.open(place) as db:
        assert in_time(lambda: put_prompts(db, [2])) is None
        assert db.counters.num_write_failures == 0
        assert not is_recording(db)
        go_on(holder)
        assert is_recording(db)
        put_prompts(db, [3])
        assert {problem.kind for problem in verify(db).problems} <= LAG


@pytest.mark.usefixtures("impatient")
def test_prompts_are_answered_beside_a_holder_that_is_stopped(
    place: Path, make_lm: Callable[..., bp.LanguageModel], open_db: Callable[..., bp.Database]
) -> None:
    with stopped(WRITE, place, "store.put.inside") as holder:
        db = open_db(place)
        lm = make_lm(db=db)
        began = time.monotonic()
        result = lm("The quick brown fox")
        expected, _ = plain_logprobs(lm.model, result.input_ids)
        assert time.monotonic() - began < LIMIT_SECONDS
        assert torch.allclose(result.token_logprobs, expected, atol=1e-4, equal_nan=True)
        assert isinstance(in_time(db.flush), StoreLocked)
        go_on(holder)
        lm("jumps over the lazy dog")
        db.flush()


HOLD = """
import fcntl
for name in sys.argv[2].split():
    try:
        fcntl.flock(os.open(Path(place) / name, os.O_RDONLY), fcntl.LOCK_EX)
    except PermissionError:
        continue
    print(name)
print('ready', flush=True)
time.sleep(1000)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.usefixtures("impatient")
def test_who_may_only_read_holds_up_nobody_who_writes(caplog: pytest.LogCaptureFixture) -> None:
    with public_directory() as directory:
        place = directory / "db"
        create_database(place, sharing=Sharing.READERS, group="65534")
        with bp.open(place) as db:
            put_prompts(db, [0])
            db.evictor.evict(to_nbytes=db.store.usage().live_nbytes)
        names = {str(path.relative_to(place)) for path in place.rglob("*")}
        assert {"turnstile.lock", "writing.lock", "collect.lock", "store/turn.lock"} <= names
        script = IN_OTHER_SHOES + HOLD.replace("sys.argv[2]", repr(" ".join(sorted(names))))
        with child(script, place) as reader, bp.open(place) as db:
            held = set(iter(lambda: next_line(reader), "ready"))
            assert {"store", "store/data.mdb", "store/lock.mdb", "manifest.json", "catalog.sqlite"} <= held
            assert not {name for name in held if name.endswith(".lock")}
            put_prompts(db, [1])
            db.evictor.evict(to_nbytes=0)
            assert db.counters.num_write_failures == 0
            assert caplog.messages == []


@pytest.mark.usefixtures("impatient")
def test_a_writer_of_an_earlier_version_keeps_this_one_out_and_is_kept_out(place: Path) -> None:
    directory = os.open(place / "store", os.O_RDONLY)
    with bp.open(place) as db, contextlib.ExitStack() as stack:
        stack.callback(os.close, directory)
        fcntl.flock(directory, fcntl.LOCK_EX)
        assert isinstance(in_time(lambda: put_prompts(db, [1])), StoreLocked)
        fcntl.flock(directory, fcntl.LOCK_UN)
        put_prompts(db, [2])
        with stopped(WRITE, place, "store.put.inside") as holder:
            with pytest.raises(BlockingIOError):
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            go_on(holder)
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.usefixtures("impatient")
def test_who_opens_lmdbs_lock_file_for_ever_keeps_nobody_waiting(place: Path) -> None:
    script = (
        "import fcntl\nfile = open(Path(place) / 'store' / 'lock.mdb', 'r+b')\nfcntl.lockf(file, fcntl.LOCK_EX, 1)\n"
    )
    with child(script + "print('locked', flush=True); time.sleep(1000)", place) as holder:
        assert next_line(holder) == "locked"
        failure = in_time(lambda: bp.open(place))
        assert isinstance(failure, StoreLocked)
        assert f"lock.mdb: {holder.pid} (" in failure.message
    bp.open(place).close()


def test_what_a_stopped_process_computes_is_not_waited_for(tmp_path: Path) -> None:
    (segment, *_) = prompt(0)
    script = (
        "from backprompt_db.database.single_flight import SingleFlight\n"
        "claims = SingleFlight(Path(place)).claims()\nprint(claims.take(address_of(prompt(0)[0])), flush=True)\n"
        "sys.stdin.readline()"
    )
    with child(script, tmp_path / "flights.lock") as holder:
        assert next_line(holder) == "True"
        claims = SingleFlight(tmp_path / "flights.lock").claims()
        assert not claims.wait_for_any([address_of(segment)], seconds=0.1)
        holder.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert not claims.wait_for_any([address_of(segment)], seconds=6 * LIMIT_SECONDS)
        assert time.monotonic() - began < LIMIT_SECONDS
        claims.close()


@pytest.mark.usefixtures("impatient")
def test_a_catalog_that_a_stopped_process_holds_names_it_and_is_not_waited_for_again(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with stopped(WRITE, place, "catalog.record.inside") as holder, bp.open(place) as db:
        assert db.catalog is not None
        with pytest.raises(CatalogError, match=rf"database is locked: {holder.pid} \(.*which is stopped"):
            db.catalog.count({"num_hits": 1})
        assert [message for message in caplog.messages if message.startswith("waiting for")] != []
        began = time.monotonic()
        for _ in range(3):
            with pytest.raises(CatalogError, match="database is locked"):
                db.catalog.count({"num_hits": 1})
        assert time.monotonic() - began < 0.6
        go_on(holder)
        db.catalog.count({"num_hits": 1})


class Turns:
    """A lock that changes hands now and then."""

    def __init__(self, *, seconds_between_holders: float) -> None:
        self._began = time.monotonic()
        self._pace = seconds_between_holders

    def progress(self) -> int:
        return int((time.monotonic() - self._began) / self._pace)


@pytest.mark.parametrize(("pace", "longest", "shortest"), [(0.05, LIMIT_SECONDS, 0.9), (1000.0, 0.8, 0.3)])
@pytest.mark.usefixtures("impatient")
def test_those_who_take_turns_are_waited_for_longer_and_not_for_ever(
    tmp_path: Path, pace: float, longest: float, shortest: float
) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        locks.wait_for(lambda: False, tmp_path / "lock", progress=Turns(seconds_between_holders=pace).progress)
    assert shortest <= time.monotonic() - began < longest


@pytest.mark.usefixtures("impatient")
def test_a_lock_that_changed_hands_is_waited_for_again(tmp_path: Path) -> None:
    with locks.file_lock(tmp_path / "lock"):
        for _ in range(2):
            with pytest.raises(TimeoutError), locks.file_lock(tmp_path / "lock"):
                pass
        assert locks.patience_for(tmp_path / "lock", progress=(tmp_path / "lock").stat().st_mtime_ns) < 0.1
        os.utime(tmp_path / "lock")
        assert locks.patience_for(tmp_path / "lock", progress=(tmp_path / "lock").stat().st_mtime_ns) == 0.3
    with locks.file_lock(tmp_path / "lock"):
        pass
    assert locks.patience_for(tmp_path / "lock") == 0.3
