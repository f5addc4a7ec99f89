"""The store on disk on both sides of a fork."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backprompt_db.errors import StoreLocked
from backprompt_db.store import environment
from backprompt_db.store.contract import Blob
from backprompt_db.store.environment import release, shared_environment
from backprompt_db.store.lmdb import LmdbStore
from backprompt_db.store.records import CHUNK_NBYTES
from tests.support.store_contract import data, key, read

assert sys.platform != "win32"

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    LmdbStore.create(tmp_path / "store").close()
    return tmp_path / "store"


def in_fork(work: Callable[[], bool]) -> bool:
    """Whether `work` came true in a forked child, which is killed if it hangs."""
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(0 if work() else 1))
    process.start()
    process.join(20)
    if process.is_alive():
        process.kill()
    return process.exitcode == 0


def put_and_get(directory: Path, number: int) -> None:
    store = LmdbStore(directory)
    assert store.put([Blob(key(number), data(number))]) == [key(number)]
    assert read(store, key(number)) == data(number)
    store.close()


def test_a_child_of_a_fork_reads_and_writes_and_its_parent_goes_on(directory: Path) -> None:
    store = LmdbStore(directory)
    store.put([Blob(key(1), data(100))])
    assert in_fork(lambda: read(store, key(1)) == data(100) and store.put([Blob(key(2), b"child")]) == [key(2)])
    assert read(store, key(2)) == b"child"
    assert store.put([Blob(key(3), b"parent")]) == [key(3)]
    store.close()
    assert in_fork(lambda: read(LmdbStore(directory), key(3)) == b"parent")


def test_a_child_of_a_child_and_a_child_that_closes(directory: Path) -> None:
    store = LmdbStore(directory)
    store.put([Blob(key(1), b"x")])

    def fork_again_and_close() -> bool:
        is_read = in_fork(lambda: read(store, key(1)) == b"x")
        store.close()
        return is_read

    assert in_fork(fork_again_and_close)
    assert read(store, key(1)) == b"x"
    store.close()


def test_a_child_forked_inside_a_transaction_fails_and_does_not_hang(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_FORK_SECONDS", 0.1)
    store = LmdbStore(directory)
    shared = shared_environment(directory, readonly=False)

    def is_refused() -> bool:
        with pytest.raises(StoreLocked, match="forked"):
            read(store, key(1))
        store.close()
        return True

    for write in (False, True):
        with shared.transaction(write=write):
            assert in_fork(is_refused)
    assert store.put([Blob(key(1), b"x")]) == [key(1)]
    assert in_fork(lambda: read(store, key(1)) == b"x")
    store.close()
    release(shared)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_multiprocessing_share_the_store(directory: Path, method: str) -> None:
    store = LmdbStore(directory)
    context: Any = multiprocessing.get_context(method)
    processes = [context.Process(target=put_and_get, args=(directory, number)) for number in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [read(store, key(number)) for number in (1, 2)] == [data(1), data(2)]
    store.close()


def test_forks_beside_busy_threads_neither_hang_nor_disturb_them(directory: Path) -> None:
    store = LmdbStore(directory)
    store.put([Blob(key(0), data(2 * CHUNK_NBYTES))])
    stop, failures = threading.Event(), list[BaseException]()

    def work(number: int) -> None:
        turn = 0
        try:
            while not stop.is_set():
                turn += 1
                store.put([Blob(key(number * 10_000 + turn), data(3000))])
                assert read(store, key(0)) == data(2 * CHUNK_NBYTES)
                store.delete([key(number * 10_000 + turn)])
        except BaseException as error:  # noqa: BLE001 - asserted below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    answers = [in_fork(lambda: read(store, key(0)) == data(2 * CHUNK_NBYTES)) for _ in range(10)]
    stop.set()
    for thread in threads:
        thread.join(30)
    assert (answers, failures, store.num_quarantined) == ([True] * 10, [], 0)
    store.close()


def test_a_fork_does_not_give_up_the_place_of_a_reader(directory: Path) -> None:
    shared = shared_environment(directory, readonly=False)
    is_reading, go_on = threading.Event(), threading.Event()

    def read() -> None:
        with shared.transaction():
            is_reading.set()
            go_on.wait(20)

    reader = threading.Thread(target=read)
    reader.start()
    is_reading.wait(20)
    answers = list[bool]()
    forker = threading.Thread(target=lambda: answers.append(in_fork(lambda: True)))
    forker.start()
    forker.join(0.3)
    assert (forker.is_alive(), answers) == (True, [])  # it waits for the reader
    go_on.set()
    forker.join(20)
    reader.join(20)
    assert answers == [True]
    release(shared)
