"""Statistics, verifying and reindexing, on databases that real runs have made and tests have damaged."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import lmdb
import numpy as np
import pytest

import backprompt_db as bp
from backprompt_db.catalog import Catalog, Totals
from backprompt_db.catalog import connection as catalog_connection
from backprompt_db.errors import CatalogError, CatalogTooNew, StoreLocked, StoreReadOnly, UnsafeLocation
from backprompt_db.keys import Address, TokenizerId, WeightsId
from backprompt_db.maintenance.description import describe
from backprompt_db.maintenance.existing import manifest_of, open_catalog, open_existing, open_store
from backprompt_db.maintenance.inspection import Inspection, Kind
from backprompt_db.maintenance.reindex import Reindexing, reindex
from backprompt_db.maintenance.stats import Stats, gather
from backprompt_db.maintenance.sums import sums, sums_by_model
from backprompt_db.maintenance.verify import Verification, verify
from backprompt_db.representation import Array, Origin, Part
from backprompt_db.store.contract import Blob, Key
from backprompt_db.store.environment import LMDB_GENERATION
from backprompt_db.store.lmdb import LmdbStore
from backprompt_db.writer import NewPart

FOREIGN = Address(b"\x5a" * 32)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that needs it puts the database that each test gets a copy of."""
    return tmp_path_factory.mktemp("original") / "db"


@pytest.fixture
def directory(original: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The directory of a closed database that a test may damage."""
    if not original.exists():
        lm = request.getfixturevalue("lm")
        run_prompts(lm)
        lm.db.close()
        lm.db.directory.rename(original)
    return Path(shutil.copytree(original, tmp_path / "copy"))


def run_prompts(lm: bp.LanguageModel) -> None:
    """Four segments under one model, with hits."""
    context = lm.text("Pick the endpoint for the request.\n")
    for request in ("Request: show me everyone", "Request: create an order", "'; DROP TABLE segments; --"):
        lm(context + request)
    lm(context + "Request: create an order")


def catalog_of(directory: Path) -> Path:
    return directory / "catalog.sqlite"


def totals(directory: Path) -> Totals:
    with open_catalog(directory) as catalog:
        return catalog.totals()


def stored_keys(directory: Path) -> list[Key]:
    with contextlib.closing(LmdbStore(directory / "store")) as store:
        return [key for key, _ in store.keys()]


def verified(directory: Path) -> Verification:
    with open_existing(directory) as db:
        return verify(db)


def reindexed(directory: Path) -> Reindexing:
    with open_existing(directory) as db:
        return reindex(db)


def kinds(found: Verification) -> list[Kind]:
    return [problem.kind for problem in found.problems]


@contextlib.contextmanager
def back_door(directory: Path) -> Iterator[Any]:
    """A write transaction on the store's records, behind the back of everything."""
    path = str(directory / "store")
    with (
        lmdb.open(path, map_size=1 << 30, lib_version=LMDB_GENERATION) as env,
        env.begin(write=True) as transaction,
    ):
        yield transaction


def flip_a_bit(directory: Path, key: Key) -> None:
    with back_door(directory) as transaction:
        record = key.address + key.part.value + bytes(4)
        value = bytearray(transaction.get(record))
        value[len(value) // 2] ^= 1
        transaction.put(record, bytes(value))


def remove_blob(directory: Path, key: Key) -> None:
    with contextlib.closing(LmdbStore(directory / "store")) as store:
        assert store.delete([key]) == 1


def remove_row(directory: Path, key: Key) -> None:
    with Catalog.open(catalog_of(directory)) as catalog:
        catalog.forget([key])


def put_blob(directory: Path, key: Key, blob: bytes) -> None:
    with contextlib.closing(LmdbStore(directory / "store")) as store:
        assert store.put([Blob(key, blob)]) == [key]


def read_blob(directory: Path, key: Key) -> bytes:
    with contextlib.closing(LmdbStore(directory / "store")) as store:
        blob = store.get(key)
    assert blob is not None
    return bytes(blob)


class TestStats:
    def test_the_sums_are_those_of_the_catalog(self, directory: Path) -> None:
        expected = totals(directory)
        found = sums(catalog_of(directory))
        assert {name: getattr(found, name) for name in Totals.__slots__} == {
            name: getattr(expected, name) for name in Totals.__slots__
        }
        assert expected.num_representations == 4
        assert expected.num_hits > 0
        [by_model] = sums_by_model(catalog_of(directory)).values()
        assert by_model.num_representations == expected.num_representations
        assert by_model.nbytes == expected.nbytes

    def test_everything_is_known_with_a_catalog(self, directory: Path) -> None:
        found = gather(directory)
        assert found.catalog_problem is None
        assert (found.num_segments, found.num_models, found.format, found.fidelity) == (4, 1, 1, "exact")
        assert found.file_nbytes > sum(found.nbytes.values()) > 0
        assert found.created_at == manifest_of(directory).created_at

    @pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"garbage" * 999), Path.touch])
    def test_without_a_usable_catalog_the_store_is_counted(
        self, directory: Path, damage: Callable[[Path], object]
    ) -> None:
        with_catalog = gather(directory)
        if damage is Path.touch:
            catalog_of(directory).unlink()
        damage(catalog_of(directory))
        found = gather(directory)
        assert found.catalog_problem is not None
        assert found.num_representations == with_catalog.num_representations
        assert found.nbytes == with_catalog.nbytes
        assert found.num_tokens is found.num_hits is found.saved_seconds is found.num_models is None

    def test_a_database_that_was_never_used_is_empty(self, db: bp.Database) -> None:
        assert db.directory is not None
        db.close()
        found = gather(db.directory)
        assert (found.num_representations, sum(found.nbytes.values())) == (0, 0)

    def test_it_answers_while_the_database_is_open_for_writing(self, lm: bp.LanguageModel) -> None:
        lm("Request: create an order")
        lm.db.flush()
        assert lm.db.directory is not None
        assert gather(lm.db.directory).num_representations == 1

    @pytest.mark.parametrize("ask", [gather, open_existing, open_store, open_catalog])
    def test_nothing_is_made_where_there_is_no_database(
        self, tmp_path: Path, ask: Callable[[Path], Stats | bp.Database | LmdbStore | Catalog]
    ) -> None:
        with pytest.raises(UnsafeLocation, match="there is no database"):
            ask(tmp_path / "nothing")
        assert not (tmp_path / "nothing").exists()


class TestVerify:
    def test_an_undamaged_database_is_clean(self, directory: Path) -> None:
        found = verified(directory)
        assert found.is_clean
        assert found.num_parts == len(stored_keys(directory)) == 12
        assert found.nbytes == sum(gather(directory).nbytes.values())

    def test_a_flipped_bit_is_found_and_the_part_removed(self, directory: Path) -> None:
        key = stored_keys(directory)[4]
        flip_a_bit(directory, key)
        [problem] = verified(directory).problems
        assert (problem.address, problem.part, problem.kind) == (*key, Kind.DAMAGED)
        assert key not in stored_keys(directory)

    def test_after_reindexing_a_removed_part_is_no_problem_any_more(self, directory: Path) -> None:
        flip_a_bit(directory, stored_keys(directory)[0])
        assert kinds(verified(directory)) == [Kind.DAMAGED]
        assert kinds(verified(directory)) == [Kind.MISSING]
        assert reindexed(directory) == Reindexing(0, 1, 0, None)
        assert verified(directory).is_clean

    def test_a_blob_under_a_foreign_address_is_found_and_removed(self, directory: Path) -> None:
        key = stored_keys(directory)[0]
        put_blob(directory, Key(FOREIGN, key.part), read_blob(directory, key))
        [problem] = verified(directory).problems
        assert (problem.address, problem.kind) == (FOREIGN, Kind.MISPLACED)
        assert key.address.hex() in problem.detail
        assert verified(directory).is_clean

    def test_a_blob_under_another_part_is_misplaced(self, directory: Path) -> None:
        scores = next(key for key in stored_keys(directory) if key.part is Part.SCORES)
        blob = read_blob(directory, scores)
        remove_blob(directory, Key(scores.address, Part.KV))
        put_blob(directory, Key(scores.address, Part.KV), blob)
        assert kinds(verified(directory)) == [Kind.MISPLACED]

    def test_bytes_that_are_no_part_are_malformed_and_removed(self, directory: Path) -> None:
        put_blob(directory, Key(FOREIGN, Part.KV), b"not a safetensors blob")
        assert kinds(verified(directory)) == [Kind.MALFORMED]
        assert Key(FOREIGN, Part.KV) not in stored_keys(directory)

    def test_a_part_of_a_newer_version_is_reported_and_kept(self, directory: Path) -> None:
        key = stored_keys(directory)[0]
        blob = read_blob(directory, key).replace(b'\\"format\\":1', b'\\"format\\":9')
        remove_blob(directory, key)
        put_blob(directory, key, blob)
        assert kinds(verified(directory)) == [Kind.TOO_NEW]
        assert key in stored_keys(directory)

    def test_a_row_without_a_blob_is_found(self, directory: Path) -> None:
        key = stored_keys(directory)[5]
        remove_blob(directory, key)
        [problem] = verified(directory).problems
        assert (problem.address, problem.part, problem.kind) == (*key, Kind.MISSING)

    def test_a_blob_without_a_row_is_found(self, directory: Path) -> None:
        key = stored_keys(directory)[7]
        remove_row(directory, key)
        [problem] = verified(directory).problems
        assert (problem.address, problem.part, problem.kind) == (*key, Kind.UNRECORDED)

    def test_the_store_is_read_even_if_the_catalog_is_garbage(self, directory: Path) -> None:
        flip_a_bit(directory, stored_keys(directory)[0])
        catalog_of(directory).write_bytes(b"garbage" * 999)
        found = verified(directory)
        assert kinds(found) == [Kind.DAMAGED]
        assert found.catalog_problem is not None
        assert found.num_parts == 12

    def test_a_missing_catalog_is_a_problem_and_is_not_made(self, directory: Path) -> None:
        catalog_of(directory).unlink()
        found = verified(directory)
        assert "missing" in (found.catalog_problem or "")
        assert not catalog_of(directory).exists()

    def test_progress_sees_every_part(self, directory: Path) -> None:
        seen = list[Inspection]()

        def watch(inspections: Iterator[Inspection]) -> Iterator[Inspection]:
            for inspection in inspections:
                seen.append(inspection)
                yield inspection

        with open_existing(directory) as db:
            verify(db, progress=watch)
        assert [inspection.key for inspection in seen] == stored_keys(directory)

    def test_a_database_in_memory_has_no_catalog_to_disagree_with(
        self, make_lm: Callable[..., bp.LanguageModel]
    ) -> None:
        with bp.open(":memory:") as db:
            make_lm(db=db)("Request: create an order")
            db.flush()
            assert verify(db) == Verification(3, db.counters.num_stored_nbytes, (), None)


class TestReindex:
    def test_a_clean_database_stays_as_it_is(self, directory: Path) -> None:
        before = totals(directory)
        assert reindexed(directory) == Reindexing(0, 0, 0, None)
        assert totals(directory) == before

    def test_from_a_deleted_catalog_the_totals_are_as_before(self, directory: Path) -> None:
        before = totals(directory)
        catalog_of(directory).unlink()
        assert reindexed(directory) == Reindexing(12, 0, 0, None)
        after = totals(directory)
        for name in ("num_representations", "num_segments", "num_models", "num_tokens", "nbytes"):
            assert getattr(after, name) == getattr(before, name)
        assert verified(directory).is_clean

    def test_texts_and_parents_come_back_from_the_store(self, directory: Path) -> None:
        def listing() -> list[tuple[object, ...]]:
            with open_catalog(directory) as catalog:
                rows = sorted(catalog.rows(), key=lambda row: row.address)
                return [(row.address, row.text, row.num_tokens, catalog.parents(row.segment_id)) for row in rows]

        before = listing()
        catalog_of(directory).unlink()
        reindexed(directory)
        assert listing() == before

    @pytest.mark.parametrize("content", [b"garbage" * 999, b"SQLite format 3\0" + b"\xff" * 5000])
    def test_garbage_is_moved_aside_and_the_catalog_rebuilt(self, directory: Path, content: bytes) -> None:
        before = totals(directory)
        catalog_of(directory).write_bytes(content)
        done = reindexed(directory)
        assert done.moved_aside is not None
        assert done.moved_aside.name.startswith("catalog.sqlite.damaged-")
        assert done.moved_aside.read_bytes() == content
        assert (done.num_added, totals(directory).nbytes) == (12, before.nbytes)

    def test_someone_elses_sqlite_file_is_moved_aside(self, directory: Path) -> None:
        catalog_of(directory).unlink()
        with contextlib.closing(sqlite3.connect(catalog_of(directory))) as connection:
            connection.execute("CREATE TABLE recipes (id INTEGER)")
        done = reindexed(directory)
        assert done.moved_aside is not None
        assert done.num_added == 12

    def test_damage_in_the_middle_of_the_file_is_noticed(self, directory: Path) -> None:
        content = bytearray(catalog_of(directory).read_bytes())
        content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
        catalog_of(directory).write_bytes(content)
        assert reindexed(directory).moved_aside is not None
        assert verified(directory).is_clean

    def test_a_catalog_that_cannot_be_opened_as_a_file_is_moved_aside(self, directory: Path) -> None:
        catalog_of(directory).unlink()
        catalog_of(directory).mkdir()
        done = reindexed(directory)
        assert done.moved_aside is not None
        assert done.moved_aside.is_dir()
        assert verified(directory).is_clean

    def test_hits_pins_and_labels_of_what_stays_are_kept(self, directory: Path) -> None:
        with Catalog.open(catalog_of(directory)) as catalog:
            pinned, gone = [row for row in catalog.rows() if row.text.startswith("Request")][:2]
            catalog.pin([pinned.address])
            catalog.label([pinned.address], "the label")
            catalog.touch({pinned.address: 41}, at=1.0)
        remove_row(directory, Key(pinned.address, Part.LOGITS))
        for part in Part:
            remove_blob(directory, Key(gone.address, part))
        assert reindexed(directory) == Reindexing(1, 3, 0, None)
        with open_catalog(directory) as catalog:
            [row] = catalog.find(pinned.address.hex())
            assert catalog.find(gone.address.hex()) == []
        assert (row.is_pinned, row.label, row.num_hits) == (True, "the label", pinned.num_hits + 41)
        assert row.nbytes == pinned.nbytes

    def test_what_cannot_be_used_is_counted_and_not_entered(self, directory: Path) -> None:
        keys = stored_keys(directory)
        put_blob(directory, Key(FOREIGN, keys[0].part), read_blob(directory, keys[0]))
        flip_a_bit(directory, keys[1])
        catalog_of(directory).unlink()
        done = reindexed(directory)
        assert (done.num_added, done.num_unreadable) == (11, 2)
        with open_catalog(directory) as catalog:
            assert FOREIGN not in {address for address, _ in catalog.keys()}

    def test_more_parts_than_fit_into_one_transaction(self, db: bp.Database) -> None:
        ones = {
            "input_ids": Array.from_numpy(np.ones(1, dtype=np.int32)),
            "token_logprobs": Array.from_numpy(np.ones(1, dtype=np.float32)),
        }
        origins = [
            Origin(f"text {number}", (), None, WeightsId(b"w" * 32), TokenizerId(b"t" * 32), 1, 0.5)
            for number in range(700)
        ]
        db.put([NewPart(Key(origin.address, Part.SCORES), ones, origin) for origin in origins])
        db.flush()
        assert db.directory is not None
        catalog_of(db.directory).unlink()
        assert reindex(db) == Reindexing(700, 0, 0, None)
        assert totals(db.directory).num_representations == 700

    def test_it_can_run_while_the_database_is_in_use(self, lm: bp.LanguageModel) -> None:
        lm("Request: show me everyone")
        lm.db.flush()
        assert lm.db.directory is not None
        catalog_of(lm.db.directory).unlink()
        assert reindex(lm.db).num_added == 3
        lm("Request: create an order")
        lm.db.flush()
        assert totals(lm.db.directory).num_representations == 2

    def test_a_newer_catalog_is_left_alone(self, directory: Path) -> None:
        with contextlib.closing(sqlite3.connect(catalog_of(directory))) as connection, connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
        before = catalog_of(directory).read_bytes()
        with pytest.raises(CatalogTooNew):
            reindexed(directory)
        assert catalog_of(directory).read_bytes() == before

    def test_a_locked_catalog_is_left_alone(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(catalog_connection, "BUSY_TIMEOUT_SECONDS", 0.01)
        remove_row(directory, stored_keys(directory)[0])
        with contextlib.closing(sqlite3.connect(catalog_of(directory), isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            with pytest.raises(CatalogError, match="locked"):
                reindexed(directory)
        assert not list(directory.glob("*.damaged-*"))

    def test_two_processes_do_not_reindex_at_once(self, directory: Path) -> None:
        with filelock.FileLock(directory / "reindex.lock"), pytest.raises(StoreLocked, match="reindexing"):
            reindexed(directory)

    def test_a_database_that_may_only_be_read_is_refused(self, directory: Path) -> None:
        with open_existing(directory) as db:
            db.readonly = True
            with pytest.raises(StoreReadOnly):
                reindex(db)

    def test_a_database_in_memory_is_refused(self) -> None:
        with bp.open(":memory:") as db, pytest.raises(CatalogError, match="in memory"):
            reindex(db)


class TestDescribe:
    def test_a_representation_is_described_from_catalog_and_store(self, directory: Path) -> None:
        with open_catalog(directory) as catalog, contextlib.closing(open_store(directory)) as store:
            context = next(row for row in catalog.rows() if row.text.startswith("Pick"))
            [found] = describe(store, catalog, context.address.hex())
            [child, *_] = describe(store, catalog, found.children[0].hex())
        assert len(found.children) == 3
        assert found.parents == ()
        assert child.parents == (context.segment_id,)
        assert [part.part for part in found.parts] == list(Part)
        assert [array.name for array in found.parts[2].arrays] == ["keys", "values"]
        assert len(found.tokens) == context.num_tokens
        assert np.isnan(found.tokens[0].logprob)
        assert found.tokens[1].logprob < 0
        assert "torch" in found.versions

    def test_missing_and_damaged_parts_are_told_apart_and_nothing_is_removed(self, directory: Path) -> None:
        address = stored_keys(directory)[0].address
        flip_a_bit(directory, Key(address, Part.KV))
        remove_blob(directory, Key(address, Part.SCORES))
        with open_catalog(directory) as catalog, contextlib.closing(open_store(directory)) as store:
            [found] = describe(store, catalog, address.hex())
        problems = {part.part: (part.problem or "").split(":")[0] for part in found.parts}
        assert problems == {Part.SCORES: "missing", Part.LOGITS: "", Part.KV: "damaged"}
        assert found.tokens == ()
        assert Key(address, Part.KV) in stored_keys(directory)
