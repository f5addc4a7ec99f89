"""A database with a limit: what goes, what stays, and what is refused, however many write."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import backprompt_db as bp
from backprompt_db.database.config import Config, read_config, write_config
from backprompt_db.database.creating import create_database
from backprompt_db.database.database import Database
from backprompt_db.errors import CatalogError, FormatError, StoreFull
from backprompt_db.operations.verify import verify
from backprompt_db.prompt.representation import Arrays, Part
from backprompt_db.store.contract import Key
from backprompt_db.store.files import Sharing
from tests.support.faults import (
    TIMEOUT_SECONDS,
    TOGETHER,
    address_of,
    child,
    keys_of,
    new_parts,
    next_line,
    prompt,
    run_together,
    segments,
    wait_until_stopped,
    wanted_of,
    wrong,
)
from tests.support.limits import (
    HIGH_NBYTES,
    MAX_NBYTES,
    assert_sound,
    assert_whole,
    kv_of,
    live,
    make_limited,
    of_size,
    open_limited,
    put,
    stored,
)
from tests.support.store_contract import in_threads

assert sys.platform != "win32"

LARGE = 4500
"""Tokens of which the keys and values take more than a megabyte."""


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with open_limited(tmp_path / "db") as opened:
        yield opened


def age(db: Database, seconds: float, *, but: tuple[bytes, ...] = ()) -> None:
    """Let everything else have been used so long ago."""
    assert db.directory is not None
    with contextlib.closing(sqlite3.connect(db.directory / "catalog.sqlite")) as connection, connection:
        used = time.time() - seconds
        for (address,) in connection.execute("SELECT address FROM representations").fetchall():
            if bytes(address) not in but:
                connection.execute(
                    "UPDATE representations SET created_at = ?, last_used_at = ? WHERE address = ?",
                    (used, used, address),
                )


def change(db: Database, **values: Any) -> None:
    assert db.directory is not None
    write_config(db.directory, dataclasses.replace(read_config(db.directory), **values))


class TestStaysBelow:
    def test_one_writer_never_has_more_in_use_than_the_high_water_mark(self, db: Database) -> None:
        for number in range(60):
            put(db, prompt(number))
            assert_sound(db)
        assert db.counters.num_evicted > 50
        assert db.counters.num_evicted_nbytes > 2 * MAX_NBYTES
        assert db.counters.num_write_failures == 0
        assert verify(db).is_clean

    def test_what_is_stored_is_right_and_what_is_gone_is_a_miss_and_computed_again(self, db: Database) -> None:
        for number in range(40):
            put(db, prompt(number))
        found: dict[Key, Arrays] = {}
        for number in range(40):
            found |= db.fetch(wanted_of(prompt(number)))
        assert 0 < len(found) < 3 * 40 * 3
        assert wrong(found) == []
        put(db, prompt(0))
        assert_whole(db, prompt(0)[-1:])

    def test_threads_stay_below_it_together(self, tmp_path: Path) -> None:
        place = make_limited(tmp_path / "db")

        def write(number: int) -> int:
            with bp.open(place, memory_nbytes=0) as db:
                for turn in range(15):
                    put(db, prompt(turn, author=str(number)))
                    assert live(db) <= HIGH_NBYTES
                assert db.counters.num_write_failures == 0
                return db.counters.num_evicted

        assert sum(in_threads(4, write)) > 0
        with bp.open(place) as db:
            assert_sound(db)
            assert verify(db).is_clean

    def test_processes_stay_below_it_together(self, tmp_path: Path) -> None:
        place = make_limited(tmp_path / "db")
        script = TOGETHER + (
            "db = bp.open(place, memory_nbytes=0)\n"
            "for number in range(25):\n    put_prompts(db, [number], author='AUTHOR')\n"
            "    assert db.store.usage().live_nbytes <= 0.95 * 4_000_000\n"
            "assert db.counters.num_write_failures == 0\n"
            "print(db.counters.num_evicted, db.counters.num_stored)\n"
        )
        ends = run_together(*(script.replace("AUTHOR", str(author)) for author in range(3)), place=place)
        evicted, written = (sum(int(words[each]) for words in ends) for each in (0, 1))
        with bp.open(place) as db:
            assert_sound(db)
            assert len(stored(db)) == written - evicted
            assert evicted > 0
            assert verify(db).is_clean

    def test_the_file_stays_as_small_in_a_long_churn(self, db: Database) -> None:
        for number in range(150):
            put(db, prompt(number, author="a churn"))
        assert db.counters.num_stored_nbytes > 5 * MAX_NBYTES
        assert db.store.usage().file_nbytes < 1.5 * MAX_NBYTES

    def test_a_collection_ends_at_the_low_water_mark(self, tmp_path: Path) -> None:
        with open_limited(tmp_path / "db", high_water=0.9, low_water=0.3) as db:
            while not db.counters.num_evicted:
                before = live(db)
                put(db, of_size(100, number=before))
            assert before > 0.85 * MAX_NBYTES
            assert live(db) < 0.35 * MAX_NBYTES


class TestWhatGoes:
    def test_leaves_go_before_what_they_follow(self, db: Database) -> None:
        chain = of_size(LARGE, after=of_size(LARGE))
        put(db, chain)
        put(db, of_size(LARGE, number=1))
        put(db, of_size(LARGE, number=2))
        assert not db.store.has(kv_of(chain[1]))
        assert db.store.has(kv_of(chain[0]))
        assert_sound(db)

    def test_what_is_pinned_stays_with_what_it_follows(self, db: Database) -> None:
        chain = of_size(LARGE, after=of_size(100))
        put(db, chain)
        assert db.catalog is not None
        db.catalog.pin([address_of(chain[1])])
        for number in range(40):
            put(db, prompt(number))
        assert db.counters.num_evicted > 0
        assert_whole(db, chain[1:])
        assert db.store.has(kv_of(chain[0])), "its child builds on it"

    def test_what_was_used_within_the_grace_goes_last(self, db: Database) -> None:
        change(db, grace_seconds=3600.0)
        old, young = of_size(LARGE), of_size(LARGE, number=1)
        put(db, old)
        age(db, 7200)
        put(db, young)
        put(db, of_size(LARGE, number=2))
        put(db, of_size(LARGE, number=3))
        assert (db.store.has(kv_of(old[0])), db.store.has(kv_of(young[0]))) == (False, True)
        put(db, of_size(LARGE, number=4))
        assert db.counters.num_evicted_nbytes > 2_000_000, "of young ones, when there is nothing else"
        assert_sound(db)

    def test_what_was_not_used_for_longer_than_the_time_to_live_goes_when_somebody_writes(self, tmp_path: Path) -> None:
        old, young = of_size(20), of_size(20, number=1)
        with open_limited(tmp_path / "db", ttl_seconds=3600.0) as db:
            put(db, old)
            put(db, young)
            age(db, 7200, but=(address_of(young[0]),))
        with bp.open(tmp_path / "db") as db:
            assert_whole(db, young)
            put(db, of_size(3))
            assert db.counters.num_evicted == 3
            assert stored(db).isdisjoint(keys_of(old))
            assert_whole(db, young)

    def test_a_use_counts_against_the_time_to_live(self, tmp_path: Path) -> None:
        with open_limited(tmp_path / "db", ttl_seconds=3600.0) as db:
            put(db, of_size(20))
            age(db, 7200)
            assert_whole(db, of_size(20))
        with bp.open(tmp_path / "db") as db:
            put(db, of_size(3))
            assert db.counters.num_evicted == 0
            assert_whole(db, of_size(20))

    def test_evictions_are_counted_for_all_processes(self, db: Database) -> None:
        for number in range(40):
            put(db, prompt(number))
        db.flush()
        assert db.catalog is not None
        assert db.catalog.counts()["evicted_parts"] == db.counters.num_evicted > 0
        assert db.catalog.counts()["evicted_nbytes"] == db.counters.num_evicted_nbytes


class TestRefused:
    def test_a_part_that_is_larger_than_the_limit_is_refused_and_nothing_goes_for_it(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with open_limited(tmp_path / "db", max_nbytes=1_000_000) as db:
            put(db, of_size(100))
            before = stored(db)
            db.put(new_parts(of_size(LARGE), [Part.KV]))
            with pytest.raises(StoreFull, match=r"more than 927.7 KiB would be in use.*--max-size"):
                db.flush()
            assert stored(db) == before
            assert (db.counters.num_evicted, db.counters.num_write_failures) == (0, 1)
        assert "parts could not be stored, computation goes on" in caplog.text

    def test_when_all_is_pinned_new_parts_are_refused_and_counted(self, db: Database) -> None:
        kept = [of_size(LARGE, number=number) for number in range(3)]
        for chain in kept:
            put(db, chain)
        assert db.catalog is not None
        db.catalog.pin([address_of(chain[0]) for chain in kept])
        db.put(new_parts(of_size(LARGE, number=9), [Part.KV]))
        with pytest.raises(StoreFull, match=r"Evict or unpin something"):
            db.flush()
        assert (db.counters.num_write_failures, db.counters.num_evicted) == (1, 0)
        for chain in kept:
            assert_whole(db, chain)
        put(db, of_size(1))
        assert_whole(db, of_size(1))

    def test_a_model_goes_on_computing_when_nothing_can_be_stored(
        self, tmp_path: Path, make_lm: Callable[..., bp.LanguageModel], caplog: pytest.LogCaptureFixture
    ) -> None:
        with open_limited(tmp_path / "db", max_nbytes=20_000) as db:
            lm, oracle = make_lm(db=db), make_lm()
            for request in ("Request: show me everyone", " Request: create an order"):
                result, right = (each(each.text("Pick the endpoint.\n") + request) for each in (lm, oracle))
                torch.testing.assert_close(result.logits, right.logits, atol=1e-4, rtol=0)
            with contextlib.suppress(StoreFull):
                db.flush()
            assert db.counters.num_write_failures > 0
            assert_sound(db, high_nbytes=19_000)
        assert caplog.text.count("parts could not be stored") == 1

    def test_what_a_deleted_catalog_had_listed_goes_too(self, tmp_path: Path) -> None:
        place = make_limited(tmp_path / "db")
        with open_limited(place) as db:
            for number in range(30):
                put(db, prompt(number, author="before"))
        (place / "catalog.sqlite").unlink()
        with open_limited(place) as db:
            for number in range(30):
                put(db, prompt(number, author="after"))
            assert db.counters.num_write_failures == 0
            assert verify(db).is_clean  # and so lists all that is stored

    def test_without_a_catalog_nobody_knows_what_to_remove(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        place = make_limited(tmp_path / "db")
        (place / "catalog.sqlite").write_bytes(b"garbage" * 999)
        with bp.open(place, memory_nbytes=0) as db:
            first, second = of_size(LARGE), of_size(LARGE, number=1)
            put(db, first)
            put(db, second)
            db.put(new_parts(of_size(LARGE, number=2)) + new_parts(of_size(LARGE, number=3)))
            with pytest.raises(CatalogError, match=r"nobody knows what to remove.*reindex"):
                db.flush()
            assert live(db) <= HIGH_NBYTES
            assert db.counters.num_write_failures > 0
            assert db.counters.num_evicted == 0
            assert_whole(db, first)
            assert_whole(db, second)
        assert caplog.text.count("working without the catalog") == 1
        assert "the catalog missed" not in caplog.text

    def test_an_unreadable_configuration_means_the_default_limit(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        place = make_limited(tmp_path / "db")
        (place / "config.json").write_text('{"max_nbytes": "much"}')
        (place / "config.json").chmod(0o600)
        with bp.open(place) as db:
            put(db, of_size(20))
            assert db.evictor.max_live_nbytes == pytest.approx(0.95 * default_nbytes(place), rel=0.01)
        assert caplog.text.count("the default limit holds") == 1
        assert "config --max-size" in caplog.text


def default_nbytes(place: Path) -> int:
    return min(50 * 10**9, shutil.disk_usage(place).free // 4)


_ABSURD = (b"1e12", b"1e300", b"1" + b"0" * 400)
"""Seconds that are no length of time."""


class TestConfiguration:
    def test_a_new_database_is_private_and_has_the_default_limit(self, tmp_path: Path) -> None:
        with bp.open(tmp_path / "db"):
            pass
        found = read_config(tmp_path / "db")
        assert found.sharing is Sharing.PRIVATE
        assert found.max_nbytes == pytest.approx(default_nbytes(tmp_path), rel=0.01)
        assert (found.ttl_seconds, found.grace_seconds) == (None, 10.0)

    @pytest.mark.parametrize(
        "content",
        [
            *(b"", b"{", b"[]", b"null", b"\xff", b"{} {}", b"[" * 100_000, b'{"mood": ' + b"[" * 100_000),
            *(b'{"max_nbytes": %s}' % each for each in (b"0", b"-1", b"true", b"1.5", b"1e3", b'"1"', b"[1]", b"NaN")),
            *(b'{"ttl_seconds": %s}' % each for each in (b"-1", b"NaN", b"Infinity", b"1e999", b"true", b'"1"')),
            *(b'{"max_nbytes": 1%s}' % (b"0" * num_zeros) for num_zeros in (19, 400, 5000)),
            *(b'{"%s": %s}' % (name, each) for name in (b"ttl_seconds", b"grace_seconds") for each in _ABSURD),
            *(b'{"grace_seconds": %s}' % each for each in (b"-1", b"null", b"false")),
            *(b'{"low_water": %s}' % each for each in (b"0", b"0.95", b'"0.5"', b"true", b"null")),
            *(b'{"high_water": %s}' % each for each in (b"1.1", b"0.85", b"null")),
            *(b'{"sharing": %s}' % each for each in (b'"world"', b"null", b"1", b"[]")),
        ],
    )
    def test_one_that_means_nothing_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(FormatError, match=r"config\.json cannot be read .* config --max-size"):
            read_config(tmp_path)

    @pytest.mark.parametrize(
        "limits",
        [{"max_nbytes": 5e9}, {"max_nbytes": True}, {"max_nbytes": "5GB"}, {"ttl_seconds": "1"}, {"sharing": "group"}],
    )
    def test_one_that_could_not_be_read_is_never_made(self, tmp_path: Path, limits: dict[str, Any]) -> None:
        ((name, value),) = limits.items()
        with pytest.raises(FormatError, match=f"{name}={value!r} is not of the type") as caught:
            create_database(tmp_path / "db", limits=limits)
        assert caught.value.hint == "Give another value."
        assert not (tmp_path / "db" / "config.json").exists()
        with bp.open(tmp_path / "db") as db:
            put(db, of_size(1))

    @pytest.mark.parametrize("name", ["max_nbytes", "ttl_seconds"])
    def test_with_an_absurd_one_the_default_limit_holds_and_parts_are_stored(self, tmp_path: Path, name: str) -> None:
        bp.open(tmp_path / "db").close()
        (tmp_path / "db" / "config.json").write_text(f'{{"{name}": 1{"0" * 400}}}')
        with bp.open(tmp_path / "db") as db:
            put(db, of_size(1))
            assert db.counters.num_stored > 0
            assert db.evictor.limits.config.max_nbytes == pytest.approx(default_nbytes(tmp_path), rel=0.01)

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
    def test_one_is_read_in_any_encoding_that_an_editor_gives_it(self, tmp_path: Path, encoding: str) -> None:
        (tmp_path / "config.json").write_text('{"max_nbytes": 5, "größe": 1}', encoding=encoding)
        assert read_config(tmp_path) == Config(max_nbytes=5)

    def test_a_lone_surrogate_in_one_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"sharing": "\\ud800"}')
        with pytest.raises(FormatError, match="a string in it has a lone surrogate"):
            read_config(tmp_path)

    def test_what_a_newer_version_adds_is_ignored_and_what_an_older_one_lacks_has_its_default(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text('{"mood": {"sunny": [1]}, "max_nbytes": 5, "ttl_seconds": 60}')
        assert read_config(tmp_path) == Config(max_nbytes=5, ttl_seconds=60)
        write_config(tmp_path, Config(max_nbytes=5, sharing=Sharing.GROUP))
        assert json.loads((tmp_path / "config.json").read_text()) == {
            "sharing": "group", "max_nbytes": 5, "high_water": 0.95, "low_water": 0.85, "ttl_seconds": None,
            "grace_seconds": 10.0,
        }  # fmt: skip

    def test_an_open_database_follows_a_change(self, db: Database) -> None:
        change(db, max_nbytes=None)
        for number in range(30):
            put(db, prompt(number))
        assert live(db) > MAX_NBYTES
        change(db, max_nbytes=MAX_NBYTES)
        put(db, of_size(1))
        assert_sound(db)
        change(db, max_nbytes=2_000_000)
        put(db, of_size(1, number=1))
        assert_sound(db, high_nbytes=1_900_000)

    def test_a_database_of_an_earlier_version_has_no_limit(self, db: Database) -> None:
        assert db.directory is not None
        (db.directory / "config.json").unlink()
        for number in range(20):
            put(db, prompt(number))
        assert live(db) > MAX_NBYTES
        assert db.counters.num_evicted == 0

    def test_a_database_in_memory_has_no_limit(self) -> None:
        with bp.open(":memory:", memory_nbytes=0) as db:
            for number in range(20):
                put(db, prompt(number))
            assert live(db) > MAX_NBYTES
            assert_whole(db, prompt(0))


class TestTogether:
    def test_two_evictors_at_once_remove_nothing_twice(self, tmp_path: Path) -> None:
        place = make_limited(tmp_path / "db", max_nbytes=None)
        with bp.open(place) as db:
            for number in range(20):
                put(db, prompt(number))
            num_parts = len(stored(db))
        script = TOGETHER + (
            "db = bp.open(place)\ndone = db.evictor.evict(to_nbytes=0)\n"
            "print(done.num_parts, db.counters.num_evicted)\n"
        )
        ends = run_together(script, script, place=place)
        assert sum(int(words[0]) for words in ends) == num_parts
        assert all(words[0] == words[1] for words in ends)
        with bp.open(place) as db:
            assert stored(db) == set()
            assert verify(db).is_clean

    def test_an_evictor_waits_for_one_who_is_writing_and_then_knows_what_it_built(self, tmp_path: Path) -> None:
        place, chain = make_limited(tmp_path / "db"), segments("Before", " after.")
        with bp.open(place) as db:
            put(db, chain[:1])
            script = (
                "db = bp.open(place)\ndb.put(new_parts(segments('Before', ' after.')[1:]))\nprint('put', flush=True)\n"
            )
            with child(script, place, failpoint="store.put.inside=sleep:1@1") as writer:
                assert next_line(writer) == "put"
                while not list((place / "pending").iterdir()):
                    time.sleep(0.01)
                db.evictor.evict(to_nbytes=0, selection=_prefix("Before"))
                assert writer.wait(300) == 0
            assert db.counters.num_evicted == 6, "the child, then what it follows"
            assert stored(db) == set()

    def test_what_was_chosen_and_then_pinned_stays(self, tmp_path: Path) -> None:
        place = make_limited(tmp_path / "db", max_nbytes=None)
        script = "db = bp.open(place)\nprint(db.evictor.evict(to_nbytes=0).num_parts)\n"
        with bp.open(place) as db:
            for number in range(60):  # more than one transaction removes
                put(db, prompt(number))
            before, catalog = stored(db), db.catalog
            assert catalog is not None
            with child(script, place, failpoint="collect.deleted=stop@1") as evictor:
                wait_until_stopped(evictor)
                kept = stored(db)
                catalog.pin({key.address for key in kept})
                evictor.send_signal(signal.SIGCONT)
                out, err = evictor.communicate(timeout=TIMEOUT_SECONDS)
            assert (int(out), err) == (len(before) - len(kept), "")
            assert 0 < len(kept) < len(before)
            assert stored(db) == kept

    def test_a_child_of_what_was_evicted_meanwhile_is_left_out_and_counted(
        self, db: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        chain = segments("Before", " after.", " and more.")
        put(db, chain[:1])
        db.evictor.evict(to_nbytes=0)
        with caplog.at_level(logging.WARNING):
            put(db, chain[1:])
        assert (db.counters.num_orphaned, db.counters.num_write_failures) == (2, 0)
        assert stored(db) == set(keys_of(chain[1:], [Part.SCORES, Part.LOGITS]))
        assert_sound(db)
        assert caplog.text == ""
        put(db, chain)
        assert_whole(db, chain)


def _prefix(text: str) -> Any:
    from backprompt_db.catalog.records import Selection

    return Selection(text_prefix=text)
