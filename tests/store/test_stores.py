"""Each store keeps the contract; the one on disk also survives damage behind its back."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import lmdb
import pytest
from hypothesis.stateful import run_state_machine_as_test

from backprompt_db.prompt.representation import Part
from backprompt_db.store import records
from backprompt_db.store.contract import Blob, Store
from backprompt_db.store.lmdb import LmdbStore
from backprompt_db.store.lmdb_pages import check_length
from backprompt_db.store.memory import MemoryStore
from backprompt_db.store.records import CHUNK_NBYTES, record_key
from tests.support.store_contract import StoreContract, StoreMachine, data, in_threads, key, read

INLINE, CHUNKED = data(5000), data(3 * CHUNK_NBYTES + 5)
Edit: TypeAlias = "Callable[[lmdb.Transaction[bytes]], object]"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    LmdbStore.create(tmp_path / "store").close()
    return tmp_path / "store"


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestLmdbStore(StoreContract):
    @pytest.fixture
    def store(self, directory: Path) -> Iterator[Store]:
        store = LmdbStore(directory)
        yield store
        store.close()


class MemoryMachine(StoreMachine):
    def open_store(self) -> Store:
        return MemoryStore()


class LmdbMachine(StoreMachine):
    def open_store(self) -> Store:
        self.directory = Path(tempfile.mkdtemp())
        return LmdbStore.create(self.directory / "store")

    def reopen(self) -> None:
        self.store.close()
        check_length(self.directory / "store" / "data.mdb")
        self.store = LmdbStore(self.directory / "store")

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.directory)


@pytest.mark.parametrize("machine", [MemoryMachine, LmdbMachine])
def test_a_store_is_a_dict_in_which_the_first_writer_wins_or_what_has_grown(machine: type[StoreMachine]) -> None:
    run_state_machine_as_test(machine)


def damage(directory: Path, edit: Edit) -> None:
    """Change records behind the store's back."""
    with lmdb.Environment(str(directory), map_size=1 << 30, lib_version=0) as env, env.begin(write=True) as transaction:
        edit(transaction)


def flip(chunk: int, place: int) -> Edit:
    def edit(transaction: lmdb.Transaction[bytes]) -> None:
        value = bytearray(transaction.get(record_key(key(1), chunk)) or b"")
        value[place] ^= 1
        transaction.put(record_key(key(1), chunk), bytes(value))

    return edit


def cut(chunk: int, nbytes: int) -> Edit:
    def edit(transaction: lmdb.Transaction[bytes]) -> None:
        value = transaction.get(record_key(key(1), chunk)) or b""
        transaction.put(record_key(key(1), chunk), value[:nbytes])

    return edit


def copy(source: tuple[int, int], target: tuple[int, int]) -> Edit:
    def edit(transaction: lmdb.Transaction[bytes]) -> None:
        value = transaction.get(record_key(key(source[0]), source[1])) or b""
        transaction.put(record_key(key(target[0]), target[1]), value)

    return edit


DAMAGE: dict[str, tuple[bytes, Edit]] = {
    "a bit of the number of chunks": (INLINE, flip(0, 3)),
    "a bit of the length": (INLINE, flip(0, 11)),
    "a bit of the highest byte of the length": (CHUNKED, flip(0, 4)),
    "a bit of an inline blob": (INLINE, flip(0, 1000)),
    "a bit of the head's own digest": (INLINE, flip(0, -1)),
    "a bit of a chunk's digest": (CHUNKED, flip(0, 20)),
    "a bit of the first chunk": (CHUNKED, flip(1, 0)),
    "a bit of the last chunk": (CHUNKED, flip(4, -1)),
    "a head without a byte": (INLINE, cut(0, 0)),
    "a short head": (INLINE, cut(0, 20)),
    "a short chunk": (CHUNKED, cut(2, 100)),
    "an empty chunk": (CHUNKED, cut(4, 0)),
    "a chunk that is gone": (CHUNKED, lambda transaction: transaction.delete(record_key(key(1), 2))),
    "two chunks exchanged": (CHUNKED, copy((1, 1), (1, 2))),
    "another blob's inline head": (INLINE, copy((2, 0), (1, 0))),
    "another blob's head": (CHUNKED, copy((2, 0), (1, 0))),
    "another blob's chunk": (CHUNKED, copy((2, 1), (1, 1))),
}


@pytest.mark.parametrize("about", DAMAGE)
def test_a_damaged_blob_is_a_miss_that_can_be_written_again(directory: Path, about: str) -> None:
    blob, edit = DAMAGE[about]
    store = LmdbStore(directory)
    store.put([Blob(key(1), blob), Blob(key(2), bytes(reversed(blob)))])
    store.close()
    damage(directory, edit)
    store = LmdbStore(directory)
    assert read(store, key(1)) is None
    assert store.num_quarantined == 1
    assert not store.has(key(1))
    assert dict(store.keys()) == {key(2): len(blob)}
    assert store.put([Blob(key(1), blob)]) == [key(1)]
    assert read(store, key(1)) == blob
    assert read(store, key(2)) == bytes(reversed(blob))
    assert store.num_quarantined == 1
    store.close()


def test_a_blob_moved_to_another_key_is_a_miss(directory: Path) -> None:
    store = LmdbStore(directory)
    store.put([Blob(key(1), INLINE)])
    store.close()
    damage(directory, copy((1, 0), (7, 0)))
    store = LmdbStore(directory)
    assert read(store, key(7)) is None
    assert store.num_quarantined == 1
    assert read(store, key(1)) == INLINE
    store.close()


def test_chunks_without_a_head_are_no_blob_and_are_written_over(directory: Path) -> None:
    store = LmdbStore(directory)
    store.put([Blob(key(1), CHUNKED)])
    store.close()
    damage(directory, lambda transaction: transaction.delete(record_key(key(1))))
    store = LmdbStore(directory)
    assert read(store, key(1)) is None
    assert list(store.keys()) == []
    short = data(2 * CHUNK_NBYTES, seed=3)
    assert store.put([Blob(key(1), short)]) == [key(1)]
    assert read(store, key(1)) == short
    assert store.num_quarantined == 0
    assert store.delete([key(1)]) == 1
    store.close()
    left: list[bytes] = []
    damage(directory, lambda transaction: left.extend(transaction.cursor().iternext(values=False)))
    assert left == []


def test_records_of_others_are_left_alone(directory: Path) -> None:
    foreign = [b"x", record_key(key(1))[:-1], record_key(key(1)) + b"x", bytes(32) + b"?" + bytes(4)]
    damage(directory, lambda transaction: [transaction.put(each, b"theirs") for each in foreign])
    store = LmdbStore(directory)
    store.put([Blob(key(1), INLINE)])
    assert list(store.keys()) == [(key(1), len(INLINE))]
    assert store.delete([key(1)]) == 1
    store.close()
    left: list[bytes | None] = []
    damage(directory, lambda transaction: left.extend(transaction.get(each) for each in foreign))
    assert left == [b"theirs"] * 4


def test_a_part_that_this_version_does_not_know_is_passed_over(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = key(1, Part.CONTINUATIONS)
    store = LmdbStore(directory)
    store.put([Blob(tree, CHUNKED), Blob(key(1), INLINE), Blob(key(2), INLINE)])
    with monkeypatch.context() as earlier:
        earlier.delitem(records._PARTS, Part.CONTINUATIONS.value)
        assert [each for each, _ in store.keys()] == [key(1), key(2)]
        assert store.put([Blob(key(1), b"x"), Blob(key(3), b"x")]) == [key(3)]
        assert store.delete([key(1)]) == 1
        store.compact()
        assert read(store, key(2)) == INLINE
    assert read(store, tree) == CHUNKED
    assert [each for each, _ in store.keys()] == [tree, key(2), key(3)]
    assert store.num_quarantined == 0
    store.close()


def test_what_grows_is_written_over_where_it_is_damaged(directory: Path) -> None:
    tree = key(1, Part.CONTINUATIONS)
    store = LmdbStore(directory)
    store.put([Blob(tree, CHUNKED)])
    store.close()
    damage(directory, lambda transaction: transaction.put(record_key(tree), b"short"))
    store = LmdbStore(directory)
    assert store.put([Blob(tree, INLINE)]) == [tree]
    assert (read(store, tree), dict(store.keys()), store.num_quarantined) == (INLINE, {tree: len(INLINE)}, 0)
    store.close()


def test_a_reader_leaves_damage_where_it_is(directory: Path) -> None:
    store = LmdbStore(directory)
    store.put([Blob(key(1), INLINE)])
    store.close()
    damage(directory, flip(0, 100))
    reader = LmdbStore(directory, readonly=True)
    assert read(reader, key(1)) is None
    assert reader.num_quarantined == 1
    assert reader.has(key(1))
    reader.close()


def test_many_readers_of_one_damaged_blob_remove_it_once(directory: Path) -> None:
    store = LmdbStore(directory)
    store.put([Blob(key(1), CHUNKED)])
    store.close()
    damage(directory, flip(3, 100))
    store = LmdbStore(directory)

    def work(number: int) -> None:
        assert read(store, key(1)) in (None, CHUNKED)
        store.put([Blob(key(1), CHUNKED)])

    in_threads(6, work)
    assert read(store, key(1)) == CHUNKED
    assert 1 <= store.num_quarantined <= 6
    store.close()
