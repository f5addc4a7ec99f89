"""LMDB counts pages at the end that it took and gave back, and never writes them: such a file is whole."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from backprompt_db.errors import StoreCorrupt
from backprompt_db.store.contract import Blob, Key
from backprompt_db.store.environment import LMDB_GENERATION
from backprompt_db.store.lmdb import LmdbStore
from backprompt_db.store.lmdb_meta import newest_meta
from backprompt_db.store.records import record_key, records, xxh3_128
from tests.support.store_contract import data, key

SIZES = [300, 500, 700, 1500, 5500, 26000]


def steps(seed: int) -> Iterator[tuple[set[int], dict[int, int]]]:
    """Which blobs to delete, and which to put and how large."""
    dice, stored = random.Random(seed), set[int]()
    for _ in range(60):
        if stored and dice.random() < 0.4:
            gone = set(dice.sample(sorted(stored), dice.randint(1, min(len(stored), 9))))
            stored -= gone
            yield gone, {}
        else:
            new = {dice.randrange(60): dice.choice(SIZES) for _ in range(dice.randint(1, 4))}
            new = {number: size for number, size in new.items() if number not in stored}
            stored |= new.keys()
            yield set(), new


def missing_nbytes(directory: Path) -> int:
    """By how much the file is shorter than all pages that it counts."""
    meta = newest_meta(directory / "data.mdb")
    assert meta is not None
    return (meta.last_page + 1) * meta.page_nbytes - (directory / "data.mdb").stat().st_size


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[Key, bytes]]:
    """A file that LMDB has left so, and what is in it."""
    for seed in range(200):
        directory = tmp_path_factory.mktemp("short") / "store"
        LmdbStore.create(directory).close()
        content: dict[Key, bytes] = {}
        with lmdb.open(str(directory), map_size=1 << 30, lib_version=LMDB_GENERATION) as env:
            for gone, new in steps(seed):
                with env.begin(write=True) as transaction:
                    for number in gone:
                        transaction.delete(record_key(key(number)))
                        del content[key(number)]
                    for number, size in new.items():
                        content[key(number)] = data(size, number)
                        for record in records(key(number), [content[key(number)]], xxh3_128):
                            transaction.put(*record)
                if missing_nbytes(directory) > 0:
                    return (directory / "data.mdb").read_bytes(), content
    raise AssertionError("LMDB writes all pages that it counts by now: then nothing of this is needed")


@pytest.fixture
def directory(tmp_path: Path, short: tuple[bytes, dict[Key, bytes]]) -> Path:
    LmdbStore.create(tmp_path / "store").close()
    (tmp_path / "store" / "data.mdb").write_bytes(short[0])
    (tmp_path / "store" / "lock.mdb").unlink()
    return tmp_path / "store"


@pytest.mark.exhaustive
@pytest.mark.parametrize("readonly", [False, True])
def test_it_is_opened_and_everything_in_it_is_found(
    directory: Path, short: tuple[bytes, dict[Key, bytes]], *, readonly: bool
) -> None:
    assert missing_nbytes(directory) > 0
    with contextlib.closing(LmdbStore(directory, readonly=readonly)) as store:
        assert {each: bytes(store.get(each) or b"") for each, _ in store.keys()} == short[1]
        assert store.num_quarantined == 0


def test_the_next_one_who_writes_makes_it_whole(directory: Path, short: tuple[bytes, dict[Key, bytes]]) -> None:
    with contextlib.closing(LmdbStore(directory)) as store:
        store.put([Blob(key(1000), b"new")])
        assert missing_nbytes(directory) <= 0
        assert {each: bytes(store.get(each) or b"") for each, _ in store.keys()} == {**short[1], key(1000): b"new"}


def test_one_that_lacks_a_page_in_use_is_refused(directory: Path) -> None:
    size = (directory / "data.mdb").stat().st_size
    os.truncate(directory / "data.mdb", size - 8 * 4096)
    with pytest.raises(StoreCorrupt, match="is not a whole LMDB file"):
        LmdbStore(directory)


def test_no_deletion_of_ours_leaves_such_a_file(tmp_path: Path) -> None:
    for seed in range(12):
        with contextlib.closing(LmdbStore.create(tmp_path / str(seed))) as store:
            for gone, new in steps(seed):
                store.delete(map(key, gone))
                store.put([Blob(key(number), data(size, number)) for number, size in new.items()])
                assert missing_nbytes(store.directory) <= 0
