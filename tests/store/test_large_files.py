"""Files too large to be checked when they are opened: each page is checked before LMDB walks it.

Every damaged copy is used in a process of its own, which ends with errors or right values, and never by a signal.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from backprompt_db.errors import StoreCorrupt, StoreError
from backprompt_db.prompt.ids import Address
from backprompt_db.prompt.representation import Part
from backprompt_db.store import lmdb_pages
from backprompt_db.store.contract import Blob, Key
from backprompt_db.store.lmdb import LmdbStore
from tests.conftest import cases
from tests.support.damage import HEADER_NBYTES, PAGE_NBYTES, in_a_fork, newest_meta, structure
from tests.support.store_contract import data, read

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

NUMBERS = range(1500)
SIZES = [40, 40, 200, 700, 1500, 3000]
GONE = NUMBERS[::5]
KEPT = [number for number in NUMBERS if number % 5]


def key(number: int) -> Key:
    """Keys in no order, as digests are."""
    return Key(Address(hashlib.sha256(number.to_bytes(4, "big")).digest()), Part.SCORES)


def value(number: int) -> bytes:
    return data(2_500_000 if number % 500 == 1 else SIZES[number % len(SIZES)], number)


def put(store: LmdbStore, numbers: Sequence[int]) -> None:
    store.put([Blob(key(number), value(number)) for number in numbers])


def is_found(store: LmdbStore, number: int) -> bool:
    return read(store, key(number)) == value(number)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a few levels, with pages that are free."""
    directory = tmp_path_factory.mktemp("large") / "store"
    with closing(LmdbStore.create(directory)) as store:
        put(store, NUMBERS)
        store.delete(map(key, GONE))
    return directory


@pytest.fixture
def directory(master: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lmdb_pages, "_MAX_RECORDS", 0)
    return shutil.copytree(master, tmp_path / "store")


def use(directory: Path, numbers: Sequence[int], dice: random.Random) -> dict[str, int]:
    """Read, list, put and delete; return what came of it."""
    seen = {"found": 0, "missed": 0, "wrong": 0, "refused": 0}

    def attempt(work: Callable[[], object]) -> None:
        try:
            work()
        except StoreCorrupt:
            seen["refused"] += 1

    def look(store: LmdbStore, number: int) -> None:
        blob = read(store, key(number))
        seen["missed" if blob is None else "found" if blob == value(number) else "wrong"] += 1

    with closing(LmdbStore(directory)) as store:
        for number in dice.sample(numbers, 100):
            attempt(partial(look, store, number))
        attempt(lambda: list(store.keys()))
        attempt(lambda: put(store, range(5000, 5040)))
        attempt(lambda: store.delete(map(key, dice.sample(numbers, 150))))
        attempt(lambda: store.delete(map(key, sorted(numbers, key=key)[:300])))
        if dice.random() < 0.3:
            attempt(store.compact)
    return seen


def refuses_or_uses(directory: Path, numbers: Sequence[int], dice: random.Random) -> Any:
    try:
        return use(directory, numbers, dice)
    except StoreCorrupt:
        return {"wrong": 0, "refused": 1}


def _flip_bits(content: bytearray, dice: random.Random) -> None:
    for _ in range(dice.choice([1, 20, 200])):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def _flip_what_lmdb_trusts(content: bytearray, dice: random.Random) -> None:
    places = [positions for positions in structure(bytes(content)).values() if positions]
    for _ in range(dice.choice([1, 3, 20])):
        content[dice.choice(dice.choice(places))] ^= 1 << dice.randrange(8)


def _tree_page(content: bytearray, dice: random.Random) -> int:
    places = structure(bytes(content))
    return dice.choice(places["leaf headers"] + places["branch headers"] * 5) // PAGE_NBYTES * PAGE_NBYTES


def _zero_a_page(content: bytearray, dice: random.Random) -> None:
    begin = _tree_page(content, dice)
    content[begin : begin + PAGE_NBYTES] = bytes(PAGE_NBYTES)


def _zero_64_kib(content: bytearray, dice: random.Random) -> None:
    begin = min(_tree_page(content, dice), len(content) - 16 * PAGE_NBYTES)
    content[begin : begin + 16 * PAGE_NBYTES] = bytes(16 * PAGE_NBYTES)


def _put_another_page_there(content: bytearray, dice: random.Random) -> None:
    begin, other = _tree_page(content, dice), _tree_page(content, dice)
    skipped = dice.choice([0, 8])  # the number with which every page begins
    content[begin + skipped : begin + PAGE_NBYTES] = content[other + skipped : other + PAGE_NBYTES]


def _garble_a_page(content: bytearray, dice: random.Random) -> None:
    begin = _tree_page(content, dice) + dice.choice([0, 16, 64])
    content[begin : begin + 64] = dice.randbytes(64)


DAMAGES = {
    "flipped bits": _flip_bits,
    "flipped bits of what LMDB trusts": _flip_what_lmdb_trusts,
    "a page of zeros": _zero_a_page,
    "64 KiB of zeros": _zero_64_kib,
    "a page in the place of another": _put_another_page_there,
    "garbage in a page": _garble_a_page,
}


def results(directory: Path, numbers: Sequence[int], damage: str, *, num_damages: int) -> list[Any]:
    """What comes of using copies that are damaged; the name of a signal where it ended the process."""
    content, dice, found = (directory / "data.mdb").read_bytes(), random.Random(damage), []
    for _ in range(num_damages):
        damaged = bytearray(content)
        DAMAGES[damage](damaged, dice)
        (directory / "data.mdb").write_bytes(damaged)
        found.append(in_a_fork(lambda: refuses_or_uses(directory, numbers, dice)))
    return found


@pytest.mark.parametrize("damage", cases(DAMAGES, by_default=list(DAMAGES)[1::2]))
def test_damage_is_an_error_or_a_miss_and_kills_nobody(directory: Path, damage: str) -> None:
    found = results(directory, KEPT, damage, num_damages=4)
    assert [each for each in found if isinstance(each, str) or each["wrong"]] == []
    assert any(each["refused"] for each in found)


@pytest.mark.exhaustive
@pytest.mark.parametrize("damage", list(DAMAGES)[1:])
def test_damage_to_a_file_that_is_truly_large_kills_nobody(tmp_path: Path, damage: str) -> None:
    numbers = range(10_000, 18_000)
    with closing(LmdbStore.create(tmp_path / "store")) as store:
        put(store, [number for number in numbers if number % 500 != 1])
    found = results(tmp_path / "store", numbers, damage, num_damages=4)
    assert [each for each in found if isinstance(each, str) or each["wrong"]] == []
    assert any(each["refused"] for each in found)


def test_without_damage_nothing_is_refused(directory: Path) -> None:
    seen = use(directory, KEPT, random.Random(0))
    assert seen == {"found": 100, "missed": 0, "wrong": 0, "refused": 0}


def test_a_list_of_free_pages_that_is_wrong_stops_writers_alone(directory: Path) -> None:
    content = bytearray((directory / "data.mdb").read_bytes())
    begin = _first_free_list(bytes(content))
    content[begin + 8 : begin + 16] = content[begin + 16 : begin + 24]
    (directory / "data.mdb").write_bytes(content)
    with closing(LmdbStore(directory)) as store:
        assert [number for number in KEPT[:100] if read(store, key(number)) != value(number)] == []
        with pytest.raises(StoreCorrupt, match="list of free pages"):
            put(store, [5000])
        with pytest.raises(StoreCorrupt, match="list of free pages"):
            store.delete([key(KEPT[0])])


def _first_free_list(content: bytes) -> int:
    """Where the first list is, which begins with how many pages it names."""
    (root,) = struct.unpack_from("=Q", content, newest_meta(content) + 80)
    (node,) = struct.unpack_from("=H", content, root * PAGE_NBYTES + HEADER_NBYTES)
    value_begin = root * PAGE_NBYTES + node + 16
    (is_elsewhere,) = struct.unpack_from("=H", content, value_begin - 12)
    (number,) = struct.unpack_from("=Q", content, value_begin)
    return int(number) * PAGE_NBYTES + HEADER_NBYTES if is_elsewhere else value_begin


@pytest.mark.parametrize("num_pages", [0, 1, 2, 5, 300])
def test_a_file_that_is_cut_off_while_it_is_open_kills_nobody(directory: Path, num_pages: int) -> None:
    def cut_off_and_use() -> Any:
        with closing(LmdbStore(directory)) as store:
            assert is_found(store, KEPT[0])
            os.truncate(directory / "data.mdb", num_pages * PAGE_NBYTES)
            found = [_outcome(partial(is_found, store, number)) for number in KEPT[:300]]
            writes = [_outcome(lambda: put(store, [5000])), _outcome(lambda: store.delete([key(KEPT[0])]))]
            return [sorted(set(found)), writes]

    found, writes = in_a_fork(cut_off_and_use)
    assert "StoreCorrupt" in found
    assert set(found) <= {"StoreCorrupt", "True"}
    assert writes == ["StoreCorrupt", "StoreCorrupt"]


def _outcome(work: Callable[[], object]) -> str:
    try:
        return str(work())
    except StoreError as error:
        return type(error).__name__


def test_what_was_copied_over_while_it_was_open_is_not_written_to(directory: Path) -> None:
    backup = (directory / "data.mdb").read_bytes()
    with closing(LmdbStore(directory)) as store:
        put(store, range(5000, 5010))
        put(store, range(5010, 5020))
        with (directory / "data.mdb").open("r+b") as file:
            file.write(backup)
        with pytest.raises(StoreCorrupt, match="copied over") as caught:
            put(store, [5020])
        assert "`mv`" in (caught.value.hint or "")
        assert read(store, key(KEPT[0])) in (None, value(KEPT[0]))
    assert (directory / "data.mdb").read_bytes()[: len(backup)] == backup
