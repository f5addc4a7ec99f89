"""The one suite that holds every store to its contract. A test class inherits it and gives a `store`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from backprompt_db.errors import StoreClosed, StoreFull
from backprompt_db.prompt.ids import Address
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Blob, Key, Store
from backprompt_db.store.records import CHUNK_NBYTES

SIZES = [
    0, 1, 15, 16, 17, 4096, CHUNK_NBYTES - 1, CHUNK_NBYTES, CHUNK_NBYTES + 1,
    2 * CHUNK_NBYTES - 1, 2 * CHUNK_NBYTES, 2 * CHUNK_NBYTES + 1, 7 * CHUNK_NBYTES + 5,
]  # fmt: skip


def key(number: int, part: Part = Part.KV) -> Key:
    return Key(Address(number.to_bytes(32, "big")), part)


def data(nbytes: int, seed: int = 0) -> bytes:
    """Bytes in which no two chunks are equal."""
    pattern = b"".join(number.to_bytes(4, "big") for number in range(seed * 1009, seed * 1009 + 1021))
    return (pattern * (nbytes // len(pattern) + 1))[:nbytes]


def pieces(whole: bytes, cuts: list[int]) -> list[bytes | memoryview]:
    """The same bytes, cut at some places."""
    ends = [*sorted(cuts), len(whole)]
    return [whole[begin:end] for begin, end in itertools.pairwise([0, *ends])]


def read(store: Store, key: Key) -> bytes | None:
    blob = store.get(key)
    return None if blob is None else bytes(blob)


def in_threads(num_threads: int, run: Callable[[int], Any]) -> list[Any]:
    """Run once per thread, all at the same time; return what each returned and raise what any raised."""
    results: list[Any] = [None] * num_threads
    errors: list[BaseException] = []
    start = threading.Barrier(num_threads)

    def run_one(number: int) -> None:
        start.wait()
        try:
            results[number] = run(number)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=run_one, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


class StoreContract:
    """What every store promises. Override the fixture `store` with an empty one."""

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError

    def test_a_miss_is_none(self, store: Store) -> None:
        assert read(store, key(1)) is None
        assert not store.has(key(1))
        assert store.size(key(1)) is None
        assert list(store.keys()) == []
        assert store.delete([key(1)]) == 0
        assert store.put([]) == []

    @pytest.mark.parametrize("nbytes", SIZES)
    def test_a_blob_of_any_size_comes_back_exactly(self, store: Store, nbytes: int) -> None:
        assert store.put([Blob(key(1), data(nbytes))]) == [key(1)]
        assert read(store, key(1)) == data(nbytes)
        assert store.size(key(1)) == nbytes
        assert list(store.keys()) == [(key(1), nbytes)]
        assert store.delete([key(1)]) == 1
        assert read(store, key(1)) is None

    def test_parts_and_addresses_are_kept_apart(self, store: Store) -> None:
        keys = [key(number, part) for number in (0, 1, 2**256 - 1) for part in Part]
        assert set(store.put([Blob(each, repr(each).encode()) for each in keys])) == set(keys)
        assert all(read(store, each) == repr(each).encode() for each in keys)
        assert store.delete(keys[:1]) == 1
        assert [store.has(each) for each in keys] == [False] + [True] * (len(keys) - 1)

    @pytest.mark.parametrize("nbytes", [5, 3 * CHUNK_NBYTES])
    def test_the_first_writer_wins(self, store: Store, nbytes: int) -> None:
        assert store.put([Blob(key(1), b"first")]) == [key(1)]
        assert store.put([Blob(key(1), data(nbytes)), Blob(key(2), b"new")]) == [key(2)]
        assert read(store, key(1)) == b"first"
        assert store.put([Blob(key(3), b"first"), Blob(key(3), b"second")]) == [key(3)]
        assert read(store, key(3)) == b"first"

    def test_what_grows_takes_the_place_of_a_smaller_one(self, store: Store) -> None:
        tree, other = key(1, Part.CONTINUATIONS), key(2)
        for size, is_new in [(9, True), (8, False), (9, False), (3 * CHUNK_NBYTES, True), (CHUNK_NBYTES, False)]:
            before = read(store, tree)
            found = store.put([Blob(tree, data(size, seed=size)), Blob(other, b"whatever it is")])
            assert (tree in found) is is_new
            assert read(store, tree) == (data(size, seed=size) if is_new else before)
        assert dict(store.keys()) == {tree: 3 * CHUNK_NBYTES, other: 14}
        assert store.put([Blob(tree, data(nbytes)) for nbytes in (4 * CHUNK_NBYTES, 10, 5 * CHUNK_NBYTES)]) == [tree]
        assert read(store, tree) == data(5 * CHUNK_NBYTES)
        assert store.delete([tree, other]) == 2
        assert store.num_quarantined == 0

    def test_what_grows_beyond_the_limit_stays_as_it_was(self, store: Store) -> None:
        tree = key(1, Part.CONTINUATIONS)
        store.put([Blob(tree, data(CHUNK_NBYTES))])
        limit = store.usage().live_nbytes + CHUNK_NBYTES
        assert store.put([Blob(tree, data(CHUNK_NBYTES + 9))], max_nbytes=limit) == [tree]
        with pytest.raises(StoreFull):
            store.put([Blob(tree, data(4 * CHUNK_NBYTES))], max_nbytes=limit)
        assert read(store, tree) == data(CHUNK_NBYTES + 9)

    def test_readers_of_what_grows_see_one_whole_blob(self, store: Store) -> None:
        tree = key(1, Part.CONTINUATIONS)
        blobs = [data(CHUNK_NBYTES // 4 * (number + 1), seed=number) for number in range(12)]
        store.put([Blob(tree, blobs[0])])

        def work(number: int) -> None:
            for turn in range(number % 2, 12, 2):
                if number < 2:
                    store.put([Blob(tree, blobs[turn])])
                else:
                    assert read(store, tree) in blobs

        in_threads(4, work)
        assert read(store, tree) == blobs[-1]
        assert store.num_quarantined == 0

    def test_what_was_deleted_can_be_put_again(self, store: Store) -> None:
        for nbytes in (5 * CHUNK_NBYTES, 10, 2 * CHUNK_NBYTES):
            store.put([Blob(key(1), data(nbytes))])
            assert read(store, key(1)) == data(nbytes)
            assert store.delete([key(1), key(1), key(2)]) == 1

    def test_all_blobs_of_a_put_are_stored_or_none(self, store: Store) -> None:
        bad: Any = Blob(key(3), None)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            store.put([Blob(key(1), data(10)), Blob(key(2), data(3 * CHUNK_NBYTES)), bad])
        assert list(store.keys()) == []
        assert store.put([Blob(key(1), b"x")]) == [key(1)]

    def test_keys_come_ascending_and_all(self, store: Store) -> None:
        keys = [key(number, part) for number in range(1100) for part in (Part.SCORES, Part.KV)]
        store.put([Blob(each, bytes(each.address[-1])) for each in reversed(keys)])
        store.delete(keys[500:510])
        expected = sorted(keys[:500] + keys[510:], key=lambda each: (each.address, each.part.value))
        assert list(store.keys()) == [(each, each.address[-1]) for each in expected]

    def test_keys_may_be_deleted_while_they_are_listed(self, store: Store) -> None:
        store.put([Blob(key(number), b"x") for number in range(1050)])
        entries = store.keys()
        assert sum(store.delete([each]) for each, _ in entries) == 1050
        store.put([Blob(key(number), b"x") for number in range(1500)])
        entries = store.keys()
        assert store.delete(each for each, _ in entries) == 1500
        assert list(store.keys()) == []

    def test_a_buffer_is_private_and_outlives_its_blob(self, store: Store) -> None:
        kept = {}
        for nbytes in (0, 10, 3 * CHUNK_NBYTES):
            store.put([Blob(key(nbytes), data(nbytes))])
            buffer = store.get(key(nbytes))
            assert buffer is not None
            assert (buffer.readonly, buffer.nbytes, buffer.contiguous) == (False, nbytes, True)
            buffer[:] = bytes(nbytes)
            assert read(store, key(nbytes)) == data(nbytes)
            store.delete([key(nbytes)])
            store.put([Blob(key(nbytes), data(nbytes, seed=9))])
            kept[nbytes] = buffer
        store.close()
        assert all(buffer == bytes(nbytes) for nbytes, buffer in kept.items())

    def test_what_is_put_may_change_afterwards(self, store: Store) -> None:
        for nbytes in (10, 2 * CHUNK_NBYTES):
            source = bytearray(data(nbytes))
            store.put([Blob(key(nbytes), bytes(source))])
            source[:] = bytes(nbytes)
            assert read(store, key(nbytes)) == data(nbytes)

    def test_a_closed_store_refuses_everything(self, store: Store) -> None:
        store.put([Blob(key(1), b"x")])
        store.close()
        store.close()
        attempts: list[Callable[[], Any]] = [
            lambda: read(store, key(1)),
            lambda: store.has(key(1)),
            lambda: store.put([Blob(key(2), b"x")]),
            lambda: store.delete([key(1)]),
            lambda: list(store.keys()),
        ]
        for attempt in attempts:
            with pytest.raises(StoreClosed):
                attempt()

    def test_one_of_many_writers_wins_and_readers_see_one_blob(self, store: Store) -> None:
        blobs = [data(2 * CHUNK_NBYTES + 3, seed=number) for number in range(6)]

        def work(number: int) -> list[Key]:
            if number < 6:
                return store.put([Blob(key(1), blobs[number])])
            for _ in range(20):
                assert read(store, key(1)) in (None, *blobs)
            return []

        winners = [number for number, new in enumerate(in_threads(9, work)) if new]
        assert len(winners) == 1
        assert read(store, key(1)) == blobs[winners[0]]
        assert store.num_quarantined == 0

    def test_readers_of_what_is_deleted_and_put_again_see_all_or_nothing(self, store: Store) -> None:
        blobs = [data(CHUNK_NBYTES + 100 * number, seed=number) for number in range(4)]

        def work(number: int) -> None:
            for turn in range(15):
                if number == 0:
                    store.delete([key(1)])
                elif number == 1:
                    store.put([Blob(key(1), blobs[turn % 4])])
                else:
                    assert read(store, key(1)) in (None, *blobs)

        in_threads(5, work)
        assert store.num_quarantined == 0


class StoreMachine(RuleBasedStateMachine):
    """A store and a dict that are asked the same must answer the same. Override `open_store`."""

    def __init__(self) -> None:
        super().__init__()
        self.store = self.open_store()
        self.expected: dict[Key, bytes] = {}

    def open_store(self) -> Store:
        raise NotImplementedError

    def reopen(self) -> None:
        """Close and open again, for stores that last."""

    keys = st.builds(key, st.integers(0, 4), st.sampled_from(Part))
    sizes = st.sampled_from([0, 1, 3000, 5000, CHUNK_NBYTES, CHUNK_NBYTES + 1, 3 * CHUNK_NBYTES])
    cuts = st.lists(st.integers(0, 2 * CHUNK_NBYTES), max_size=3)
    blobs = st.builds(lambda each, nbytes, seed, at: Blob(each, pieces(data(nbytes, seed), at)), keys, sizes,
                      st.integers(0, 9), cuts)  # fmt: skip

    @rule(blobs=st.lists(blobs, max_size=4))
    def put(self, blobs: list[Blob]) -> None:
        new: dict[Key, None] = {}
        for blob in blobs:
            whole, taken = b"".join(blob.pieces), self.expected.get(blob.key)
            if taken is None or (blob.key.part is Part.CONTINUATIONS and len(whole) > len(taken)):
                new[blob.key] = None
                self.expected[blob.key] = whole
        assert self.store.put(blobs) == list(new)

    @rule(keys=st.lists(keys, max_size=6))
    def delete(self, keys: list[Key]) -> None:
        assert self.store.delete(keys) == sum(self.expected.pop(each, None) is not None for each in keys)

    @rule(each=keys)
    def get(self, each: Key) -> None:
        assert read(self.store, each) == self.expected.get(each)
        assert self.store.has(each) is (each in self.expected)
        taken: list[bytes] = []
        assert self.store.scan(each, lambda piece: taken.append(bytes(piece))) is (each in self.expected)
        assert b"".join(taken) == self.expected.get(each, b"")

    @rule()
    def close_and_open(self) -> None:
        self.reopen()

    @invariant()
    def lists_what_is_there(self) -> None:
        ordered = sorted(self.expected, key=lambda each: (each.address, each.part.value))
        assert list(self.store.keys()) == [(each, len(self.expected[each])) for each in ordered]
        assert self.store.num_quarantined == 0

    def teardown(self) -> None:
        self.store.close()
