"""The store on disk keeps its promises across processes, forks, damaged files and exhausted resources."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from backprompt_db.errors import (
    StoreClosed,
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreLocked,
    StoreReadOnly,
    UnsafeLocation,
)
from backprompt_db.store import environment
from backprompt_db.store.contract import Blob
from backprompt_db.store.environment import release, shared_environment
from backprompt_db.store.files import PRIVATE, create_files
from backprompt_db.store.lmdb import LmdbStore
from backprompt_db.store.lmdb_errors import as_store_error, store_errors
from backprompt_db.store.records import CHUNK_NBYTES
from tests.support.store_contract import data, key, read

assert sys.platform != "win32"

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

PREAMBLE = """
import os, resource, sys
from pathlib import Path
from backprompt_db.errors import *
from backprompt_db.store.contract import Blob, Key
from backprompt_db.store.lmdb import LmdbStore
from backprompt_db.prompt.representation import Part
def key(number):
    return Key(number.to_bytes(32, "big"), Part.KV)
directory = Path(sys.argv[1])
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    LmdbStore.create(tmp_path / "store").close()
    return tmp_path / "store"


def child(script: str, directory: Path, *, preexec: Callable[[], None] | None = None) -> list[str]:
    """Run a script in a process of its own and return the words that it prints."""
    command = [sys.executable, "-W", "error", "-c", PREAMBLE + script, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, preexec_fn=preexec)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_one_process_has_one_environment_whatever_the_path(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory.parent / "link").symlink_to(directory)
    monkeypatch.chdir(directory.parent)
    paths = [directory, directory.parent / "link", Path("store"), directory.parent / "store" / ".." / "store"]
    shared = [shared_environment(path, readonly=False) for path in paths]
    assert all(each is shared[0] for each in shared)
    stores = [LmdbStore(path) for path in paths]
    for each in shared[1:]:
        release(each)
    stores[0].put([Blob(key(1), b"x")])
    assert [read(store, key(1)) for store in stores] == [b"x"] * 4
    for store in stores:
        store.close()
    release(shared[0])
    with pytest.raises(StoreClosed):
        shared[0].transaction().__enter__()


def test_closing_one_handle_leaves_the_others_open(directory: Path) -> None:
    one, other = LmdbStore(directory), LmdbStore(directory)
    one.close()
    one.close()
    assert other.put([Blob(key(1), b"x")]) == [key(1)]
    other.close()


def test_opening_and_closing_in_many_threads(directory: Path) -> None:
    def work(number: int) -> None:
        for turn in range(20):
            store = LmdbStore(directory)
            store.put([Blob(key(number * 100 + turn), b"x")])
            assert read(store, key(number * 100 + turn)) == b"x"
            store.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    store = LmdbStore(directory)
    assert len(list(store.keys())) == 80
    store.close()


def test_a_map_that_another_process_enlarged_is_adopted(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_MAP_NBYTES", 1 << 20)
    store = LmdbStore(directory)
    store.put([Blob(key(1), data(100))])
    script = "store = LmdbStore(directory); store.put([Blob(key(2), bytes(3 << 20))]); store.close(); print('done')"
    assert child(script, directory) == ["done"]
    assert read(store, key(2)) == bytes(3 << 20)
    assert read(store, key(1)) == data(100)
    store.close()


def test_a_full_map_is_a_full_store_that_still_reads(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_MAP_NBYTES", 1 << 20)
    store = LmdbStore(directory)
    store.put([Blob(key(1), data(100))])
    with pytest.raises(StoreFull, match="Evict something"):
        store.put([Blob(key(2), b"x"), Blob(key(3), data(3 << 20))])
    assert [store.has(key(number)) for number in (1, 2, 3)] == [True, False, False]
    assert store.delete([key(1)]) == 1
    store.close()


def test_a_map_is_adopted_while_other_threads_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_MAP_NBYTES", 1 << 20)
    store = LmdbStore(directory)
    store.put([Blob(key(1), data(100))])
    stop, answers = threading.Event(), set[bool]()

    def keep_reading() -> None:
        while not stop.is_set():
            answers.add(read(store, key(1)) == data(100))

    threads = [threading.Thread(target=keep_reading) for _ in range(3)]
    for thread in threads:
        thread.start()
    child("LmdbStore(directory).put([Blob(key(2), bytes(3 << 20))])", directory)
    found = read(store, key(2))
    stop.set()
    for thread in threads:
        thread.join(30)
    assert (found == bytes(3 << 20), answers, any(thread.is_alive() for thread in threads)) == (True, {True}, False)
    store.close()


def test_a_full_table_of_readers_is_an_error_and_then_over(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "lock.mdb").unlink()
    monkeypatch.setattr(environment, "MAX_READERS", 2)
    store = LmdbStore(directory)
    store.put([Blob(key(1), b"x")])
    shared = shared_environment(directory, readonly=False)
    with shared.transaction(), shared.transaction(), pytest.raises(StoreLocked, match="Close processes"):
        read(store, key(1))
    assert read(store, key(1)) == b"x"
    release(shared)
    store.close()


def test_readers_that_died_make_room(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "lock.mdb").unlink()
    monkeypatch.setattr(environment, "MAX_READERS", 2)
    store = LmdbStore(directory)
    store.put([Blob(key(1), b"x")])
    script = "from backprompt_db.store.environment import shared_environment as shared\n"
    script += "e = shared(directory, readonly=False); a = e.transaction(); a.__enter__(); b = e.transaction()\n"
    script += "b.__enter__(); print('died', flush=True); os._exit(0)"
    assert child(script, directory) == ["died"]
    assert read(store, key(1)) == b"x"
    store.close()


@pytest.mark.parametrize("length", [0, 1, 4096, 8192, "half", "minus a page", "minus a byte"])
def test_a_truncated_file_is_refused_before_it_can_kill(directory: Path, length: int | str) -> None:
    store = LmdbStore(directory)
    store.put([Blob(key(number), data(CHUNK_NBYTES)) for number in range(3)])
    store.close()
    size = (directory / "data.mdb").stat().st_size
    named = {"half": size // 2, "minus a page": size - 4096, "minus a byte": size - 1}
    os.truncate(directory / "data.mdb", named[length] if isinstance(length, str) else length)
    script = "try:\n    store = LmdbStore(directory)\n    [store.get(each) for each, _ in store.keys()]\n"
    script += "except StoreCorrupt as error:\n    print('corrupt', bool(error.hint))"
    assert child(script, directory) == ["corrupt", "True"]


@pytest.mark.parametrize("content", [b"garbage", os.urandom(20_000), bytes(20_000), b"SQLite format 3\0" * 1000])
def test_a_file_that_is_not_lmdb_is_refused(directory: Path, content: bytes) -> None:
    (directory / "data.mdb").write_bytes(content)
    with pytest.raises(StoreCorrupt, match="Restore it"):
        LmdbStore(directory)


def test_a_file_of_the_other_generation_is_refused(directory: Path) -> None:
    shutil.rmtree(directory)
    with lmdb.Environment(str(directory), lib_version=1) as env, env.begin(write=True) as transaction:
        transaction.put(b"a", b"b")
    with pytest.raises(StoreCorrupt):
        LmdbStore(directory)


def test_a_missing_file_is_refused_and_not_made(directory: Path) -> None:
    (directory / "data.mdb").unlink()
    for readonly in (False, True):
        with pytest.raises(StoreCorrupt, match="missing"):
            LmdbStore(directory, readonly=readonly)
    assert not (directory / "data.mdb").exists()


def test_a_store_that_was_replaced_while_open_takes_no_more_writes(directory: Path) -> None:
    store = LmdbStore(directory)
    store.put([Blob(key(1), b"x")])
    shutil.rmtree(directory)
    with pytest.raises(StoreCorrupt):
        store.put([Blob(key(2), b"x")])
    fresh = LmdbStore.create(directory)
    assert fresh.put([Blob(key(3), b"x")]) == [key(3)]
    with pytest.raises(StoreCorrupt, match="replaced"):
        store.put([Blob(key(2), b"x")])
    assert read(store, key(1)) == b"x"
    store.close()
    assert [fresh.has(key(number)) for number in (1, 2, 3)] == [False, False, True]
    fresh.close()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
def test_files_are_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    child(f"os.umask({umask}); LmdbStore.create(directory).put([Blob(key(1), b'x')])", tmp_path / "store")
    modes = {path.name: path.stat().st_mode & 0o7777 for path in [tmp_path / "store", *(tmp_path / "store").iterdir()]}
    assert modes == {"store": 0o700, "data.mdb": 0o600, "lock.mdb": 0o600, "turn.lock": 0o600}


@pytest.mark.parametrize("name", ["", "data.mdb", "lock.mdb"])
def test_a_planted_symbolic_link_is_not_followed(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o755)
    if name:
        (tmp_path / "store").mkdir()
    (tmp_path / "store" / name).symlink_to(victim / name)
    with pytest.raises(UnsafeLocation):
        create_files(tmp_path / "store", PRIVATE)
    assert (list(victim.iterdir()), victim.stat().st_mode & 0o777) == ([], 0o755)


def test_a_small_address_space_gets_a_smaller_map(directory: Path) -> None:
    script = "store = LmdbStore(directory); store.put([Blob(key(1), bytes(2 << 20))])\n"
    script += "print(store.get(key(1)) == bytes(2 << 20), store._environment._env.info()['map_size'] < 1 << 33)"
    limit = 8 << 30
    assert child(script, directory, preexec=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))) == [
        "True",
        "True",
    ]


def test_a_limit_on_file_size_is_a_full_store_that_still_reads(directory: Path) -> None:
    script = "store = LmdbStore(directory); store.put([Blob(key(1), bytes(1000))])\n"
    script += "try:\n    store.put([Blob(key(2), bytes(8 << 20)), Blob(key(3), b'x')])\n"
    script += "except StoreFull as error:\n    print('full')\n"
    script += "print(store.get(key(1)) == bytes(1000), store.has(key(2)), store.has(key(3)), store.delete([key(1)]))"
    limit = 4 << 20
    limited = child(script, directory, preexec=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert limited == ["full", "True", "False", "False", "1"]
    assert child("store = LmdbStore(directory); print(store.put([Blob(key(2), b'x')]) == [key(2)])", directory) == [
        "True"
    ]


ERRORS = [kind for kind in vars(lmdb).values() if isinstance(kind, type) and issubclass(kind, lmdb.Error)]


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_of_lmdb_says_what_to_do(kind: type[lmdb.Error], tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught, store_errors(tmp_path):
        raise kind("mdb_put")
    assert caught.value.hint
    assert str(tmp_path) in caught.value.message
    assert isinstance(caught.value.__cause__, kind)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, StoreFull), (errno.EDQUOT, StoreFull), (errno.EFBIG, StoreFull), (errno.EACCES, StoreReadOnly),
        (errno.EROFS, StoreReadOnly), (errno.EMFILE, StoreError), (errno.EIO, StoreError), (errno.EAGAIN, StoreLocked),
    ],
)  # fmt: skip
def test_errors_of_the_system_are_told_apart(code: int, expected: type[StoreError], tmp_path: Path) -> None:
    assert type(as_store_error(OSError(code, "what"), tmp_path)) is expected
