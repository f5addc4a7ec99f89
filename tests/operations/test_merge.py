"""Merging: what another database has and this one lacks comes over, whatever happens meanwhile."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import backprompt_db as bp
from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import Row
from backprompt_db.database.opening import open_existing
from backprompt_db.errors import FormatError, StoreReadOnly, UnsafeLocation
from backprompt_db.operations.bundles.transfer import merge
from backprompt_db.operations.reindex import reindex
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key
from tests.support.bundles import REQUESTS, SUBJECTS, chain, new_parts, path_of, run_prompts, stored
from tests.support.cli import run, run_json
from tests.support.database_files import copies_after
from tests.support.operations import catalog_of, flip_a_bit, read_blob, remove_blob, stored_keys, verified

assert sys.platform != "win32"

ROOT = Path(__file__).parents[2]

original, directory = copies_after(run_prompts)


@pytest.fixture
def other(open_db: Any) -> Path:
    """The directory of an empty database that is closed."""
    db = open_db()
    db.close()
    return Path(db.directory)


def made_of(place: Path, *texts: str) -> Path:
    """A closed database of a chain of segments."""
    with bp.open(place) as db:
        db.put(new_parts(chain(*texts)))
    return place


def rows(place: Path) -> dict[bytes, Row]:
    with Catalog.open(catalog_of(place), readonly=True) as catalog:
        return {row.address: row for row in catalog.rows()}


def digests(place: Path) -> dict[str, str]:
    """What every file holds, but for the table of LMDB's readers."""
    files = [path for path in place.rglob("*") if path.is_file() and path.name != "lock.mdb"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_was_lacking_is_answered_bit_for_bit_without_a_model_call(
    directory: Path, make_lm: Callable[..., bp.LanguageModel], open_db: Any
) -> None:
    lm = make_lm()
    own = lm(lm.text(SUBJECTS[0]) + REQUESTS[0], keep="all")
    lm.db.flush()
    computed, mine = lm.db.counters.num_computed_tokens, stored(lm.db)
    done = merge(lm.db, directory)
    assert (done.num_stored, done.num_orphaned, done.num_unusable) == (12, 0, 0)
    assert stored(lm.db).items() >= mine.items()
    theirs = make_lm(db=open_db(directory))
    for subject in SUBJECTS:
        for request in REQUESTS:
            here, there = (each(each.text(subject) + request) for each in (lm, theirs))
            assert here.num_computed_tokens == 0
            assert torch.equal(
                here.logits, own.logits if (subject, request) == (SUBJECTS[0], REQUESTS[0]) else there.logits
            )
    assert lm.db.counters.num_computed_tokens == computed
    assert verified(path_of(lm)).is_clean


def test_the_other_database_is_not_changed(directory: Path, other: Path) -> None:
    before = digests(directory)
    with open_existing(other) as db:
        merge(db, directory)
    assert digests(directory) == before


def test_twice_is_as_good_as_once(directory: Path, other: Path) -> None:
    with open_existing(other) as db:
        assert merge(db, directory).num_stored == 18
        before = rows(other)
        again = merge(db, directory)
        assert (again.num_stored, again.num_orphaned) == (0, 0)
    assert rows(other) == before


def test_with_itself_changes_nothing(directory: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(directory)
    with open_existing(directory) as db:
        before = stored(db)
        assert merge(db, directory).num_stored == merge(db, link).num_stored == 0
        assert stored(db) == before


def test_labels_pins_and_hits_come_along(directory: Path, other: Path) -> None:
    with Catalog.open(catalog_of(directory)) as catalog:
        first, second, *_ = sorted(row.address for row in catalog.rows())
        catalog.label([first, second], "theirs")
        catalog.pin([second])
        catalog.touch({first: 7}, at=1.0)
    theirs = rows(directory)
    with open_existing(other) as db:
        merge(db, directory)
        assert db.catalog is not None
        db.catalog.label([first], "mine")
        merge(db, directory)
    ours = rows(other)
    assert {address: row.num_hits for address, row in ours.items()} == {
        address: row.num_hits for address, row in theirs.items()
    }
    assert ours[first].num_hits >= 7
    assert (ours[first].label, ours[second].label) == ("mine", "theirs")
    assert [address for address, row in ours.items() if row.is_pinned] == [second]


def test_labels_and_pins_come_to_what_was_there(directory: Path, other: Path) -> None:
    with open_existing(other) as db:
        merge(db, directory)
    with Catalog.open(catalog_of(directory)) as catalog:
        every = [row.address for row in catalog.rows()]
        catalog.label(every, "later")
        catalog.pin(every)
    with open_existing(other) as db:
        assert merge(db, directory).num_stored == 0
    assert {(row.label, row.is_pinned) for row in rows(other).values()} == {("later", True)}


def test_names_come_along_but_no_verdict(directory: Path, other: Path) -> None:
    with open_existing(other) as db:
        merge(db, directory)
    with Catalog.open(catalog_of(directory)) as theirs, Catalog.open(catalog_of(other)) as ours:
        [model], [original] = ours.models(), theirs.models()
        assert (model.name, model.verdict, model.checked_with) == (original.name, "unchecked", None)
        assert original.verdict == "packs"
        assert ours.tokenizers() == theirs.tokenizers()


@pytest.mark.parametrize("damage", [None, b"no catalog" * 1000])
def test_parts_come_without_a_catalog(damage: bytes | None, directory: Path, other: Path) -> None:
    catalog_of(directory).unlink()
    if damage is not None:
        catalog_of(directory).write_bytes(damage)
    with open_existing(other) as db:
        done = merge(db, directory)
    assert done.num_stored == 18
    assert done.source_problem is not None
    assert verified(other).is_clean


def test_what_is_damaged_stays_where_it_is(directory: Path, other: Path) -> None:
    leaf = next(key for key in stored_keys(directory) if key.part is Part.LOGITS)
    flip_a_bit(directory, leaf)
    with open_existing(other) as db:
        done = merge(db, directory)
    assert (done.num_stored, done.num_unusable) == (17, 1)
    assert len(stored_keys(directory)) == 18
    assert leaf not in stored_keys(other)


def test_keys_and_values_come_when_those_before_them_are_on_either_side(tmp_path: Path) -> None:
    ours, theirs = made_of(tmp_path / "ours", "a"), made_of(tmp_path / "theirs", "a", "b", "c")
    a, b, c = (Key(origin.address, Part.KV) for origin in chain("a", "b", "c"))
    remove_blob(theirs, a)
    with open_existing(ours) as db:
        assert merge(db, theirs).num_orphaned == 0
        assert {a, b, c} <= set(stored(db))
    remove_blob(ours, b)
    remove_blob(ours, c)
    remove_blob(theirs, b)
    with open_existing(ours) as db:
        done = merge(db, theirs)
        assert (done.num_stored, done.num_orphaned) == (0, 1)
        assert c not in stored(db)


def test_namespaces_come_apart(tmp_path: Path, make_lm: Callable[..., bp.LanguageModel], open_db: Any) -> None:
    tenant = make_lm(db=open_db(tmp_path / "a", namespace="tenant"))
    tenant("Request: list users")
    tenant.db.close()
    both = make_lm(db=open_db(tmp_path / "b"))
    merge(both.db, tmp_path / "a")
    assert both("Request: list users").num_cached_tokens == 0
    assert make_lm(db=open_db(tmp_path / "b", namespace="tenant"))("Request: list users").num_computed_tokens == 0


def test_another_fidelity_is_refused_with_the_way_out(tmp_path: Path, open_db: Any) -> None:
    lossy, exact = open_db(tmp_path / "lossy", fidelity="int8"), open_db(tmp_path / "exact")
    for db, place in ((lossy, tmp_path / "exact"), (exact, tmp_path / "lossy")):
        with pytest.raises(
            FormatError, match=r"keeps keys and values .*\. Merge it into a database that was made with"
        ):
            merge(db, place)


def test_what_cannot_be_merged_says_so(directory: Path, tmp_path: Path, open_db: Any) -> None:
    with pytest.raises(UnsafeLocation, match="there is no database"):
        merge(open_db(), tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    readonly = open_db(directory)
    readonly.readonly = True
    with pytest.raises(StoreReadOnly):
        merge(readonly, directory)


@pytest.mark.parametrize(
    ("failure", "num_stored"),
    [
        ("store.put.inside=kill@4", 0),
        ("store.put.after=kill", 18),
        ("catalog.record.inside=kill", 18),
    ],
)
def test_a_merge_that_was_killed_goes_on_where_it_was(
    failure: str, num_stored: int, directory: Path, other: Path
) -> None:
    command = [sys.executable, "-m", "backprompt_db", "merge", str(directory), "--db", str(other)]
    environment = os.environ | {"BACKPROMPT_DB_FAILPOINT": failure, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(stored_keys(other)) == num_stored
    with open_existing(other) as db:
        assert merge(db, directory).num_stored == 18 - num_stored
        reindex(db)
    assert verified(other).is_clean
    assert {key: read_blob(other, key) for key in stored_keys(other)} == {
        key: read_blob(directory, key) for key in stored_keys(directory)
    }


def test_the_command_line_merges(directory: Path, other: Path, tmp_path: Path) -> None:
    result = run("merge", directory, "--db", other)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("18 parts stored, ")
    done = run_json("merge", directory, "--db", other)
    assert (done["num_stored"], done["source_problem"]) == (0, None)
    wrong = run("merge", tmp_path / "nowhere", "--db", other)
    assert (wrong.exit_code, "there is no database in" in wrong.stderr) == (2, True)
