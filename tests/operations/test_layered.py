"""Opening a database over a base, and maintenance of it, which is about the private one alone."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import backprompt_db as bp
from backprompt_db.catalog.records import Selection
from backprompt_db.database.database import Database
from backprompt_db.database.manifest import read_manifest
from backprompt_db.errors import CatalogError, FormatError, FormatTooNew, PromptError, UnsafeLocation
from backprompt_db.operations.evict import compact, evict, eviction_order
from backprompt_db.operations.purge import purge
from backprompt_db.operations.reindex import reindex
from backprompt_db.operations.stats import gather
from backprompt_db.operations.verify import verify
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key
from tests.support.cli import run_json
from tests.support.database_files import snapshot
from tests.support.faults import (
    IN_OTHER_SHOES,
    address_of,
    dangling,
    keys_of,
    prompt,
    public_directory,
    put_prompts,
    run,
    segments,
)
from tests.support.limits import HIGH_NBYTES, assert_whole, live, make_limited, of_size, put, stored
from tests.support.operations import flip_a_bit

assert sys.platform != "win32"

EVERYTHING = Selection()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A team's database with a prompt."""
    with bp.open(tmp_path / "team") as db:
        put_prompts(db, [0])
    return tmp_path / "team"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return tmp_path / "mine"


class TestOpening:
    def test_a_base_that_is_missing_is_said_so_and_nothing_is_made(self, tmp_path: Path, mine: Path) -> None:
        for place in (mine, ":memory:"):
            with pytest.raises(UnsafeLocation, match=r"there is no database in .*nowhere"):
                bp.open(place, base=tmp_path / "nowhere")
        assert not mine.exists()
        assert not (tmp_path / "nowhere").exists()

    @pytest.mark.parametrize("fidelity", ["bfloat16", "int8"])
    def test_a_new_database_gets_the_fidelity_of_its_base(self, tmp_path: Path, mine: Path, fidelity: str) -> None:
        bp.open(tmp_path / "team", fidelity=fidelity).close()
        for place in (mine, ":memory:"):
            with bp.open(place, base=tmp_path / "team") as db:
                assert db.fidelity == fidelity
        found = read_manifest(mine)
        assert found is not None
        assert found.fidelity == fidelity

    def test_another_fidelity_than_that_of_the_base_is_refused(self, tmp_path: Path, base: Path, mine: Path) -> None:
        for place in (mine, ":memory:"):
            with pytest.raises(FormatError, match="team keeps keys and values exact, not int8"):
                bp.open(place, base=base, fidelity="int8")
        assert not mine.exists()
        bp.open(mine, fidelity="int8").close()
        with pytest.raises(FormatError, match=r"team keeps keys and values exact, and .*mine int8"):
            bp.open(mine, base=base)
        with bp.open(mine) as db:  # it was let go
            put(db, prompt(1), [Part.SCORES])

    def test_a_database_is_not_its_own_base(self, base: Path) -> None:
        link = base.parent / "link"
        link.symlink_to(base)
        for place in (base, link):
            with pytest.raises(PromptError, match="cannot be its own base"):
                bp.open(place, base=base)

    def test_a_base_of_a_newer_version_is_refused(self, base: Path, mine: Path) -> None:
        manifest = (base / "manifest.json").read_text().replace('"format": 1', '"format": 2')
        (base / "manifest.json").write_text(manifest)
        with pytest.raises(FormatTooNew):
            bp.open(mine, base=base)
        assert not mine.exists()

    def test_with_mode_r_both_are_only_read(self, base: Path, mine: Path) -> None:
        with pytest.raises(UnsafeLocation, match="there is no database"):
            bp.open(mine, mode="r", base=base)
        with bp.open(mine) as db:
            put_prompts(db, [1])
        before = snapshot(base) | snapshot(mine)
        with bp.open(mine, mode="r", base=base, memory_nbytes=0) as db:
            assert_whole(db, prompt(0) + prompt(1))
            put(db, prompt(2))
            assert db.counters.num_stored == 0
            assert db.counters.num_base_hits > 0
        assert snapshot(base) | snapshot(mine) == before

    @pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
    def test_one_who_may_only_read_the_base_works_over_it(self) -> None:
        with public_directory() as place:
            with bp.open(place / "team") as db:
                put_prompts(db, [0])
            for path in [place / "team", *(place / "team").rglob("*")]:
                path.chmod(0o755 if path.is_dir() else 0o644)
            (place / "team" / "store" / "lock.mdb").chmod(0o666)
            (place / "home").mkdir()
            os.chown(place / "home", 65534, 65534)
            before = snapshot(place / "team")
            script = IMPORTS + IN_OTHER_SHOES + WORK
            words, log = run(script, place)
            assert words == ["9", "3", "0", "0", "True"], log
            assert log.count("LOG") == log.count("LOG more people may use") == 1
            assert snapshot(place / "team") == before


IMPORTS = """
import tempfile
from tests.support.limits import assert_whole, put
with tempfile.TemporaryDirectory() as elsewhere, bp.open(elsewhere) as db:  # imports all that is needed
    put(db, prompt(0)[:1])
"""
WORK = """
with bp.open(Path(place) / 'home' / 'mine', base=Path(place) / 'team', memory_nbytes=0) as db:
    assert_whole(db, prompt(0))
    put(db, prompt(21, author='me')[2:])
    found = db.counters
    print(found.num_base_hits, found.num_stored, found.num_read_failures, found.num_write_failures, not db.readonly)
"""


@pytest.fixture
def db(base: Path, mine: Path, open_db: Callable[..., Database]) -> Database:
    """A private database with a prompt of its own and one that goes on from the base, over the team's."""
    opened = open_db(mine, base=base, memory_nbytes=0)
    put(opened, segments("Mine", " alone."))
    put(opened, (*prompt(0), *goes_on())[3:])
    return opened


def goes_on() -> tuple[bp.text.Segment, ...]:
    return segments(*(segment.string for segment in prompt(0)), " And mine.")[3:]


def own_keys() -> set[Key]:
    return set(keys_of([*segments("Mine", " alone."), *goes_on()]))


class TestMaintenance:
    def test_listing_and_sums_are_about_the_private_one(self, db: Database, mine: Path) -> None:
        db.flush()
        assert stored(db) == own_keys()
        assert gather(mine).num_representations == 3
        assert sorted(row["text"] for row in run_json("ls", "--db", mine)) == [" And mine.", " alone.", "Mine"]

    def test_eviction_removes_what_is_private_and_the_base_is_found_again(self, db: Database, base: Path) -> None:
        before = snapshot(base)
        assert {
            (candidate.address, candidate.part) for candidate in eviction_order(db, to_nbytes=0, selection=EVERYTHING)
        } == {(key.address, key.part) for key in own_keys()}
        assert evict(db, to_nbytes=0, selection=EVERYTHING).num_parts == 9
        assert (stored(db), db.counters.num_evicted) == (set(), 9)
        assert_whole(db, prompt(0))
        assert snapshot(base) == before

    def test_a_copy_of_what_the_base_has_is_evicted_and_that_of_the_base_is_found(
        self, base: Path, mine: Path, open_db: Callable[..., Database]
    ) -> None:
        with bp.open(mine) as alone:
            put(alone, prompt(0))
        db = open_db(mine, base=base, memory_nbytes=0)
        assert_whole(db, prompt(0))
        assert (db.counters.num_disk_hits, db.counters.num_base_hits) == (9, 0)
        assert evict(db, to_nbytes=0, selection=EVERYTHING).num_parts == 9
        assert_whole(db, prompt(0))
        assert (db.counters.num_disk_hits, db.counters.num_base_hits) == (9, 9)

    def test_the_limit_is_about_the_private_one(self, base: Path, mine: Path) -> None:
        with bp.open(base) as team:
            for number in range(4):
                put(team, of_size(4500, number=number))
        before = snapshot(base)
        make_limited(mine)
        with bp.open(mine, base=base, memory_nbytes=0) as db:
            for number in range(30):
                put(db, prompt(number, author="me"))
                assert live(db) <= HIGH_NBYTES
            assert db.counters.num_evicted > 0
            assert [key for key in dangling(db) if not _follows_base(key)] == []
            for number in range(4):
                assert_whole(db, of_size(4500, number=number))
        assert snapshot(base) == before

    def test_purging_leaves_nothing_of_it_in_the_private_files_and_the_base_as_it_is(
        self, db: Database, base: Path, mine: Path
    ) -> None:
        before = snapshot(base)
        assert purge(db, Selection(text_contains="alone")).num_representations == 1
        db.close()
        assert not any(b" alone." in path.read_bytes() for path in mine.rglob("*") if path.is_file())
        assert any(b" And mine." in path.read_bytes() for path in mine.rglob("*") if path.is_file())
        assert snapshot(base) == before

    def test_compaction_makes_the_private_file_smaller(self, base: Path, mine: Path) -> None:
        with bp.open(base) as team:
            put(team, of_size(4500))
        inodes = (base / "store" / "data.mdb").stat().st_ino
        with bp.open(mine, base=base, memory_nbytes=0) as db:
            put(db, of_size(4500, number=1))
            evict(db, to_nbytes=0, selection=EVERYTHING)
            before, after = compact(db)
            assert (before > 1_000_000, after < 100_000) == (True, True)
            assert (mine / "store" / "data.mdb").stat().st_size == after
            assert_whole(db, of_size(4500))
        assert (base / "store" / "data.mdb").stat().st_ino == inodes

    def test_verify_finds_what_is_damaged_here_although_the_base_has_it(self, base: Path, mine: Path) -> None:
        with bp.open(mine) as alone:
            put(alone, prompt(0))
        bad = keys_of(prompt(0))[0]
        flip_a_bit(mine, bad)
        with bp.open(mine, base=base) as db:
            found = verify(db)
            assert [(problem.address, problem.part) for problem in found.problems] == [bad]
            assert found.num_parts == 9
            reindex(db)
            assert verify(db).is_clean
            assert_whole(db, prompt(0))

    def test_reindexing_lists_what_is_private_alone(self, db: Database, base: Path) -> None:
        assert db.catalog is not None
        db.catalog.forget(keys_of(goes_on()))
        gone = keys_of(segments("Mine"), [Part.SCORES])
        db.store.delete(gone)
        done = reindex(db)
        assert (done.num_added, done.num_forgotten) == (3, 1)
        assert set(db.catalog.keys()) == stored(db) == own_keys() - set(gone)
        assert verify(db).is_clean

    def test_a_mark_of_what_only_the_base_has_lists_nothing(self, db: Database, mine: Path) -> None:
        content = b"".join(key.address + key.part.value for key in keys_of(prompt(0)))
        (mine / "pending" / "1-killed-0").write_bytes(content)
        db.evictor.catch_up()
        assert db.catalog is not None
        assert set(db.catalog.keys()) == own_keys()
        assert list((mine / "pending").iterdir()) == []

    def test_in_memory_over_a_base_there_is_nothing_to_maintain(self, base: Path) -> None:
        before = snapshot(base)
        with bp.open(":memory:", base=base) as db:
            for attempt in (
                lambda: evict(db, to_nbytes=0, selection=EVERYTHING),
                lambda: purge(db, Selection(text_contains="a")),
                lambda: reindex(db),
            ):
                with pytest.raises(CatalogError, match="in memory has no catalog"):
                    attempt()
            compact(db)
            assert_whole(db, prompt(0))
        assert snapshot(base) == before

    def test_a_base_whose_catalog_is_damaged_is_read_without_it(
        self, base: Path, mine: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (base / "catalog.sqlite").write_bytes(b"garbage" * 999)
        with caplog.at_level(logging.WARNING), bp.open(mine, base=base, memory_nbytes=0) as db:
            assert db.model_metadata.recall(lambda catalog: catalog.source(b"key")) is None
            assert_whole(db, prompt(0))
        assert caplog.text == ""


def _follows_base(key: Key) -> bool:
    """Whether the keys and values are of a segment whose parent lies in the base, which has the first prompt."""
    return key.address in {address_of(prompt(number, author="me")[-1]) for number in range(30)} | {
        address_of(prompt(number)[1]) for number in range(30)
    }
