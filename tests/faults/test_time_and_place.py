"""Clocks that are wrong, environments that are poor, and names that are dangerous."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import backprompt_db as bp
from backprompt_db.catalog.records import Selection
from backprompt_db.operations.verify import verify
from backprompt_db.store.contract import Key
from tests.conftest import cases
from tests.support.cli import run as run_command
from tests.support.cli import run_json
from tests.support.faults import (
    address_of,
    assert_reads_back,
    assert_survived,
    dangling,
    keys_of,
    new_parts,
    prompt,
    put_prompts,
    run,
    segments,
    wanted_of,
    wrong,
)

DAY_SECONDS = 86_400

WITH_A_WRONG_CLOCK = """
real_time, real_time_ns = time.time, time.time_ns
time.time = lambda: real_time() + {seconds}
time.time_ns = lambda: real_time_ns() + {seconds} * 10**9
with bp.open(place) as db:
    assert_reads_back(db, [0])
    put_prompts(db, [1])
    assert_reads_back(db, [0, 1])
    assert db.catalog is not None
"""


@pytest.mark.parametrize("seconds", [-DAY_SECONDS, DAY_SECONDS])
def test_a_clock_that_is_a_day_off_costs_nothing(tmp_path: Path, seconds: int) -> None:
    with bp.open(tmp_path / "db") as db:
        put_prompts(db, [0])
    assert run(WITH_A_WRONG_CLOCK.format(seconds=seconds), tmp_path / "db")[1] == ""
    with bp.open(tmp_path / "db") as db:
        assert_reads_back(db, [0, 1])
        assert db.catalog is not None
        now = time.time()
        # What claims to come from the future is as good as anything, and goes when there is no other way.
        everything = db.catalog.eviction_order(10**12, at=now, grace_seconds=10)
        assert {candidate.address for candidate in everything} == {
            key.address for key in keys_of(prompt(0) + prompt(1))
        }
        expired = db.catalog.eviction_order(0, at=now, grace_seconds=0, ttl_seconds=DAY_SECONDS / 2)
        made_then = {key.address for key in keys_of(prompt(1))}
        assert {candidate.address for candidate in expired} == (made_then if seconds < 0 else set())
    assert run_json("stats", "--db", tmp_path / "db")["num_representations"] == 6
    assert_survived(tmp_path / "db", [0, 1])


def test_with_a_clock_that_stands_still_eviction_leaves_no_gaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e9)
    with bp.open(tmp_path / "db") as db:
        put_prompts(db, range(6))
        assert db.catalog is not None
        num_rounds = 0
        while candidates := db.catalog.eviction_order(1, at=1e9, grace_seconds=10):
            db.store.delete(Key(candidate.address, candidate.part) for candidate in candidates)
            db.catalog.evict([(candidate.address, candidate.part) for candidate in candidates], at=1e9)
            assert dangling(db) == []
            num_rounds += 1
        assert num_rounds == 3 * (3 + 6 + 6)
        put_prompts(db, range(6))
        assert_reads_back(db, range(6))
        assert verify(db).is_clean


POOR = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""Without these Python takes C for UTF-8."""

TEXTS = ("Größe: 10 €\n", " Δοκιμή 🦜", " 漢字")

IN_ANY_LANGUAGE = """
from tests.faults.test_time_and_place import TEXTS
with bp.open(place) as db:
    db.put(new_parts(segments(*TEXTS)))
    db.flush()
    print(db.counters.num_stored)
    found = db.fetch(wanted_of(segments(*TEXTS)))
    print(len(found), len(wrong(found)), [row.text for row in db.catalog.rows()] == list(reversed(TEXTS)))
"""


@pytest.mark.exhaustive
def test_without_a_locale_texts_and_paths_are_the_same(tmp_path: Path) -> None:
    place = tmp_path / "Größe €"
    assert run(IN_ANY_LANGUAGE, place, environment=POOR) == (["9", "9", "0", "True"], "")
    with bp.open(place) as db:
        found = db.fetch(wanted_of(segments(*TEXTS)))
        assert (len(found), wrong(found), db.counters.num_hits) == (9, [], 3)
    for command in (["stats"], ["ls"], ["ls", "--json"], ["verify"], ["reindex"]):
        done = run_process(*command, "--db", place, environment=POOR)
        assert (done.returncode, done.stderr) == (0, b""), command
    listed = run_process("ls", "--json", "--db", place, environment=POOR).stdout
    assert [row["text"] for row in json.loads(listed)] == list(reversed(TEXTS))


def run_process(*arguments: str | Path, environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-W", "error", "-m", "backprompt_db", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, check=False, timeout=300)


NAMES = [b"a b", b"quo'te\"", b";rm -rf *?#%00", b"\xff\xfe", b"-n", b"two\nlines"]


@pytest.mark.parametrize("name", cases(NAMES, by_default=[b"quo'te\"", b"\xff\xfe"]))
def test_any_name_of_a_directory_will_do_for_every_command(tmp_path: Path, name: bytes) -> None:
    place = tmp_path / os.fsdecode(name)
    with bp.open(place) as db:
        put_prompts(db, [0])
    for command in (["stats"], ["ls"], ["show", address_of(prompt(0)[2]).hex()], ["verify"], ["reindex"]):
        result = run_command(*command, "--db", place)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
    (place / "catalog.sqlite").unlink()
    assert run_command("reindex", "--db", place).exit_code == 0
    assert len(run_json("ls", "--db", place)) == 3
    assert_survived(place, [0])


DANGEROUS = [
    "'; DROP TABLE representations; --",
    '" OR 1=1; DELETE FROM segments; --',
    "100% _under_ \\ [a-z]*?",
    "); ATTACH DATABASE 'x' AS y; --",
    ":name ?1 @p $q",
    "a\u202eb \x1b[31m [bold]x[/bold]",
]


@pytest.mark.parametrize("danger", cases(DANGEROUS, by_default=DANGEROUS[::3]))
def test_what_looks_like_sql_is_text_in_every_place(tmp_path: Path, danger: str) -> None:
    place = tmp_path / "db"
    with bp.open(place) as db:
        put_prompts(db, [0])
    with bp.open(place, namespace=danger) as db:
        mine = segments(danger, danger, namespace=danger)
        db.put(new_parts(mine))
        db.flush()
        found = db.fetch(wanted_of(mine))
        assert (len(found), wrong(found)) == (6, [])
        assert db.catalog is not None
        db.catalog.label([address_of(mine[1])], danger)
        selections = [Selection(namespace=danger), Selection(label=danger), Selection(text_prefix=danger + danger)]
        assert [len(list(db.catalog.select(each))) for each in selections] == [2, 1, 1]
    assert [row["text"] for row in run_json("ls", "--db", place, "--namespace", danger)] == [danger] * 2
    assert [row["label"] for row in run_json("ls", "--db", place, "--label", danger)] == [danger]
    assert run_json("ls", "--db", place, "--label", danger + "%") == []
    assert run_json("stats", "--db", place, "--namespace", danger)["num_representations"] == 2
    assert run_json("stats", "--db", place)["num_representations"] == 5
    shown = run_json("show", address_of(mine[1]).hex(), "--db", place)
    assert danger in json.dumps(shown, ensure_ascii=False) or json.dumps(danger)[1:-1] in json.dumps(shown)
    assert_survived(place, [0])
