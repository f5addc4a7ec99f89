"""Compaction: the file shrinks, beside readers and writers, and nothing is lost, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backprompt_db.errors import StoreCorrupt, StoreFull
from backprompt_db.prompt.ids import Address
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Blob, Key
from backprompt_db.store.files import Sharing
from backprompt_db.store.lmdb import LmdbStore
from backprompt_db.system.failpoints import VARIABLE

assert sys.platform != "win32"

ROOT = Path(__file__).parents[2]
NBYTES = 300_000
PREAMBLE = """
import itertools, os, sys, time
from pathlib import Path
from tests.store.test_compaction import *
place = Path(sys.argv[1])
store = LmdbStore(place)
"""


def key(number: int) -> Key:
    return Key(Address(number.to_bytes(32, "big")), Part.KV)


def value(number: int) -> bytes:
    return number.to_bytes(8, "big") * (NBYTES // 8)


def fill(store: LmdbStore, numbers: range) -> None:
    store.put([Blob(key(number), value(number)) for number in numbers])


def check(store: LmdbStore, numbers: range) -> None:
    assert [bytes(store.get(key(number)) or b"") for number in numbers] == [value(number) for number in numbers]
    assert store.num_quarantined == 0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LmdbStore]:
    """Ten blobs that are left of forty."""
    with contextlib.closing(LmdbStore.create(tmp_path / "store")) as store:
        fill(store, range(40))
        store.delete(map(key, range(10, 40)))
        yield store


@contextlib.contextmanager
def child(script: str, place: Path, failpoint: str = "") -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), VARIABLE: failpoint}
    command = [sys.executable, "-W", "error", "-c", PREAMBLE + script, str(place)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_file_shrinks_and_everything_stays(store: LmdbStore) -> None:
    before = store.usage()
    store.compact()
    after = store.usage()
    assert after.file_nbytes < before.file_nbytes / 3
    assert after.live_nbytes <= after.file_nbytes
    check(store, range(10))
    assert [found for found, _ in store.keys()] == [key(number) for number in range(10)]
    fill(store, range(10, 20))
    store.compact()
    check(store, range(20))


def test_nothing_of_what_was_deleted_is_left_in_the_file(store: LmdbStore) -> None:
    data = store.directory / "data.mdb"
    assert value(25)[:4000] in data.read_bytes()
    store.compact()
    assert value(25)[:4000] not in data.read_bytes()
    assert value(5)[:4000] in data.read_bytes()


def test_the_new_file_has_the_permissions_of_the_old_one(tmp_path: Path) -> None:
    with contextlib.closing(LmdbStore.create(tmp_path / "store", modes=Sharing.GROUP.modes)) as store:
        data = store.directory / "data.mdb"
        before = data.stat()
        store.compact()
        assert data.stat().st_ino == before.st_ino  # nothing to compact
        fill(store, range(3))
        store.compact()
        after = data.stat()
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
        assert after.st_ino != before.st_ino


def test_other_handles_of_the_process_go_on(store: LmdbStore) -> None:
    with contextlib.closing(LmdbStore(store.directory)) as other:
        for turn in range(5):
            (store, other)[turn % 2].compact()
            fill(other, range(100 + turn, 101 + turn))
            check(store, range(100, 101 + turn))


def test_readers_and_writers_in_other_processes_go_on(store: LmdbStore) -> None:
    writer = (
        "for number in itertools.count(1000):\n    fill(store, range(number, number + 1))\n"
        "    print(number, flush=True)\n    check(store, range(number, number + 1))\n"
        "    if number >= 1012: store.delete([key(number - 12)])\n"
    )
    reader = "print('reading', flush=True)\nwhile True: check(store, range(10))\n"
    with child(writer, store.directory) as one, child(writer.replace("1000", "9000").replace("1012", "9012"), store.directory) as two, child(reader, store.directory) as three:  # fmt: skip  # noqa: E501
        for process in (one, two, three):
            assert process.stdout is not None
            process.stdout.readline()
        for _ in range(10):
            store.compact()
            check(store, range(10))
            time.sleep(0.02)
        for process in (one, two, three):
            assert process.poll() is None, process.stderr and process.stderr.read()
            process.send_signal(signal.SIGKILL)
        assert one.stdout is not None
        assert two.stdout is not None
        last = [int([line for line in stream if line.endswith("\n")][-1]) for stream in (one.stdout, two.stdout)]
    for number in last:
        check(store, range(number - 10, number + 1))
    assert min(last[0] - 1000, last[1] - 9000) > 10


@pytest.mark.parametrize("point", ["store.compact.copied", "store.compact.renamed"])
def test_a_compaction_that_is_killed_costs_nothing(store: LmdbStore, point: str) -> None:
    with child("store.compact()", store.directory, f"{point}=kill") as process:
        assert process.wait(300) == -signal.SIGKILL
    check(store, range(10))
    fill(store, range(50, 52))
    store.close()
    with contextlib.closing(LmdbStore(store.directory)) as again:
        check(again, range(10))
        check(again, range(50, 52))
        again.compact()
        check(again, range(50, 52))
    assert sorted(path.name for path in store.directory.iterdir()) == ["data.mdb", "lock.mdb", "turn.lock"]


def test_one_who_waits_to_write_writes_to_the_new_file(store: LmdbStore) -> None:
    with child("store.compact()", store.directory, "store.compact.copied=sleep:1") as compaction:
        while not list(store.directory.glob(".compact-*")):
            time.sleep(0.01)
        fill(store, range(60, 61))  # waits
        assert compaction.wait(300) == 0
    store.close()
    with contextlib.closing(LmdbStore(store.directory)) as again:
        check(again, range(60, 61))


def test_a_child_of_a_fork_goes_on(store: LmdbStore) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            os.read(read, 1)
            check(store, range(10))
            fill(store, range(70, 71))
            os._exit(0)
        os._exit(1)
    store.compact()
    os.write(write, b"x")
    assert os.waitpid(pid, 0)[1] == 0
    check(store, range(70, 71))


def restored(store: LmdbStore, backup: bytes) -> None:
    """Put a backup in the place of the file, as a new one."""
    copy = store.directory / "restored"
    copy.write_bytes(backup)
    copy.replace(store.directory / "data.mdb")


@pytest.mark.parametrize("replace", [restored])
def test_a_file_that_is_no_compaction_is_not_taken_for_one(
    store: LmdbStore, replace: Callable[[LmdbStore, bytes], None]
) -> None:
    backup = (store.directory / "data.mdb").read_bytes()
    fill(store, range(80, 81))
    replace(store, backup)
    check(store, range(10))  # what was read from the old file is as right as ever
    with pytest.raises(StoreCorrupt, match="was replaced while it was open"):
        fill(store, range(81, 82))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small filesystem needs root")
def test_without_room_for_a_copy_nothing_changes(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(place)], check=True)  # noqa: S607
    try:
        with contextlib.closing(LmdbStore.create(place / "store")) as store:
            fill(store, range(6))
            with pytest.raises(StoreFull, match="needs room for a copy"):
                store.compact()
            check(store, range(6))
    finally:
        subprocess.run(["umount", str(place)], check=True)  # noqa: S607
