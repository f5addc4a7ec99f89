"""The database: where it is, what it promises to its caller, and what it does when its store fails."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backprompt_db as bp
from backprompt_db.codec.blob import encode, header_nbytes
from backprompt_db.codec.kv_reader import KVSpan
from backprompt_db.database import writer
from backprompt_db.database.database import Database
from backprompt_db.errors import BackpromptError, BlobFormat, StoreClosed, StoreError, StoreFull
from backprompt_db.prompt.ids import ModelIds, TokenizerId, WeightsId
from backprompt_db.prompt.representation import Array, Part
from backprompt_db.store.contract import Blob, Key
from tests.support.databases import (
    BROKEN,
    FaultyStore,
    address,
    continuations,
    expected,
    logits,
    new_part,
    origin,
    values,
    wanted,
)

Open = Callable[..., Database]


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore()


def database_on(store: FaultyStore, **options: Any) -> Database:
    return Database(store, directory=None, **options)


def test_a_database_in_memory_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with bp.open(":memory:") as db:
        db.put([new_part("a")])
        db.flush()
        assert values(db.fetch(wanted("a"))) == expected("a")
        assert repr(db) == "<Database :memory:>"
        assert db.catalog is None
    assert list(tmp_path.iterdir()) == []


def test_what_was_put_is_found_at_once_and_after_reopening(open_db: Open, tmp_path: Path) -> None:
    with open_db(tmp_path / "db") as db:
        db.put([new_part("a"), new_part("b")])
        assert values(db.fetch(wanted("a", "b", "c"))) == expected("a", "b")
        assert db.has(new_part("a").key)
        assert not db.has(new_part("c").key)
        assert (db.counters.num_hits, db.counters.num_misses) == (2, 1)
    with open_db(tmp_path / "db") as db:
        assert values(db.fetch(wanted("a", "b"))) == expected("a", "b")
        assert db.counters == bp.Counters(num_hits=2, num_disk_hits=2)


def test_leaving_the_block_writes_and_closes(open_db: Open, tmp_path: Path) -> None:
    with open_db(tmp_path / "db") as db:
        db.put([new_part(str(number)) for number in range(100)])
    assert db.counters.num_stored == 100
    db.close()
    attempts: list[Callable[[], object]] = [
        lambda: db.fetch(wanted("1")), lambda: db.has(new_part("1").key), lambda: db.put([new_part("x")]), db.flush,
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(StoreClosed, match="was closed"):
            attempt()


def test_closing_in_many_threads_closes_once(open_db: Open, tmp_path: Path) -> None:
    other = open_db(tmp_path / "db")
    db = open_db(tmp_path / "db")
    db.put([new_part("a")])
    threads = [threading.Thread(target=db.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values(other.fetch(wanted("a"))) == expected("a")


def test_a_caller_reads_what_is_still_queued(store: FaultyStore) -> None:
    store.may_write.clear()
    with database_on(store) as db:
        db.put([new_part("a")])
        assert db.has(new_part("a").key)
        assert values(db.fetch(wanted("a"))) == expected("a")
        assert store.puts == []
        store.may_write.set()
        db.flush()
        assert (store.puts, db.counters.num_stored) == ([1], 1)


def test_logits_that_a_caller_changes_are_stored_unchanged() -> None:
    array = logits("a")
    found = bp.ModelRepr(
        text=bp.Text("a"), segments=(), scores=(), last_logits=array, num_cached_tokens=0, num_computed_tokens=1,
        is_computed=(), ids=ModelIds(WeightsId(bytes(32)), TokenizerId(bytes(32))),
    )  # fmt: skip
    found.logits.zero_()
    assert bytes(array.data) == bytes(logits("a").data)


def test_a_full_queue_holds_its_caller_back(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_QUEUED_NBYTES", 100)
    store.may_write.clear()
    with database_on(store) as db:
        db.put([new_part("a", num_values=50)])
        late = threading.Thread(target=db.put, args=([new_part("b")],))
        late.start()
        late.join(0.2)
        assert late.is_alive()
        store.may_write.set()
        late.join(20)
        assert not late.is_alive()
        db.flush()
        assert db.counters.num_stored == 2


def test_queued_parts_share_transactions(store: FaultyStore) -> None:
    store.may_write.clear()
    with database_on(store) as db:
        for number in range(50):
            db.put([new_part(str(number))])
        store.may_write.set()
        db.flush()
    assert (sum(store.puts), len(store.puts) <= 3) == (50, True)


def test_the_same_part_put_twice_is_stored_once(store: FaultyStore) -> None:
    with database_on(store) as db:
        db.put([new_part("a"), new_part("a")])
        db.put([new_part("a")])
        db.flush()
        db.put([new_part("a")])
        db.flush()
        assert db.counters.num_stored == 1


def num_continuations(db: Database, text: str) -> int:
    key = Key(address(text), Part.CONTINUATIONS)
    return db.fetch({key.address: [key.part]})[key]["parents"].shape[0]


def test_what_has_grown_takes_the_place_of_what_is_queued(store: FaultyStore) -> None:
    store.may_write.clear()
    with database_on(store) as db:
        db.put([new_part("a")])  # which is being written meanwhile
        for num_tokens in (3, 8, 5):
            db.put_later(continuations("a", num_tokens))
        assert num_continuations(db, "a") == 8
        store.may_write.set()
        db.flush()
        assert num_continuations(db, "a") == 8
        assert (sum(store.puts), db.counters.num_stored, db.counters.num_computed_tokens) == (2, 2, 1)


def test_what_grows_while_it_is_written_is_written_again(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    is_writing = threading.Event()

    def put(blobs: Sequence[Blob], **options: Any) -> list[Key]:
        is_writing.set()
        return FaultyStore.put(store, blobs, **options)

    monkeypatch.setattr(store, "put", put)
    store.may_write.clear()
    with database_on(store) as db:
        db.put_later(continuations("a", 3))
        assert is_writing.wait(20)
        db.put_later(continuations("a", 8))
        store.may_write.set()
        db.flush()
        assert num_continuations(db, "a") == 8
        assert (store.puts, db.counters.num_stored) == ([1, 1], 2)
        assert [nbytes for _, nbytes in store.keys()] == [store.usage().live_nbytes]


def test_memory_forgets_what_has_grown(store: FaultyStore) -> None:
    with database_on(store) as db:
        for num_tokens, most in [(3, 3), (8, 8), (5, 8)]:
            db.put_later(continuations("a", num_tokens))
            db.flush()
            assert num_continuations(db, "a") == most
        assert db.counters.num_stored == 2


def test_flush_does_not_wait_for_what_comes_later(store: FaultyStore) -> None:
    with database_on(store) as db:
        stop = threading.Event()

        def keep_putting() -> None:
            for number in itertools.takewhile(lambda _: not stop.wait(0.002), itertools.count()):
                db.put([new_part(str(number))])

        def flush_often() -> None:
            for _ in range(5):
                db.flush()

        busy = threading.Thread(target=keep_putting)
        busy.start()
        flushes = threading.Thread(target=flush_often)
        flushes.start()
        flushes.join(20)
        is_flushed = not flushes.is_alive()
        stop.set()
        busy.join()
        assert is_flushed


@pytest.mark.parametrize("error", [StoreFull("full", hint="Free some."), BROKEN, ValueError("bug"), MemoryError()])
def test_a_failed_write_is_counted_reported_once_and_over(
    store: FaultyStore, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with database_on(store) as db:
        store.error = error
        for text in "abc":
            db.put([new_part(text)])
            with pytest.raises(BackpromptError):
                db.flush()
        db.flush()
        assert (db.counters.num_write_failures, db.counters.num_stored) == (3, 0)
        assert (
            [record.message for record in caplog.records].count(caplog.records[0].message) == len(caplog.records) == 1
        )
        store.error = None
        db.put([new_part("d")])
        db.flush()
        assert values(db.fetch(wanted("a", "d"))) == expected("d")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [OverflowError("too large"), SystemExit()])
def test_a_group_that_cannot_be_chosen_fails_and_the_next_one_is_stored(
    store: FaultyStore, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise error

    with database_on(store) as db:
        with monkeypatch.context() as patch:
            patch.setattr(writer.Writer, "max_group_nbytes", refuse)
            db.put([new_part("a"), new_part("b")])
            with pytest.raises(BackpromptError, match="writing failed"):
                in_time(db.flush)
        assert db.counters.num_write_failures == 2
        db.put([new_part("c")])
        in_time(db.flush)
        assert values(db.fetch(wanted("a", "b", "c"))) == expected("c")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_started_again(store: FaultyStore) -> None:
    with database_on(store) as db:
        for text in "ab":
            store.error = SystemExit()
            db.put([new_part(text)])
            with pytest.raises(BackpromptError, match="writing failed: SystemExit"):
                in_time(db.flush)
            store.error = None
            db.put([new_part(f"{text} again")])
            in_time(db.flush)
        assert values(db.fetch(wanted("a again", "b again"))) == expected("a again", "b again")


def in_time(do: Callable[[], None]) -> None:
    """Do something that must not wait for ever, and raise what it raises."""
    failures = list[BaseException]()

    def attempt() -> None:
        try:
            do()
        except BackpromptError as error:
            failures.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    for failure in failures:
        raise failure


def test_one_part_that_cannot_be_encoded_does_not_cost_the_others(store: FaultyStore) -> None:
    bad = dataclasses.replace(new_part("bad"), arrays={"values": logits("bad")})
    with database_on(store) as db:
        store.may_write.clear()
        db.put([new_part("a"), bad, new_part("b")])
        store.may_write.set()
        with pytest.raises(BlobFormat):
            db.flush()
        assert values(db.fetch(wanted("a", "bad", "b"))) == expected("a", "b")
        assert (db.counters.num_stored, db.counters.num_write_failures) == (2, 1)


def test_without_threads_the_caller_writes_itself(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with database_on(store) as db:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            db.put([new_part("a"), new_part("b")])
            db.flush()
            assert store.puts == [2]
        db.put([new_part("c")])
        db.flush()
        assert values(db.fetch(wanted("a", "b", "c"))) == expected("a", "b", "c")


def test_a_store_that_cannot_be_read_is_a_miss(store: FaultyStore, caplog: pytest.LogCaptureFixture) -> None:
    with database_on(store) as db:
        db.put([new_part("a")])
        db.flush()
        store.error = BROKEN
        assert db.fetch(wanted("a")) == db.fetch(wanted("a")) == {}
        assert not db.has(new_part("a").key)
        assert (db.counters.num_read_failures, db.counters.num_misses, len(caplog.records)) == (3, 2, 1)
        store.error = None
        assert values(db.fetch(wanted("a"))) == expected("a")


def test_a_strict_database_raises_what_its_store_raises(store: FaultyStore) -> None:
    db = database_on(store, strict=True)
    store.error = BROKEN
    with pytest.raises(StoreError, match="broken"):
        db.fetch(wanted("a"))
    with pytest.raises(StoreError, match="broken"):
        db.has(new_part("a").key)
    db.put([new_part("a")])
    with pytest.raises(StoreError, match="broken"):
        db.close()
    db.close()
    store.error = None
    with pytest.raises(StoreClosed):
        store.get(new_part("a").key)


def test_a_part_that_cannot_be_decoded_is_quarantined(store: FaultyStore) -> None:
    key = new_part("a").key
    with database_on(store) as db:
        store.put([Blob(key, b"no safetensors at all")])
        assert db.fetch(wanted("a")) == {}
        assert (db.counters.num_quarantined, db.counters.num_misses, store.has(key)) == (1, 1, False)
        db.put([new_part("a")])
        db.flush()
        assert values(db.fetch(wanted("a"))) == expected("a")


def kv_blob() -> bytes:
    array = Array.from_numpy(np.arange(48, dtype=np.float32).reshape(2, 2, 3, 4))
    return encode(Part.KV, {"keys": array, "values": array}, origin("a"))


def span() -> KVSpan:
    return KVSpan(*(np.zeros((2, 2, 3, 4), np.float32) for _ in range(2)))


def unpadded(blob: bytes) -> bytes:
    end = header_nbytes(blob)
    return (end - 8 + 3).to_bytes(8, "little") + blob[8:end] + b"   " + blob[end:]


MALFORMED: dict[str, Callable[[bytes], bytes]] = {
    "8 bytes short": lambda blob: blob[:-8], "1 byte short": lambda blob: blob[:-1], "empty": lambda blob: b"",
    "a length alone": lambda blob: blob[:8], "less than a length": lambda blob: blob[:5],
    "half a header": lambda blob: blob[:100], "a header alone": lambda blob: blob[: header_nbytes(blob)],
    "8 bytes long": lambda blob: blob + bytes(8), "1 byte long": lambda blob: blob + bytes(1), "unpadded": unpadded,
}  # fmt: skip


@pytest.mark.parametrize("fidelity", ["exact", "int8"])
@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_keys_and_values_are_quarantined_and_replaced(
    open_db: Open, tmp_path: Path, kind: str, fidelity: str
) -> None:
    key, blob = Key(address("a"), Part.KV), kv_blob()
    db = open_db(tmp_path / "db", fidelity=fidelity)
    questions: list[Callable[[], object]] = [
        lambda: db.load(key, span(), "F32"), lambda: db.fetch({key.address: [Part.KV]})
    ]  # fmt: skip
    for ask in questions:
        before = db.counters.num_quarantined
        assert db.store.put([Blob(key, [MALFORMED[kind](blob)])]) == [key]
        assert not ask()
        assert (db.counters.num_quarantined - before, db.has(key)) == (1, False)
    assert db.store.put([Blob(key, [blob])]) == [key]
    there = span()
    assert db.load(key, there, "F32")
    assert there.keys[1, 1, 2, 3] == 47


def test_a_part_that_can_neither_be_decoded_nor_removed_is_a_miss(store: FaultyStore) -> None:
    key = new_part("a").key
    with database_on(store) as db:
        store.put([Blob(key, b"no safetensors at all")])
        store.error = BROKEN
        db.discard(key)
        assert (db.counters.num_quarantined, db.counters.num_read_failures) == (1, 1)


def test_a_representation_is_a_hit_only_with_all_its_parts(db: Database) -> None:
    scores = {"input_ids": Array.from_numpy(np.zeros(1, np.int32)), "token_logprobs": logits("a", 1)}
    part = dataclasses.replace(new_part("a"), key=Key(address("a"), Part.SCORES), arrays=scores)
    db.put([part])
    assert set(db.fetch({address("a"): [Part.SCORES, Part.LOGITS]})) == {part.key}
    assert (db.counters.num_hits, db.counters.num_misses) == (0, 1)
    assert db.fetch({address("a"): [Part.SCORES]})
    assert (db.counters.num_hits, db.counters.num_misses) == (1, 1)


def test_namespaces_never_share(open_db: Open, tmp_path: Path) -> None:
    with open_db(tmp_path / "db", namespace="ours") as db:
        db.put([new_part("a", namespace=db.namespace)])
    with open_db(tmp_path / "db", namespace="theirs' OR 1=1; --") as db:
        assert db.fetch(wanted("a", namespace=db.namespace)) == {}
        assert db.fetch(wanted("a")) == {}
        assert len(db.fetch(wanted("a", namespace="ours"))) == 1


def test_a_database_without_its_catalog_still_answers(
    open_db: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_db(tmp_path / "db") as db:
        db.put([new_part("a")])
    (tmp_path / "db" / "catalog.sqlite").write_bytes(b"garbage" * 1000)
    with open_db(tmp_path / "db") as db:
        assert values(db.fetch(wanted("a"))) == expected("a")
        db.put([new_part("b")])
        db.flush()
        assert (db.catalog, db.counters.num_stored, db.counters.num_write_failures) == (None, 1, 0)
    assert any("without the catalog" in record.message for record in caplog.records)


def test_a_hit_is_logged_nowhere(db: Database, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="backprompt_db"):
        db.put([new_part("a")])
        db.flush()
        db.fetch(wanted("a"))
    assert caplog.records == []
