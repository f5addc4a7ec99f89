"""Databases that nobody holds any more, and nobody has closed: they go, and what was put into them stays."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backprompt_db as bp
from backprompt_db.catalog.connection import OPERATION
from backprompt_db.database.database import Database
from backprompt_db.errors import StoreClosed
from backprompt_db.store.lmdb import LmdbStore
from tests.support.databases import BROKEN, FaultyStore, address, expected, new_part, values, wanted
from tests.support.faults import check, run

assert sys.platform != "win32"

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("backprompt-db")]


def wait_until(is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_so()


@pytest.fixture(autouse=True)
def no_threads_before() -> None:
    gc.collect()  # databases of other tests
    assert wait_until(lambda: not own_threads())


def is_closed(store: FaultyStore) -> bool:
    try:
        store.has(new_part("a").key)
    except StoreClosed:
        return True
    return False


def test_a_dropped_database_goes_with_its_memory_its_threads_and_its_files(tmp_path: Path) -> None:
    for number in range(3):
        db = bp.open(tmp_path / str(number))
        db.put([new_part("a")])
        db.flush()
        db.fetch(wanted("a"))
        assert db.memory.nbytes
        gone = weakref.ref(db), weakref.ref(db.memory)
        del db
        assert [reference() for reference in gone] == [None, None]
    assert wait_until(lambda: not own_threads())
    store = tmp_path / "0" / "store" / "data.mdb"
    assert str(store) not in Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else True


def test_what_was_queued_when_a_database_was_dropped_is_written_and_then_its_store_closed() -> None:
    store = FaultyStore()
    store.may_write.clear()
    db = Database(store, directory=None)
    for text in "abc":
        db.put([new_part(text)])
    gone = weakref.ref(db)
    del db
    assert gone() is None
    assert not is_closed(store)
    store.may_write.set()
    assert wait_until(lambda: is_closed(store) and not own_threads())
    assert sum(store.puts) == 3


def test_the_catalog_learns_what_a_dropped_database_wrote_and_used(tmp_path: Path) -> None:
    texts = [str(number) for number in range(50)]
    with bp.open(tmp_path) as db:
        db.put([new_part("used")])
    db = bp.open(tmp_path)
    assert db.fetch(wanted("used"))
    db.put([new_part(text) for text in texts])
    del db
    assert wait_until(lambda: not own_threads())
    assert check(tmp_path) == set(expected("used", *texts))
    with bp.open(tmp_path) as again:
        assert again.catalog is not None
        assert again.catalog.totals().num_representations == 51
        hits = {row.address: row.num_hits for row in again.catalog.rows()}
        assert hits[address("used")] == 1


def test_a_process_that_drops_its_database_and_exits_loses_nothing(tmp_path: Path) -> None:
    script = (
        "def work():\n    db = bp.open(place)\n"
        "    db.put([new_part(str(number), num_values=50_000) for number in range(200)])\nwork()"
    )
    _, log = run(script, tmp_path)
    assert (check(tmp_path), log) == (set(expected(*map(str, range(200)))), "")


def test_a_database_that_is_dropped_while_the_interpreter_exits_loses_nothing(tmp_path: Path) -> None:
    script = (
        "import atexit\nopened = [bp.open(place)]\n"
        "def drop():\n    opened[0].put([new_part(str(number)) for number in range(50)])\n    opened.clear()\n"
        "atexit.register(drop)\n"
    )
    run(script, tmp_path)
    assert check(tmp_path) == set(expected(*map(str, range(50))))


def test_dropping_never_waits_for_a_lock_of_its_own_thread(tmp_path: Path) -> None:
    """A finaliser may run in the middle of anything, here of an operation of the catalog that the writer waits for."""
    db = bp.open(tmp_path)
    with OPERATION:
        db.put([new_part("a")])
        del db
        assert own_threads()
    assert wait_until(lambda: not own_threads())
    assert check(tmp_path) == set(expected("a"))


def test_a_database_in_a_cycle_goes_as_well() -> None:
    store = FaultyStore()
    db: Any = Database(store, directory=None)
    db.put([new_part("a")])
    db.itself = db
    del db
    gc.collect()
    assert wait_until(lambda: is_closed(store) and not own_threads())
    assert store.puts == [1]


def test_a_strict_database_that_was_dropped_reports_its_failure(caplog: pytest.LogCaptureFixture) -> None:
    store = FaultyStore()
    store.error = BROKEN
    db = Database(store, directory=None, strict=True)
    db.put([new_part("a")])
    del db
    assert wait_until(lambda: not own_threads())
    assert [record.message for record in caplog.records if "could not be stored" in record.message]


def test_where_no_thread_can_be_started_a_dropped_database_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    store = FaultyStore()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        db = Database(store, directory=None)
        db.put([new_part("a")])
        del db
    assert store.puts == [1]
    assert "no thread can be started" in caplog.text


def test_a_forked_child_that_drops_the_database_leaves_its_parent_alone(tmp_path: Path) -> None:
    db = bp.open(tmp_path)
    db.put([new_part("queued", num_values=500_000)])
    pid = os.fork()
    if pid == 0:
        try:
            db.put([new_part("child")])
            del db
            os._exit(0 if wait_until(lambda: not own_threads()) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    db.put([new_part("parent")])
    db.flush()
    assert values(db.fetch(wanted("parent", "child"))) == expected("parent", "child")
    assert db.has(new_part("queued").key)
    db.close()


def test_closing_and_dropping_close_once(tmp_path: Path) -> None:
    other = LmdbStore.create(tmp_path / "store")
    db = Database(LmdbStore(tmp_path / "store"), directory=None)
    db.put([new_part("a")])
    db.close()
    del db
    assert own_threads() == []
    assert other.has(new_part("a").key)
    other.close()


def test_arrays_outlive_the_database_that_they_were_read_from(tmp_path: Path) -> None:
    with bp.open(tmp_path) as db:
        db.put([new_part("a", num_values=1_000_000)])
    found = bp.open(tmp_path).fetch(wanted("a"))
    assert wait_until(lambda: not own_threads())
    (arrays,) = found.values()
    assert np.array_equal(arrays["logits"].numpy(), new_part("a", num_values=1_000_000).arrays["logits"].numpy())
