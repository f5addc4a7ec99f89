"""Many processes and threads on one database: writers of one key, readers of what is being deleted, races to open."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import backprompt_db as bp
from backprompt_db.operations.verify import verify
from backprompt_db.store.contract import Blob
from backprompt_db.store.lmdb import LmdbStore
from tests.support.faults import (
    TOGETHER,
    assert_reads_back,
    contents,
    new_parts,
    put_prompts,
    run_together,
    segments,
    wanted_of,
)

assert sys.platform != "win32"

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

WRITE_SAME = (
    TOGETHER
    + """
with bp.open(place) as db:
    for number in range(8):
        put_prompts(db, [number])
        assert_reads_back(db, [number])
    print(db.counters.num_stored, flush=True)
"""
)


def test_writers_of_the_same_values_share_them(tmp_path: Path) -> None:
    words = run_together(*[WRITE_SAME] * 4, place=tmp_path / "db")
    with bp.open(tmp_path / "db") as db:
        assert_reads_back(db, range(8))
        # Of each part one writer was the first.
        num_parts = sum(1 for _ in db.store.keys())
        assert sum(int(word) for (word,) in words) == num_parts == 3 * (3 + 8 + 8)
        assert verify(db).is_clean


WRITE_DIFFERENT = (
    TOGETHER
    + """
from hashlib import sha256
import numpy as np
from backprompt_db.prompt.representation import Array
db = bp.open(place, memory_nbytes=0)
wanted, own = {}, Array.from_numpy(np.full((1, 1, 4000, 50), os.getpid(), dtype=np.float32))
for number in range(8):
    (segment,) = segments(f'the same {number}')
    (key,) = keys_of([segment], [Part.KV])
    wanted[key.address] = [Part.KV]
    db.put([NewPart(key, {'keys': own, 'values': own}, origin_of(segment))])
    db.flush()
found = db.fetch(wanted)
assert len(found) == 8 and db.counters.num_quarantined == 0
winners = [int(arrays['keys'].numpy()[0, 0, 0, 0]) for arrays in found.values()]
assert all((arrays[name].numpy() == winner).all() for winner, arrays in zip(winners, found.values())
           for name in ('keys', 'values'))
print(os.getpid(), db.counters.num_stored, *winners)
"""
)


def test_of_writers_of_different_values_the_first_one_wins_and_all_read_the_same(tmp_path: Path) -> None:
    words = run_together(*[WRITE_DIFFERENT] * 4, place=tmp_path / "db")
    pids, nums_stored, *winners = zip(*words, strict=True)
    assert all(len(set(winner)) == 1 for winner in winners)
    assert [sum(winner[0] == pid for winner in winners) for pid in pids] == [int(num) for num in nums_stored]


READ = (
    TOGETHER
    + """
db = bp.open(place, memory_nbytes=0)
num_wrong, end = 0, time.monotonic() + 1.5
while time.monotonic() < end:
    for number in range(6):
        num_wrong += len(wrong(db.fetch(wanted_of(prompt(number)))))
c = db.counters
print(num_wrong, c.num_quarantined, c.num_read_failures, c.num_hits > 0, c.num_misses > 0)
"""
)
DELETE = (
    TOGETHER
    + """
db = bp.open(place)
end, num_deleted = time.monotonic() + 1.5, 0
while time.monotonic() < end:
    for number in range(6):
        num_deleted += db.store.delete(keys_of(prompt(number)[1:]))
print(num_deleted > 0)
"""
)
WRITE_AGAIN = (
    TOGETHER
    + """
db = bp.open(place)
end, turn = time.monotonic() + 1.5, 0
while time.monotonic() < end:
    for number in random.sample(range(6), 6):
        others = segments(f'{turn} {number}')
        db.put(new_parts([*prompt(number), *others]))
        db.flush()
        db.store.delete(keys_of(others))
    turn += 1
print(db.counters.num_write_failures, db.counters.num_stored > 0)
"""
)


def test_a_reader_never_sees_a_wrong_value_while_others_delete_and_write_over_the_pages(tmp_path: Path) -> None:
    with bp.open(tmp_path / "db") as db:
        put_prompts(db, range(6))
    reader, deleter, writer = run_together(READ, DELETE, "import random\n" + WRITE_AGAIN, place=tmp_path / "db")
    assert reader == ["0", "0", "0", "True", "True"]
    assert (deleter, writer) == (["True"], ["0", "True"])


OPEN_AND_CLOSE = (
    TOGETHER
    + """
def work(number):
    for turn in range(60):
        with bp.open(place) as db:
            assert all(map(db.has, keys_of(prompt(0))))
            if turn % 10 == number:
                assert_reads_back(db, [0])
            if turn % 20 == number:
                put_prompts(db, [turn], author=f'{os.getpid()} {number}')
    done.append(number)

done = []
threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(os.getpid(), len(done))
"""
)


@pytest.mark.exhaustive
def test_a_thousand_openings_and_closings_at_once_disturb_nobody(tmp_path: Path) -> None:
    with bp.open(tmp_path / "db") as db:
        put_prompts(db, [0])
    words = run_together(*[OPEN_AND_CLOSE] * 4, place=tmp_path / "db")
    assert [num for _, num in words] == ["4"] * 4
    with bp.open(tmp_path / "db") as db:
        for pid, _ in words:
            for number in range(4):
                assert_reads_back(db, [number, 20 + number, 40 + number], author=f"{pid} {number}")
        assert verify(db).is_clean


def test_one_process_may_open_a_directory_twice_also_through_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "db")
    with bp.open(tmp_path / "db") as one, bp.open(tmp_path / "db") as two, bp.open(tmp_path / "link") as three:
        for number, db in enumerate((one, two, three)):
            put_prompts(db, [number])
        for db in (one, two, three):
            assert_reads_back(db, [0, 1, 2])
        one.close()
        put_prompts(three, [3])
        assert_reads_back(two, [0, 1, 2, 3])
    with bp.open(tmp_path / "link") as db:
        assert_reads_back(db, [0, 1, 2, 3])
        assert verify(db).is_clean


def test_tensors_stay_valid_after_overwriting_eviction_compaction_closing_and_forks(tmp_path: Path) -> None:
    some = segments("Kept.", " Kept, too.", " And this.", " Or that.")
    with bp.open(tmp_path / "db", memory_nbytes=0) as db:
        db.put(new_parts(some))
        db.flush()
        found = db.fetch(wanted_of(some))
        tensors = {key: {name: array.torch() for name, array in arrays.items()} for key, arrays in found.items()}
        assert db.counters.num_disk_hits == len(tensors) == 12
        db.store.delete(found)
        db.store.put([Blob(key, bytes(100_000)) for key in found])
        db.store.delete(found)
        put_prompts(db, range(6))
        assert isinstance(db.store, LmdbStore)
        db.store.compact()
        put_prompts(db, range(6, 12))
    if (pid := os.fork()) == 0:
        try:
            os._exit(0 if are_right(tensors) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for each in tensors.values():
        for tensor in each.values():
            tensor.zero_()  # they may be written to


def are_right(tensors: dict[Any, dict[str, torch.Tensor]]) -> bool:
    return all(
        tensor.numpy().tobytes() == bytes(contents(key)[name].data)
        for key, each in tensors.items()
        for name, tensor in each.items()
    )
