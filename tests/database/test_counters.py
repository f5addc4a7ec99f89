"""Counting: by where a part was found in one handle, exactly over processes, threads and forks, and never twice."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import backprompt_db as bp
from backprompt_db.catalog.catalog import Catalog
from backprompt_db.database import writer
from backprompt_db.database.counters import NAMES_IN_CATALOG, Counters, Tally
from backprompt_db.database.database import Database
from backprompt_db.database.opening import open_catalog
from backprompt_db.errors import CatalogError, StoreError
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key
from backprompt_db.store.memory import MemoryStore
from tests.support.databases import BROKEN, FaultyStore, address, new_part, origin, wanted
from tests.support.operations import flip_a_bit

assert sys.platform != "win32"

Open = Callable[..., Database]
ROOT = Path(__file__).parents[2]
CHILD = "import os, sys; import backprompt_db as bp; from tests.support.databases import new_part, wanted\n"


def counts(directory: Path | None) -> dict[str, float]:
    assert directory is not None
    with open_catalog(directory) as catalog:
        return catalog.counts()


def events(directory: Path | None) -> list[Any]:
    assert directory is not None
    with open_catalog(directory) as catalog:
        return catalog.events()


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD + script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


class TestTiers:
    def test_a_part_counts_for_the_tier_that_had_it(self, open_db: Open, tmp_path: Path) -> None:
        with open_db(tmp_path / "db") as db:
            db.put([new_part("a"), new_part("b")])
            db.fetch(wanted("a"))  # queued, or on disk if the writer was quick
            assert db.counters.num_memory_hits + db.counters.num_disk_hits == 1
        with open_db(tmp_path / "db") as db:
            db.fetch(wanted("a", "b", "c"))
            db.fetch(wanted("a", "c"))
            found = db.counters
        assert (found.num_disk_hits, found.num_memory_hits, found.num_part_misses) == (2, 1, 2)
        assert (found.num_hits, found.num_misses, found.num_base_hits) == (3, 2, 0)

    def test_what_is_still_queued_is_in_memory(self) -> None:
        store = FaultyStore()
        store.may_write.clear()
        with Database(store, directory=None) as db:
            db.put([new_part("a")])
            db.fetch(wanted("a"))
            store.may_write.set()
            assert (db.counters.num_memory_hits, db.counters.num_disk_hits) == (1, 0)

    def test_a_model_that_computes_is_counted_in_tokens_and_seconds(self, lm: bp.LanguageModel) -> None:
        lm(lm.text("Pick the endpoint.\n") + "Request: create an order")
        found = lm.db.counters
        assert found.num_computed_tokens == lm.counters.num_computed_tokens > 0
        assert 0 < found.computed_seconds < 60
        lm.db.flush()
        assert counts(lm.db.directory)["computed_tokens"] == found.num_computed_tokens
        assert counts(lm.db.directory)["computed_seconds"] == pytest.approx(found.computed_seconds)

    def test_keys_and_values_count_when_they_are_read(self, lm: bp.LanguageModel) -> None:
        context = lm.text("Pick the endpoint.\n")
        lm(context)
        lm.db.flush()
        lm.db.memory.clear()
        before = lm.db.counters
        lm(context + "Request: create an order")
        found = lm.db.counters
        # Of the context: its scores, its logits for the next token, its keys and values.
        assert found.num_disk_hits - before.num_disk_hits == 3
        assert found.num_part_misses - before.num_part_misses == 1, "the scores that were asked for"

    def test_every_count_says_what_it_is(self) -> None:
        names = [field.name for field in dataclasses.fields(Counters)]
        assert set(NAMES_IN_CATALOG) <= set(names)
        assert len(set(NAMES_IN_CATALOG.values())) == len(NAMES_IN_CATALOG)
        assert Counters() == Counters(**dict.fromkeys(names, 0))

    def test_threads_lose_no_count(self) -> None:
        tally = Tally(MemoryStore())

        def add() -> None:
            for _ in range(5000):
                tally.add("num_waits")

        threads = [threading.Thread(target=add) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert tally.counters.num_waits == 40_000


class TestSums:
    def test_the_catalog_knows_after_a_flush_and_after_closing(self, open_db: Open) -> None:
        db = open_db()
        db.put([new_part("a")])
        db.flush()
        db.fetch(wanted("b"))
        assert "misses" not in counts(db.directory)
        db.flush()
        assert counts(db.directory)["misses"] == 1
        db.fetch(wanted("b", "a"))
        db.close()
        found = counts(db.directory)
        assert found["misses"] == 2
        assert found.get("memory_hits", 0) + found.get("disk_hits", 0) == 1
        assert set(found) <= set(NAMES_IN_CATALOG.values())

    def test_each_stored_group_brings_its_counts(self, open_db: Open) -> None:
        db = open_db()
        db.fetch(wanted("a"))
        db.put([new_part("a")])
        deadline = time.monotonic() + 30
        while not _has_counts(db.directory) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert counts(db.directory)["misses"] == 1

    def test_processes_that_count_at_once_sum_up_exactly(self, open_db: Open, tmp_path: Path) -> None:
        with open_db(tmp_path / "db") as db:
            db.put([new_part("a"), new_part("b")])
        before = counts(tmp_path / "db")
        script = (
            "db = bp.open(sys.argv[1], memory_nbytes=0)\nsys.stdin.readline()\n"
            "for number in range(20):\n"
            "    db.fetch(wanted('a', 'b', f'{os.getpid()} {number}'))\n"
            "    if number % 5 == 0: db.flush()\n"
            "db.close()"
        )
        children = [start(script, tmp_path / "db") for _ in range(4)]
        for child in children:
            child.communicate("\n", timeout=300)
            assert child.returncode == 0
        found = counts(tmp_path / "db")
        assert found["disk_hits"] - before.get("disk_hits", 0) == 4 * 20 * 2
        assert found["misses"] == 4 * 20

    def test_a_fork_does_not_count_twice(self, open_db: Open, tmp_path: Path) -> None:
        db = open_db(tmp_path / "db")
        db.put([new_part("a")])
        db.flush()
        db.fetch(wanted("a", "b"))
        db.tally.report("read-failure", "the parent's")
        child = os.fork()
        if child == 0:
            try:
                db.fetch(wanted("c", "d"))
                db.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        db.close()
        found = counts(db.directory)
        assert found["misses"] == 3, "one of the parent, two of the child"
        assert found["disk_hits"] + found.get("memory_hits", 0) == 1
        assert [event.detail for event in events(db.directory)] == ["the parent's"]

    def test_a_killed_process_loses_what_it_did_since_the_last_flush(self, open_db: Open, tmp_path: Path) -> None:
        open_db(tmp_path / "db").close()
        script = (
            "db = bp.open(sys.argv[1])\ndb.fetch(wanted('a', 'b'))\ndb.flush()\ndb.fetch(wanted('c'))\n"
            "print('ready', flush=True)\nsys.stdin.readline()"
        )
        child = start(script, tmp_path / "db")
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=300)
        assert counts(tmp_path / "db") == {"misses": 2}

    def test_what_the_catalog_missed_is_told_the_next_time(
        self, open_db: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        db = open_db()
        db.put([new_part("a")])
        db.flush()
        db.fetch(wanted("b"))
        with monkeypatch.context() as patch:
            patch.setattr(Catalog, "count", _fail)
            db.flush()
        assert "misses" not in counts(db.directory)
        assert "missed counts" in caplog.text
        db.fetch(wanted("b"))
        db.close()
        assert counts(db.directory)["misses"] == 2

    def test_a_handle_that_does_nothing_tells_nothing(self, open_db: Open) -> None:
        db = open_db()
        db.flush()
        db.close()
        assert db.directory is not None
        assert not (db.directory / "catalog.sqlite").exists()


def _has_counts(directory: Path | None) -> bool:
    try:
        return bool(counts(directory))
    except CatalogError:
        return False


def _fail(*_: object) -> None:
    raise CatalogError("the catalog is locked", hint="Wait.")


class TestEvents:
    def test_a_damaged_part_is_an_event_with_its_address(self, open_db: Open, tmp_path: Path) -> None:
        with open_db(tmp_path / "db") as db:
            db.put([new_part("a"), new_part("b")])
        flip_a_bit(tmp_path / "db", Key(address("b"), Part.LOGITS))
        with open_db(tmp_path / "db") as db:
            db.fetch(wanted("a", "b"))
            assert db.counters.num_quarantined == 1
        [event] = events(tmp_path / "db")
        assert (event.kind, event.address) == ("quarantine", address("b"))
        assert event.detail == "the logits part does not match its digest"
        assert abs(event.at - time.time()) < 60
        assert counts(tmp_path / "db")["quarantined_parts"] == 1

    def test_failures_of_the_store_are_events_and_counts(self, open_db: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        db = open_db()
        with monkeypatch.context() as patch:
            patch.setattr(db.store, "get", _fail_to_read)
            db.fetch(wanted("a"))
        with monkeypatch.context() as patch:
            patch.setattr(db.store, "put", _fail_to_read)
            db.put([new_part("a")])
            with pytest.raises(StoreError):
                db.flush()
        db.close()
        assert [event.kind for event in events(db.directory)] == ["write-failure", "read-failure"]
        assert all("broken" in event.detail for event in events(db.directory))
        found = counts(db.directory)
        assert (found["read_failures"], found["write_failures"]) == (1, 1)

    def test_a_storm_of_failures_is_counted_in_full_and_listed_in_part(
        self, open_db: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        db = open_db()
        with monkeypatch.context() as patch:
            patch.setattr(db.store, "get", _fail_to_read)
            for number in range(500):
                db.fetch(wanted(str(number)))
        db.close()
        assert counts(db.directory)["read_failures"] == 500
        assert 1 <= len(events(db.directory)) <= 50

    def test_texts_are_not_in_events(self, open_db: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        db = open_db()
        monkeypatch.setattr(writer, "encode_pieces", _fail_to_encode)
        db.put([new_part("a secret text")])
        with pytest.raises(bp.BackpromptError):
            db.flush()
        db.close()
        [event] = events(db.directory)
        assert "secret" not in event.detail

    def test_a_database_that_may_only_be_read_tells_nobody(self) -> None:
        with Database(FaultyStore(), directory=None, readonly=True) as db:
            db.fetch(wanted("a"))
            db.put([new_part("a")])
            assert (db.counters.num_part_misses, db.counters.num_computed_tokens) == (1, origin("a").num_tokens)


def _fail_to_read(*_: object, **__: object) -> None:
    raise BROKEN


def _fail_to_encode(*_: object) -> None:
    raise ValueError("cannot be encoded")
