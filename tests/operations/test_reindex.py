"""Reindexing, on databases that real runs have made and tests have damaged."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

import backprompt_db as bp
from backprompt_db.catalog.catalog import Catalog
from backprompt_db.codec.blob import encode
from backprompt_db.database import reconcile
from backprompt_db.database.config import Config, write_config
from backprompt_db.database.opening import open_catalog, open_existing
from backprompt_db.database.reconcile import Reindexing
from backprompt_db.database.writer import NewPart
from backprompt_db.errors import CatalogError, CatalogTooNew, StoreLocked, StoreReadOnly
from backprompt_db.operations.doctor_checks import share
from backprompt_db.operations.inspection import Kind, Problem
from backprompt_db.operations.reindex import reindex
from backprompt_db.prompt.ids import TokenizerId, WeightsId
from backprompt_db.prompt.representation import OWN_PARTS, Array, Origin, Part
from backprompt_db.store.contract import Key, Store
from backprompt_db.store.files import Sharing
from backprompt_db.store.records import record_key
from tests.support.database_files import copies_after
from tests.support.operations import (
    FOREIGN,
    back_door,
    catalog_of,
    flip_a_bit,
    put_blob,
    read_blob,
    reindexed,
    remove_blob,
    remove_row,
    run_prompts,
    stored_keys,
    totals,
    verified,
)

original, directory = copies_after(run_prompts)


ONES = {
    "input_ids": Array.from_numpy(np.ones(1, dtype=np.int32)),
    "token_logprobs": Array.from_numpy(np.ones(1, dtype=np.float32)),
}


def origin_of(text: str) -> Origin:
    return Origin(text, (), None, WeightsId(b"w" * 32), TokenizerId(b"t" * 32), 1, 0.5)


def scores_of(text: str) -> NewPart:
    origin = origin_of(text)
    return NewPart(Key(origin.address, Part.SCORES), ONES, origin)


def put_long_part(directory: Path, text: str) -> Key:
    """Store logits of more than one chunk, which the catalog does not get to know."""
    origin = origin_of(text)
    key = Key(origin.address, Part.LOGITS)
    logits = {"logits": Array.from_numpy(np.zeros(300_000, dtype=np.float32))}
    put_blob(directory, key, encode(Part.LOGITS, logits, origin))
    return key


def flip_a_bit_of_chunk(directory: Path, key: Key, number: int) -> None:
    with back_door(directory) as transaction:
        record = record_key(key, number)
        value = bytearray(transaction.get(record))
        value[len(value) // 2] ^= 1
        transaction.put(record, bytes(value))


def damaged(directory: Path) -> list[Problem]:
    return [problem for problem in verified(directory).problems if problem.kind is Kind.DAMAGED]


def interrupt(name: str) -> None:
    raise KeyboardInterrupt(name)


class Vanishing:
    """A store from which an evictor takes every third part when it was just read."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.num_read = self.num_gone = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def scan(self, key: Key, take: Callable[[memoryview], None]) -> bool:
        try:
            return self.store.scan(key, take)
        finally:
            self.num_read += 1
            if self.num_read % 3 == 0:
                self.num_gone += self.store.delete([key])


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
        for part in OWN_PARTS:
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

    def test_more_parts_than_fit_into_one_transaction(self, db: bp.Database, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reconcile, "_PARTS_PER_TRANSACTION", 250)
        db.put([scores_of(f"text {number}") for number in range(700)])
        db.flush()
        assert db.directory is not None
        catalog_of(db.directory).unlink()
        assert reindex(db) == Reindexing(700, 0, 0, None)
        assert totals(db.directory).num_representations == 700

    def test_texts_that_are_too_long_to_be_in_memory_together(
        self, db: bp.Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reconcile, "_CHARACTERS_PER_TRANSACTION", 100)
        db.put([scores_of(f"{number} " * length) for number, length in enumerate((1, 100, 1, 1, 20, 20, 1))])
        db.flush()
        assert db.directory is not None
        catalog_of(db.directory).unlink()
        assert reindex(db) == Reindexing(7, 0, 0, None)
        assert totals(db.directory).num_representations == 7

    def test_a_damaged_header_is_noticed_and_damage_behind_it_is_left_to_verify(self, directory: Path) -> None:
        keys = [put_long_part(directory, text) for text in ("damaged in its header", "damaged behind it")]
        for key, chunk in zip(keys, (1, 2), strict=True):
            flip_a_bit_of_chunk(directory, key, chunk)
        assert reindexed(directory) == Reindexing(1, 0, 1, None)
        assert {(problem.address, problem.part) for problem in damaged(directory)} == {keys[1]}

    def test_a_text_that_is_longer_than_a_chunk_is_read(self, directory: Path) -> None:
        key = put_long_part(directory, "long " * 300_000)
        assert reindexed(directory) == Reindexing(1, 0, 0, None)
        with open_catalog(directory) as catalog:
            assert [row.text for row in catalog.find(key.address.hex())] == ["long " * 300_000]

    def test_what_is_evicted_meanwhile_is_not_entered(self, directory: Path) -> None:
        catalog_of(directory).unlink()
        with open_existing(directory) as db:
            vanishing = Vanishing(db.store)
            db.store = vanishing
            reindex(db)
            assert vanishing.num_gone == 4
        with open_catalog(directory) as catalog:
            assert set(catalog.keys()) == set(stored_keys(directory))

    @pytest.mark.parametrize("umask", [0o000, 0o077])
    def test_what_it_makes_has_the_permissions_that_the_database_is_shared_with(
        self, directory: Path, umask: int
    ) -> None:
        for path in {*directory.glob("catalog.sqlite*"), *directory.glob("*.lock")}:
            path.unlink()
        share(directory, Sharing.GROUP, group=None)
        write_config(directory, Config(sharing=Sharing.GROUP))
        before = os.umask(umask)
        try:
            with open_existing(directory) as db:
                reindex(db)
        finally:
            os.umask(before)
        names = ("catalog.sqlite", "catalog.sqlite-journal", "catalog.sqlite.lock", "reindex.lock")
        assert {name: (directory / name).stat().st_mode & 0o777 for name in names} == dict.fromkeys(names, 0o660)

    def test_one_that_was_interrupted_goes_on_where_it_was(
        self, db: bp.Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        db.put([scores_of(f"text {number}") for number in range(600)])
        db.flush()
        assert db.directory is not None
        catalog_of(db.directory).unlink()
        monkeypatch.setattr(reconcile, "reach", interrupt)
        monkeypatch.setattr(reconcile, "_PARTS_PER_TRANSACTION", 250)
        with pytest.raises(KeyboardInterrupt):
            reindex(db)
        monkeypatch.undo()
        assert totals(db.directory).num_representations == 250
        assert reindex(db) == Reindexing(350, 0, 0, None)
        assert totals(db.directory).num_representations == totals(db.directory).num_segments == 600

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
        monkeypatch.setattr("backprompt_db.system.locks.PATIENCE_SECONDS", 0.01)
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
