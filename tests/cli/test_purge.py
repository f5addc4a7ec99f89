"""`purge` on the command line: what it selects, beside others, and killed in between."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

import backprompt_db as bp
from backprompt_db.catalog.catalog import Catalog
from backprompt_db.operations.verify import verify
from tests.support.cli import run, run_json
from tests.support.faults import address_of, child, contents, keys_of, next_line, run_to_its_end, segments
from tests.support.limits import assert_whole, kv_of, of_size, put, stored

assert sys.platform != "win32"

DEBTS = "Jane Doe has 4711 debts."
GONE = segments("A letter.", DEBTS, " An answer to her.")
STAYS = segments("A letter.", " Somebody else.", " Another answer.")
LARGE = of_size(4500)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    with bp.open(tmp_path / "db") as db:
        for some in (GONE, STAYS, LARGE):
            put(db, some)
    return tmp_path / "db"


def traces(place: Path) -> list[str]:
    """The files with anything of what shall be gone: texts, and bytes of what was computed from them."""
    wanted = [segment.string.encode() for segment in GONE[1:]]
    for segment in GONE[1:]:
        for key in keys_of([segment]):
            wanted += [bytes(array.data)[:64] for array in contents(key).values() if array.nbytes >= 16]
    files = [path for path in place.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(content in path.read_bytes() for content in wanted)]


def assert_gone_and_the_rest_is_there(place: Path) -> None:
    assert traces(place) == []
    with bp.open(place, memory_nbytes=0) as db:
        assert stored(db) == set(keys_of([*STAYS, *LARGE]))
        assert_whole(db, [*STAYS, *LARGE])
        assert verify(db).is_clean
        assert db.catalog is not None
        assert db.catalog.evictions(map(address_of, GONE[1:])) == {}


def test_nothing_of_a_text_and_of_what_follows_it_is_left_and_the_rest_is(place: Path) -> None:
    assert len(traces(place)) == 2
    done = run_json("purge", "--db", place, "--contains", "Jane Doe", "--yes")
    assert done == {"num_representations": 2, "num_parts": 6}
    assert_gone_and_the_rest_is_there(place)
    result = run("purge", "--db", place, "--contains", "Jane Doe", "--yes")
    assert (result.exit_code, "nothing is selected" in result.stderr) == (2, True)


def test_what_was_evicted_before_leaves_no_trace_either(place: Path) -> None:
    assert run("evict", "--db", place, "--contains", "to her").exit_code == 0
    assert run("purge", "--db", place, "--contains", "Jane Doe", "--yes").exit_code == 0
    assert traces(place) == []


def test_what_is_pinned_is_purged_too(place: Path) -> None:
    assert run("pin", "--db", place, "--contains", "to her").exit_code == 0
    assert run("purge", "--db", place, "--contains", "Jane Doe", "--yes").exit_code == 0
    assert_gone_and_the_rest_is_there(place)


def test_a_label_or_an_address_selects_it(place: Path) -> None:
    assert run("label", "jane", "--db", place, "--contains", "to her").exit_code == 0
    assert run_json("purge", "--db", place, "--label", "jane", "--yes")["num_representations"] == 1
    assert run_json("purge", "--db", place, "--address", address_of(GONE[1]).hex()[:20], "--yes") == {
        "num_representations": 1,
        "num_parts": 3,
    }
    assert_gone_and_the_rest_is_there(place)


def test_a_namespace_selects_all_of_it(place: Path) -> None:
    theirs = segments("A letter.", DEBTS, namespace="tenant")
    with bp.open(place, namespace="tenant") as db:
        put(db, theirs)
    assert run_json("purge", "--db", place, "--namespace", "tenant", "--yes")["num_parts"] == 6
    with bp.open(place) as db:
        assert stored(db).isdisjoint(keys_of(theirs))
        assert_whole(db, [*GONE, *STAYS, *LARGE])
        assert verify(db).is_clean


def test_without_a_selection_nothing_goes(place: Path) -> None:
    result = run("purge", "--db", place, "--yes")
    assert (result.exit_code, "nothing says what to purge" in result.stderr) == (2, True)
    assert len(traces(place)) == 2


PURGE = """
from backprompt_db.catalog.records import Selection
from backprompt_db.operations.purge import purge
with bp.open(place) as db:
    purge(db, Selection(text_contains='Jane Doe'))
"""


@pytest.mark.parametrize("point", ["store.delete.inside", "store.compact.copied", "store.compact.renamed"])
def test_one_that_is_killed_anywhere_can_be_repeated(place: Path, point: str) -> None:
    code, _, log = run_to_its_end(PURGE, place, failpoint=f"{point}=kill@1")
    assert code == -signal.SIGKILL, log
    assert traces(place) != []
    assert run("purge", "--db", place, "--contains", "Jane Doe", "--yes").exit_code == 0
    assert_gone_and_the_rest_is_there(place)
    assert [path.name for path in (place / "store").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("point", ["store.compact.copied", "store.compact.renamed"])
def test_one_that_fails_in_between_is_repeated_by_the_same_process(place: Path, point: str) -> None:
    script = PURGE.replace("with", "try:\n  with", 1).replace("    purge", "      purge")
    script += f"except RuntimeError as error: print(error)\n{PURGE}print('done')"
    code, words, log = run_to_its_end(script, place, failpoint=f"{point}=raise@1")
    assert (code, words) == (0, ["failpoint", point, "done"]), log
    assert_gone_and_the_rest_is_there(place)


def test_two_processes_that_have_it_open_meanwhile_go_on(place: Path) -> None:
    reading = (
        "db = bp.open(place, memory_nbytes=0, MODE)\n"
        "kept = segments('A letter.', ' Somebody else.', ' Another answer.')\n"
        "def look():\n    found = db.fetch(wanted_of(kept))\n    assert len(found) == 9 and wrong(found) == []\n"
        "look(); print('open', flush=True)\n"
        "for line in sys.stdin:\n    look()\n    print(len(db.fetch(wanted_of(segments(*line.rstrip().split('|'))))),"
        " db.counters.num_read_failures, db.counters.num_quarantined, flush=True)\n"
        "    if not db.readonly: put_prompts(db, [3]); assert db.counters.num_write_failures == 0\n"
    )
    line = "|".join(segment.string for segment in GONE)
    with (
        child(reading.replace("MODE", "mode='r'"), place) as reader,
        child(reading.replace("MODE", "mode='a'"), place) as writer,
    ):
        for process in (reader, writer):
            assert next_line(process) == "open"
        assert run("purge", "--db", place, "--contains", "Jane Doe", "--yes").exit_code == 0
        assert traces(place) == []
        for process in (reader, writer):
            out, err = process.communicate(line + "\n", timeout=300)
            assert (out, process.returncode) == ("3 0 0\n", 0), err
    assert traces(place) == []
    with bp.open(place) as db:
        assert verify(db).is_clean
        assert kv_of(STAYS[2]) in stored(db)


def test_it_waits_for_one_who_is_writing(place: Path) -> None:
    script = "db = bp.open(place)\ndb.put(new_parts(segments('A letter.', ' More.')[1:]))\nprint('put', flush=True)\n"
    with child(script, place, failpoint="store.put.before=sleep:1@1") as writer:
        assert next_line(writer) == "put"
        while not list((place / "pending").iterdir()):
            time.sleep(0.01)
        assert run("purge", "--db", place, "--contains", "Jane Doe", "--yes").exit_code == 0
        assert writer.wait(300) == 0
    assert traces(place) == []
    with Catalog.open(place / "catalog.sqlite") as catalog, bp.open(place, memory_nbytes=0) as db:
        assert set(catalog.keys()) == stored(db) == set(keys_of([*STAYS, *LARGE, *segments("A letter.", " More.")]))
        assert_whole(db, segments("A letter.", " More."))


def test_copies_of_damaged_catalogs_go_too(place: Path) -> None:
    whole = (place / "catalog.sqlite").read_bytes()
    (place / "catalog.sqlite").write_bytes(whole[:4096] + b"\xff" * 4096 + whole[8192:])
    assert run("reindex", "--db", place).exit_code == 0
    assert len(traces(place)) > 2, "there are copies"
    assert run("purge", "--db", place, "--contains", "Jane Doe", "--yes").exit_code == 0
    assert_gone_and_the_rest_is_there(place)
    assert list(place.glob("*.damaged*")) == []
