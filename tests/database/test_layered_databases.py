"""A private database over a team's: what the team has is found, what is new is kept here, the team's stays as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import backprompt_db as bp
from backprompt_db.operations.verify import verify
from backprompt_db.prompt.representation import OWN_PARTS, Part
from backprompt_db.store.contract import Blob, Key, Store
from backprompt_db.store.layered import LayeredStore
from backprompt_db.store.lmdb import LmdbStore
from backprompt_db.store.memory import MemoryStore
from backprompt_db.store.records import CHUNK_NBYTES
from tests.conftest import tiny_gpt2
from tests.support.database_files import snapshot
from tests.support.faults import keys_of, prompt, put_prompts, run, segments
from tests.support.limits import assert_whole, put, stored
from tests.support.operations import back_door, flip_a_bit
from tests.support.store_contract import StoreContract, StoreMachine, data, key, read

MakeLM = Callable[..., bp.LanguageModel]


class TestLayeredStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        LmdbStore.create(tmp_path / "base").close()
        base = LmdbStore(tmp_path / "base", readonly=True)
        with contextlib.closing(LayeredStore(LmdbStore.create(tmp_path / "own"), base)) as store:
            yield store


class LayeredMachine(StoreMachine):
    def open_store(self) -> Store:
        return LayeredStore(MemoryStore(), MemoryStore())


TestLayeredMachine = LayeredMachine.TestCase


class TestTwoStores:
    @pytest.fixture
    def stores(self) -> tuple[LayeredStore, MemoryStore, MemoryStore]:
        own, base = MemoryStore(), MemoryStore()
        own.put([Blob(key(1), b"own"), Blob(key(2), b"own")])
        base.put([Blob(key(2), b"base"), Blob(key(3), b"base")])
        return LayeredStore(own, base), own, base

    def test_the_one_in_front_is_asked_first(self, stores: tuple[LayeredStore, MemoryStore, MemoryStore]) -> None:
        layered, _, _ = stores
        assert [read(layered, key(number)) for number in range(5)] == [None, b"own", b"own", b"base", None]
        assert [layered.has(key(number)) for number in range(5)] == [False, True, True, True, False]
        assert layered.num_base_hits == 1
        assert [each for each, _ in layered.keys()] == [key(1), key(2)]

    def test_the_one_below_is_never_written_to(self, stores: tuple[LayeredStore, MemoryStore, MemoryStore]) -> None:
        layered, own, base = stores
        assert layered.put([Blob(key(3), b"new"), Blob(key(4), b"new")]) == [key(3), key(4)]
        assert layered.delete([key(2), key(3)]) == 2
        assert {each for each, _ in own.keys()} == {key(1), key(4)}
        assert [read(base, key(number)) for number in (2, 3)] == [b"base", b"base"]

    def test_what_is_deleted_and_only_below_is_not_found_any_more(
        self, stores: tuple[LayeredStore, MemoryStore, MemoryStore]
    ) -> None:
        layered, _, base = stores
        assert layered.delete([key(3)]) == 0
        assert (read(layered, key(3)), layered.has(key(3)), base.has(key(3))) == (None, False, True)
        assert layered.put([Blob(key(3), b"new")]) == [key(3)]
        assert read(layered, key(3)) == b"new"

    def test_what_has_grown_most_is_read(self, stores: tuple[LayeredStore, MemoryStore, MemoryStore]) -> None:
        layered, own, base = stores
        tree = key(9, Part.CONTINUATIONS)
        base.put([Blob(tree, data(50))])
        assert layered.put([Blob(tree, data(50, seed=1))]) == []
        assert layered.put([Blob(tree, data(70))]) == [tree]
        assert (read(layered, tree), layered.size(tree)) == (data(70), 70)
        base.put([Blob(tree, data(90))])
        taken: list[bytes] = []
        assert layered.scan(tree, lambda piece: taken.append(bytes(piece)))
        assert (b"".join(taken), read(layered, tree), layered.size(tree)) == (data(90), data(90), 90)
        assert layered.put([Blob(tree, data(80))]) == []
        assert (own.size(tree), base.size(tree)) == (70, 90)

    def test_what_a_blob_needs_may_lie_below(self, stores: tuple[LayeredStore, MemoryStore, MemoryStore]) -> None:
        layered, own, _ = stores
        new = layered.put([Blob(key(7), b"new", needs=(key(1), key(3))), Blob(key(8), b"new", needs=(key(9),))])
        assert new == [key(7)]
        assert own.has(key(7))

    def test_pieces_of_a_damaged_blob_are_not_followed_by_those_of_the_base(self, tmp_path: Path) -> None:
        whole = data(3 * CHUNK_NBYTES)
        for name in ("own", "base"):
            (tmp_path / name).mkdir()
            with contextlib.closing(LmdbStore.create(tmp_path / name / "store")) as store:
                store.put([Blob(key(1), whole)])
        with back_door(tmp_path / "own") as transaction:
            record = key(1).address + key(1).part.value + (3).to_bytes(4, "big")
            transaction.put(record, bytes(len(transaction.get(record))))
        own, base = LmdbStore(tmp_path / "own" / "store"), LmdbStore(tmp_path / "base" / "store", readonly=True)
        with contextlib.closing(LayeredStore(own, base)) as store:
            taken: list[bytes] = []
            assert not store.scan(key(1), lambda piece: taken.append(bytes(piece)))
            assert len(b"".join(taken)) < len(whole)
            assert store.num_quarantined == 1
            assert read(store, key(1)) == whole, "the damaged one is gone"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A team's database with two prompts."""
    with bp.open(tmp_path / "team") as db:
        put_prompts(db, [0, 1])
    return tmp_path / "team"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return tmp_path / "mine"


NEW = prompt(21, author="me")
"""A prompt of which the base has all but the end."""


class TestParts:
    def test_of_the_base_are_found_and_counted_as_such(self, base: Path, mine: Path) -> None:
        with bp.open(mine, base=base, memory_nbytes=0) as db:
            assert_whole(db, prompt(0))
            assert (db.counters.num_base_hits, db.counters.num_disk_hits, db.counters.num_misses) == (9, 0, 0)
            assert stored(db) == set()
            db.flush()
            assert db.catalog is not None
            assert db.catalog.counts()["base_hits"] == 9

    def test_that_are_new_are_kept_here_alone(self, base: Path, mine: Path) -> None:
        before = snapshot(base)
        with bp.open(mine, base=base, memory_nbytes=0) as db:
            put(db, NEW[2:])
            assert stored(db) == set(keys_of(NEW[2:]))
            assert_whole(db, prompt(0))
            assert (db.counters.num_stored, db.counters.num_orphaned) == (3, 0)
        with bp.open(mine, base=base, memory_nbytes=0) as db:
            assert_whole(db, NEW)
            assert (db.counters.num_base_hits, db.counters.num_disk_hits) == (6, 3)
            assert verify(db).is_clean
        assert snapshot(base) == before

    def test_that_follow_parts_of_the_base_are_kept_without_them(self, base: Path, mine: Path) -> None:
        chain = segments(*(segment.string for segment in prompt(0)), " And this is mine.")
        with bp.open(mine, base=base, memory_nbytes=0) as db:
            put(db, chain[-1:])
            assert db.counters.num_orphaned == 0
            assert stored(db) == set(keys_of(chain[-1:]))
            assert_whole(db, chain)
            assert (db.counters.num_base_hits, db.counters.num_disk_hits) == (9, 3)

    @pytest.mark.parametrize("part", OWN_PARTS)
    def test_that_are_damaged_in_the_base_are_computed_again_once_and_kept_here(
        self, base: Path, mine: Path, part: Part
    ) -> None:
        bad = Key(keys_of(prompt(0))[0].address, part)
        flip_a_bit(base, bad)
        before = snapshot(base)
        with bp.open(mine, base=base, memory_nbytes=0) as db:
            found = db.fetch({bad.address: OWN_PARTS})
            assert set(found) == set(keys_of(prompt(0)[:1])) - {bad}
            assert (db.counters.num_quarantined, db.counters.num_misses) == (1, 1)
            assert db.fetch({bad.address: [part]}) == {}
            assert db.counters.num_quarantined == 1, "it is not looked at again"
            put(db, prompt(0)[:1], [part])
            assert_whole(db, prompt(0)[:1])
        with bp.open(mine, base=base, memory_nbytes=0) as db:
            assert_whole(db, prompt(0))
            assert (db.counters.num_base_hits, db.counters.num_disk_hits) == (8, 1)
            assert db.counters.num_quarantined == 0
        assert snapshot(base) == before

    def test_that_are_malformed_in_the_base_are_computed_again_and_kept_here(self, base: Path, mine: Path) -> None:
        bad = keys_of(prompt(0)[:1], [Part.LOGITS])[0]
        with contextlib.closing(LmdbStore(base / "store")) as store:
            store.delete([bad])
            store.put([Blob(bad, b"no part at all")])
        before = snapshot(base)
        with bp.open(mine, base=base, memory_nbytes=0) as db:
            assert db.fetch({bad.address: [Part.LOGITS]}) == {}
            assert (db.counters.num_quarantined, db.counters.num_misses) == (1, 1)
            put(db, prompt(0)[:1], [Part.LOGITS])
            assert_whole(db, prompt(0))
            assert stored(db) == {bad}
        assert snapshot(base) == before

    def test_that_are_evicted_from_the_base_meanwhile_are_misses(self, base: Path, mine: Path) -> None:
        with bp.open(mine, base=base, memory_nbytes=0) as db:
            assert_whole(db, prompt(0))
            script = "db = bp.open(place)\nprint(db.evictor.evict(to_nbytes=0).num_parts)"
            assert run(script, base)[0] == ["18"]
            assert db.fetch({keys_of(prompt(0))[0].address: OWN_PARTS}) == {}
            assert (db.counters.num_misses, db.counters.num_read_failures) == (1, 0)
            put(db, prompt(0))
            assert_whole(db, prompt(0))
            assert len(stored(db)) == 9

    def test_of_a_base_that_the_same_process_writes_are_seen(self, base: Path, mine: Path) -> None:
        with bp.open(base) as team, bp.open(mine, base=base, memory_nbytes=0) as db:
            put(team, prompt(7))
            assert_whole(db, prompt(7))
            assert db.counters.num_base_hits == 9
            assert stored(db) == set()
        with bp.open(mine, base=base) as db, bp.open(base) as team:
            put(team, prompt(8))
            assert_whole(db, prompt(8))

    def test_may_lie_in_memory_over_a_base(self, base: Path) -> None:
        before = snapshot(base)
        with bp.open(":memory:", base=base, memory_nbytes=0) as db:
            assert_whole(db, prompt(0))
            put(db, NEW[2:])
            assert_whole(db, NEW)
            assert db.counters.num_base_hits == 9 + 6
        assert snapshot(base) == before


class TestModels:
    @pytest.fixture
    def directory(self, tmp_path: Path, tokenizer: Any) -> Path:
        tiny_gpt2().save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_are_known_by_the_base_and_need_not_be_loaded(self, tmp_path: Path, directory: Path, mine: Path) -> None:
        with bp.open(tmp_path / "team") as db:
            right = bp.LanguageModel.from_pretrained(str(directory), db=db)("The quick brown fox")
        for place in (mine, ":memory:"):
            with bp.open(place, base=tmp_path / "team") as db:
                lm = bp.LanguageModel.from_pretrained(str(directory), db=db)
                found = lm("The quick brown fox")
                assert (lm.is_loaded, found.num_computed_tokens) == (False, 0)
                assert torch.equal(found.logits, right.logits)
                assert db.counters.num_base_hits == 2

    def test_that_have_proven_themselves_in_the_base_need_not_do_so_here(
        self, tmp_path: Path, mine: Path, make_lm: MakeLM
    ) -> None:
        with bp.open(tmp_path / "team") as db:
            make_lm(db=db)("The quick brown fox")
        for turn in range(2):
            with bp.open(mine, base=tmp_path / "team") as db:
                lm = make_lm(tiny_gpt2(), db=db)
                assert lm(f"The quick brown fox jumps {turn}").num_computed_tokens > 0
                db.flush()
                assert db.catalog is not None
                assert [each.verdict for each in db.catalog.models()] == ["unchecked"]

    def test_go_on_from_what_the_base_has(self, tmp_path: Path, mine: Path, make_lm: MakeLM) -> None:
        with bp.open(tmp_path / "team") as db:
            make_lm(db=db)(bp.Text("The quick brown fox") + " jumps")
        before = snapshot(tmp_path / "team")
        with bp.open(mine, base=tmp_path / "team") as db:
            lm, oracle = make_lm(db=db), make_lm()
            result, right = (each(each.text("The quick brown fox") + " jumps" + " over") for each in (lm, oracle))
            assert result.num_cached_tokens > 0
            torch.testing.assert_close(result.logits, right.logits, atol=1e-4, rtol=0)
            db.flush()
            assert len(stored(db)) == 3
        assert snapshot(tmp_path / "team") == before
