"""Damaged, foreign and replaced files: what was stored is read exactly, or is missing, or opening is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest

import backprompt_db as bp
from backprompt_db.errors import StoreCorrupt
from backprompt_db.operations.verify import Checks, verify
from backprompt_db.prompt.representation import Part
from backprompt_db.store import lmdb_pages
from backprompt_db.store.lmdb_errors import store_errors
from backprompt_db.store.records import CHUNK_NBYTES, DIGEST_NBYTES
from tests.conftest import cases
from tests.support.damage import (
    MENDED,
    NUM_PARTS,
    NUMBERS,
    OLDER_META,
    PAGE_NBYTES,
    STRUCTURES,
    Use,
    fill,
    flip,
    newest_meta,
    occurrences,
    record,
    some_key,
    tree,
    use,
    uses_after_flips,
)
from tests.support.faults import NUMS_TOKENS, assert_survived, child, next_line, put_prompts

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole database, of which others are copies."""
    place = tmp_path_factory.mktemp("master") / "db"
    fill(place)
    return place


@pytest.fixture
def place(master: Path, tmp_path: Path) -> Path:
    """A copy of a whole database, that nobody has open."""
    return shutil.copytree(master, tmp_path / "db")


@pytest.fixture
def data(place: Path) -> Path:
    return place / "store" / "data.mdb"


def assert_mended_by_deleting(place: Path) -> None:
    """What the hint says: delete the directory, and it will be computed again."""
    shutil.rmtree(place)
    assert use(place) == MENDED
    assert use(place).is_whole


def test_a_database_that_nobody_damaged_is_whole(place: Path) -> None:
    assert use(place).is_whole


LONG, SHORT = max(NUMS_TOKENS), 20
SPOTS = {
    "number of chunks": (LONG, 0, 3),
    "length of the blob": (LONG, 0, 11),
    "digest of a chunk": (LONG, 0, 12 + 5),
    "digest of a head": (LONG, 0, -DIGEST_NBYTES // 2),
    "first chunk": (LONG, 1, CHUNK_NBYTES // 2),
    "last chunk": (LONG, 2, -1),
    "length of a blob in one record": (SHORT, 0, 4),
    "blob in one record": (SHORT, 0, 700),
    "digest of a blob in one record": (SHORT, 0, -1),
}


@pytest.mark.parametrize("spot", SPOTS)
def test_a_flipped_bit_in_a_value_costs_this_part_alone_and_once(place: Path, data: Path, spot: str) -> None:
    num_tokens, chunk, offset = SPOTS[spot]
    value = record(place, some_key(Part.KV, num_tokens), chunk)
    found = list(occurrences(data.read_bytes(), value[-5000:]))
    assert found
    flip(data, [at - max(0, len(value) - 5000) + offset % len(value) for at in found], bit=4)
    assert use(place) == Use(num_found=NUM_PARTS - 1, num_quarantined=1, num_found_after=NUM_PARTS)
    assert use(place).is_whole


@pytest.mark.parametrize("what", cases(STRUCTURES, by_default=STRUCTURES[::2]))
def test_a_flipped_bit_in_what_lmdb_trusts_is_refused_or_costs_what_it_hides(
    master: Path, tmp_path: Path, what: str
) -> None:
    uses = uses_after_flips(master, tmp_path, what, num_flips=12)
    refused = [each for each in uses if each.refused]
    assert {each.refused for each in refused} == {"StoreCorrupt"} or (what == OLDER_META and not refused)
    opened = [each for each in uses if not each.refused]
    assert all((each.died_of, each.num_wrong) == ("", 0) for each in opened)
    # What is hidden is stored again, or nothing is written where the way there is damaged, and reading goes on.
    assert all(each.num_found_after == (each.num_found if each.num_write_failures else NUM_PARTS) for each in opened)


META_FIELDS = {"magic": 16, "version": 20, "page size": 40, "root": 128, "last page": 136}


@pytest.mark.parametrize("field", cases(META_FIELDS, by_default=["magic", "root"]))
def test_damage_to_both_meta_pages_is_refused(place: Path, data: Path, field: str) -> None:
    flip(data, [META_FIELDS[field], PAGE_NBYTES + META_FIELDS[field]], bit=3)
    assert use(place) == Use(refused="StoreCorrupt")
    assert_mended_by_deleting(place)


def test_without_the_newest_meta_page_the_state_before_is_not_taken_for_it(place: Path, data: Path) -> None:
    flip(data, [newest_meta(data.read_bytes()) + META_FIELDS["magic"]], bit=0)
    assert use(place) == Use(refused="StoreCorrupt")


@pytest.mark.parametrize("is_in_leaf", [True, False])
def test_in_a_file_too_large_to_be_checked_a_page_that_is_not_there_is_a_miss(
    place: Path, data: Path, monkeypatch: pytest.MonkeyPatch, *, is_in_leaf: bool
) -> None:
    monkeypatch.setattr(lmdb_pages, "_MAX_RECORDS", 0)
    nodes = [node for page in tree(data.read_bytes()) if page.is_leaf is is_in_leaf for node in page.nodes if node.page]
    first = nodes[0].position + (8 + nodes[0].num_key_bytes if is_in_leaf else 0)
    flip(data, [first + 3], bit=6)
    found = use(place)
    assert (found.died_of, found.refused, found.num_wrong, found.num_quarantined) == ("", "", 0, 0)
    assert found.num_read_failures == NUM_PARTS - found.num_found > 0
    assert found.num_found > NUM_PARTS / 2
    with bp.open(place) as db:
        assert "damaged" in (verify(db, checks=Checks(share=0)).store_problem or "")
    monkeypatch.undo()
    assert use(place) == Use(refused="StoreCorrupt")


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 5000, bytes(8192), os.urandom(200_000)])
def test_the_lock_file_is_made_again(place: Path, content: bytes | None) -> None:
    lock = place / "store" / "lock.mdb"
    lock.unlink()
    if content is not None:
        lock.write_bytes(content)
    assert use(place).is_whole
    assert_survived(place, NUMBERS)


def _truncate(data: Path, nbytes: int) -> None:
    os.truncate(data, nbytes)


def _of_the_other_generation(data: Path) -> None:
    data.unlink()
    (data.parent / "lock.mdb").unlink()
    with lmdb.Environment(str(data.parent), lib_version=1) as env, env.begin(write=True) as transaction:
        transaction.put(b"a", b"b")


BAD_FILES: dict[str, Callable[[Path], object]] = {
    "empty": lambda data: _truncate(data, 0),
    "one page": lambda data: _truncate(data, PAGE_NBYTES),
    "half": lambda data: _truncate(data, data.stat().st_size // 2),
    "without its last page": lambda data: _truncate(data, data.stat().st_size - PAGE_NBYTES),
    "missing": Path.unlink,
    "garbage": lambda data: data.write_bytes(random.Random(0).randbytes(100_000)),
    "another format": lambda data: data.write_bytes(b"SQLite format 3\0" * 1000),
    "of the other generation": _of_the_other_generation,
}


@pytest.mark.parametrize("state", BAD_FILES)
def test_a_file_that_is_not_whole_is_refused_until_it_is_deleted(place: Path, data: Path, state: str) -> None:
    BAD_FILES[state](data)
    assert use(place) == Use(refused="StoreCorrupt")
    assert_mended_by_deleting(place)


def test_records_of_somebody_else_are_neither_found_nor_lost(place: Path, data: Path) -> None:
    data.unlink()
    (data.parent / "lock.mdb").unlink()
    with lmdb.Environment(str(data.parent), lib_version=0) as env, env.begin(write=True) as transaction:
        for number in range(100):
            transaction.put(str(number).encode(), b"theirs")
    assert use(place) == MENDED
    assert use(place).is_whole
    with lmdb.Environment(str(data.parent), lib_version=0) as env, env.begin() as transaction:
        assert transaction.get(b"99") == b"theirs"


GO_ON = """
import json
from tests.support.damage import *
db = bp.open(place, memory_nbytes=0)
put_prompts(db, [100])
print('ready', flush=True)
for line in sys.stdin:
    num_found, num_wrong = look(db)
    before = db.counters
    failed = ''
    try:
        put_prompts(db, [int(line)], author='one who goes on')
    except bp.BackpromptError as error:
        failed = type(error).__name__
    c = db.counters
    print(json.dumps([
        num_found, num_wrong, failed, c.num_stored > before.num_stored,
        c.num_write_failures > before.num_write_failures, c.num_read_failures, c.num_quarantined
    ]), flush=True)
"""


def _another(place: Path, scratch: Path) -> None:
    """Another database's file, renamed over this one's."""
    with bp.open(scratch / "other") as db:
        put_prompts(db, [7])
    (scratch / "other" / "store" / "data.mdb").replace(place / "store" / "data.mdb")


def _made_again(place: Path, _: Path) -> None:
    shutil.rmtree(place)
    fill(place)


def _restored(place: Path, scratch: Path) -> None:
    (scratch / "backup").replace(place / "store" / "data.mdb")


def _gone(place: Path, _: Path) -> None:
    shutil.rmtree(place)


REPLACEMENTS = {"another": _another, "made again": _made_again, "an older backup": _restored, "nothing": _gone}


@pytest.mark.parametrize("by", cases(REPLACEMENTS, by_default=["another", "nothing"]))
def test_who_has_files_open_that_are_replaced_reads_on_and_writes_nowhere(place: Path, tmp_path: Path, by: str) -> None:
    shutil.copy(place / "store" / "data.mdb", tmp_path / "backup")
    with child(GO_ON, place) as process:
        assert next_line(process) == "ready"
        assert _say(process, 1) == [NUM_PARTS, 0, "", True, False, 0, 0]
        REPLACEMENTS[by](place, tmp_path)
        for number in (2, 3):
            assert _say(process, number) == [NUM_PARTS, 0, "StoreCorrupt", False, True, 0, 0]
        _, log = process.communicate(timeout=300)
        assert process.returncode == 0, log
    after = use(place)
    assert (after.num_found > 0) == (by != "nothing")
    expected = {"another": after.num_found, "made again": NUM_PARTS, "an older backup": NUM_PARTS, "nothing": 0}
    assert after == Use(num_found=expected[by], num_found_after=NUM_PARTS)
    assert use(place).is_whole


def test_who_has_a_file_open_that_is_overwritten_by_an_older_one_never_reads_what_is_wrong(
    place: Path, tmp_path: Path
) -> None:
    data = place / "store" / "data.mdb"
    backup = data.read_bytes()
    with child(GO_ON, place) as process:
        assert next_line(process) == "ready"
        assert _say(process, 1) == [NUM_PARTS, 0, "", True, False, 0, 0]
        with data.open("r+b") as file:
            file.write(backup)
        answers = [_say(process, number) for number in range(2, 12)]
        assert [num_wrong for _, num_wrong, *_ in answers] == [0] * 10
        assert answers[0][0] > 0
        _, log = process.communicate(timeout=300)
        assert process.returncode == 0, log
    after = use(place)
    assert (after.died_of, after.num_wrong) == ("", 0)
    assert after.refused or after.num_found_after == NUM_PARTS


def _say(process: subprocess.Popen[str], number: int) -> Any:
    """Let a process read and write once more."""
    assert process.stdin is not None
    process.stdin.write(f"{number}\n")
    process.stdin.flush()
    return json.loads(next_line(process))


def test_what_a_cursor_makes_of_an_error_of_lmdb_is_that_error(tmp_path: Path) -> None:
    with pytest.raises(StoreCorrupt, match="wrong type"), store_errors(tmp_path):
        raise SystemError("returned a result with an exception set") from lmdb.CorruptedError("wrong type")
    with pytest.raises(SystemError, match="something else"), store_errors(tmp_path):
        raise SystemError("something else")
