"""`bp.open(place, mode="r")` reads, beside those who write, and writes nothing at all."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import backprompt_db as bp
from backprompt_db.catalog.records import Selection
from backprompt_db.database.database import Database
from backprompt_db.errors import FormatTooNew, PromptError, StoreReadOnly, UnsafeLocation
from backprompt_db.operations.annotate import pin
from backprompt_db.operations.evict import compact, evict, eviction_order
from backprompt_db.operations.purge import purge
from backprompt_db.operations.reindex import reindex
from backprompt_db.operations.verify import verify
from backprompt_db.prompt.representation import Part
from backprompt_db.store.files import Sharing
from tests.conftest import tiny_gpt2
from tests.support.database_files import snapshot
from tests.support.faults import (
    TOGETHER,
    child,
    keys_of,
    new_parts,
    next_line,
    prompt,
    put_prompts,
    run_together,
    segments,
    wanted_of,
)
from tests.support.limits import assert_whole, put, stored
from tests.support.operations import flip_a_bit

assert sys.platform != "win32"

OpenDB = Callable[..., Database]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A database with two prompts."""
    with bp.open(tmp_path / "db") as db:
        put_prompts(db, [0, 1])
    return tmp_path / "db"


def names(place: Path) -> set[str]:
    return {str(path) for path in place.rglob("*")}


def reader(place: Path, **options: Any) -> Database:
    return bp.open(place, mode="r", memory_nbytes=0, **options)


class TestNothingIsWritten:
    def test_by_hits_misses_puts_and_closing(self, place: Path) -> None:
        before, files = snapshot(place), names(place)
        with reader(place) as db:
            assert db.readonly
            assert_whole(db, prompt(0))
            assert db.fetch(wanted_of(segments("Nobody", " has this."))) == {}
            db.put(new_parts(segments("Nobody", " has this.")))
            db.flush()
            assert db.fetch(wanted_of(segments("Nobody", " has this."))) == {}
            assert (db.counters.num_hits, db.counters.num_misses) == (3, 4)
            assert (db.counters.num_stored, db.counters.num_write_failures) == (0, 0)
        assert (snapshot(place), names(place)) == (before, files)

    def test_by_meeting_a_damaged_part(self, place: Path) -> None:
        bad = keys_of(prompt(0))[0]
        flip_a_bit(place, bad)
        before = snapshot(place)
        for _ in range(2):
            with reader(place) as db:
                assert db.fetch({bad.address: [bad.part]}) == {}
                assert db.counters.num_quarantined == 1
        assert snapshot(place) == before

    def test_by_a_model_that_computes_what_is_missing(self, tmp_path: Path, make_lm: Any) -> None:
        with bp.open(tmp_path / "db") as db:
            make_lm(db=db)(bp.Text("The quick brown fox") + " jumps")
        before = snapshot(tmp_path / "db")
        with reader(tmp_path / "db") as db:
            lm, oracle = make_lm(tiny_gpt2(), db=db), make_lm()
            result, right = (each(each.text("The quick brown fox") + " jumps" + " over") for each in (lm, oracle))
            assert result.num_cached_tokens > 0
            torch.testing.assert_close(result.logits, right.logits, atol=1e-4, rtol=0)
            assert db.counters.num_computed_tokens > 0
            with pytest.raises(StoreReadOnly, match="may only be read"):
                lm.pin(lm.text("The quick brown fox"))
        assert snapshot(tmp_path / "db") == before

    def test_by_maintenance_which_says_no(self, place: Path) -> None:
        before, everything = snapshot(place), Selection()
        with reader(place) as db:
            for attempt in (
                lambda: evict(db, to_nbytes=0, selection=everything),
                lambda: eviction_order(db, to_nbytes=0, selection=everything),
                lambda: purge(db, Selection(text_contains="Request")),
                lambda: pin(db, everything),
                lambda: compact(db),
                lambda: reindex(db),
            ):
                with pytest.raises(StoreReadOnly):
                    attempt()
            assert verify(db).is_clean
        assert snapshot(place) == before

    def test_where_marks_were_left(self, place: Path) -> None:
        (place / "pending" / "1-killed-0").write_bytes(b"an entry")
        before, files = snapshot(place), names(place)
        with reader(place) as db:
            assert_whole(db, prompt(0))
        assert (snapshot(place), names(place)) == (before, files)

    def test_and_nothing_is_made(self, place: Path, caplog: pytest.LogCaptureFixture) -> None:
        for name in ("catalog.sqlite", "config.json", "collect.lock", "writing.lock", "turnstile.lock", "flights.lock"):
            (place / name).unlink(missing_ok=True)
        (place / "pending").rmdir()
        files = names(place)
        with caplog.at_level(logging.WARNING), reader(place) as db:
            assert_whole(db, prompt(0))
        assert names(place) == files
        assert caplog.text == ""


class TestOpening:
    def test_no_database_is_made(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for place in (tmp_path / "nowhere", tmp_path / "empty"):
            with pytest.raises(UnsafeLocation, match=r'there is no database in .*mode="a", which makes one'):
                reader(place)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]
        assert list((tmp_path / "empty").iterdir()) == []

    @pytest.mark.parametrize("mode", ["w", "rw", "", "R", "a+"])
    def test_another_mode_is_refused(self, place: Path, tmp_path: Path, mode: str) -> None:
        for where in (place, tmp_path / "new", ":memory:"):
            with pytest.raises(PromptError, match=r"there is no mode .*\"r\" to read only"):
                bp.open(where, mode=mode)
        assert not (tmp_path / "new").exists()

    def test_a_newer_format_is_refused(self, place: Path) -> None:
        (place / "manifest.json").write_text(
            (place / "manifest.json").read_text().replace('"format": 1', '"format": 2')
        )
        with pytest.raises(FormatTooNew):
            reader(place)

    def test_a_catalog_of_an_older_schema_stays_as_it_is(self, place: Path) -> None:
        from tests.faults.test_crashes import downgrade

        downgrade(place)
        before = snapshot(place)
        with reader(place) as db:
            assert db.catalog is None
            assert_whole(db, prompt(0))
        assert snapshot(place) == before

    def test_in_memory_nothing_is_kept(self) -> None:
        with reader(Path(":memory:").name) as db:  # type: ignore[arg-type]
            put(db, prompt(0))
            assert db.fetch(wanted_of(prompt(0))) == {}
            assert db.counters.num_stored == 0


class TestBesideWriters:
    def test_what_another_process_writes_is_seen(self, place: Path) -> None:
        script = (
            "db = bp.open(place)\nprint('open', flush=True)\n"
            "for line in sys.stdin:\n    put_prompts(db, [int(line)])\n    print('put', flush=True)\n"
        )
        with child(script, place) as writer, reader(place) as db:
            assert next_line(writer) == "open"
            assert writer.stdin is not None
            for number in range(2, 8):
                assert db.fetch(wanted_of(prompt(number)[2:])) == {}
                writer.stdin.write(f"{number}\n")
                writer.stdin.flush()
                assert next_line(writer) == "put"
                assert_whole(db, prompt(number))
            assert (db.counters.num_read_failures, db.counters.num_quarantined) == (0, 0)

    def test_what_the_same_process_writes_is_seen(self, place: Path, open_db: OpenDB) -> None:
        first, writer = open_db(place, mode="r", memory_nbytes=0), open_db(place)
        last = open_db(place, mode="r", memory_nbytes=0)
        put_prompts(writer, [2])
        for db in (first, last):
            assert_whole(db, prompt(2))
            put(db, prompt(3))
            assert db.counters.num_stored == 0
        assert stored(writer).isdisjoint(keys_of(prompt(3)[1:], [Part.LOGITS]))
        first.close()
        put_prompts(writer, [4])
        assert_whole(last, prompt(4))

    def test_a_compaction_and_an_eviction_of_another_process_are_followed(self, place: Path) -> None:
        with reader(place) as db:
            assert_whole(db, prompt(0))
            script = (
                "db = bp.open(place)\ndb.evictor.evict(to_nbytes=0)\ndb.store.compact()\nput_prompts(db, [1])\n"
                "print('done')\n"
            )
            with child(script, place) as writer:
                assert writer.communicate(timeout=300)[0] == "done\n"
            assert db.fetch(wanted_of(prompt(0))) == {}
            assert_whole(db, prompt(1))
            assert db.counters.num_read_failures == 0

    def test_many_readers_read_together_while_one_writes(self, place: Path) -> None:
        script = TOGETHER + (
            "with bp.open(place, mode='r', memory_nbytes=0) as db:\n"
            "    for _ in range(20):\n        assert_reads_back(db, [0, 1])\n"
            "    print(db.counters.num_disk_hits)\n"
        )
        writer = TOGETHER + "with bp.open(place) as db: put_prompts(db, range(2, 20))\nprint('written')\n"
        assert run_together(script, script, writer, place=place) == [["360"], ["360"], ["written"]]


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_members_of_a_group_of_readers_read_together_with_the_owner_writing(tmp_path: Path) -> None:
    from backprompt_db.database.creating import create_database
    from tests.support.faults import IN_OTHER_SHOES, public_directory

    member = (
        "import alembic.command, backprompt_db.catalog, backprompt_db.database.opening\n"
        + IN_OTHER_SHOES
        + "with bp.open(place, memory_nbytes=0) as db:\n    print('open', flush=True)\n"
        "    for line in sys.stdin:\n        assert_reads_back(db, [int(line)])\n        print('read', flush=True)\n"
        "    db.put(new_parts(garbage())); db.flush()\n    print(db.readonly, db.counters.num_stored, flush=True)\n"
    )
    with public_directory() as directory:
        place = directory / "db"
        create_database(place, sharing=Sharing.READERS, group="65534")
        with bp.open(place) as db, child(member, place) as one, child(member, place) as other:
            for process in (one, other):
                assert next_line(process) == "open"
            for number in range(5):
                put_prompts(db, [number])
                for process in (one, other):
                    assert process.stdin is not None
                    process.stdin.write(f"{number}\n")
                    process.stdin.flush()
                    assert next_line(process) == "read"
            for process in (one, other):
                assert process.communicate(timeout=300)[0] == "True 0\n"
            assert db.counters.num_write_failures == 0
