"""Rows of the catalog that decide an answer, and are not what was written: not used, reported, and removed."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import backprompt_db as bp
from backprompt_db.catalog.records import GenerationRecord, GreedyPath
from backprompt_db.database.manifest import VARIABLE
from backprompt_db.operations.doctor import diagnose
from backprompt_db.operations.doctor_checks import Status
from backprompt_db.operations.verify import Found
from backprompt_db.prompt.ids import Address
from backprompt_db.views.formatting import plural
from tests.support.cli import run
from tests.support.operations import catalog_of, reindexed, verified

MakeLM = Callable[..., bp.LanguageModel]

EDITS = {
    "models": "UPDATE models SET verdict = 'chains'",
    "sources": "UPDATE sources SET tokenizer_id = randomblob(32)",
    "cuts": "UPDATE cuts SET offsets = '[1]'",
    "greedy_paths": "UPDATE greedy_paths SET token_ids = '[7]'",
    "generations": "UPDATE generations SET string = 'a lie'",
}
OF_ANOTHER_TYPE = {
    "models": "UPDATE models SET name = x'00'",
    "sources": "UPDATE sources SET name = x'00'",
    "cuts": "UPDATE cuts SET offsets = x'00'",
    "greedy_paths": "UPDATE greedy_paths SET token_ids = '[1.5]'",
    "generations": "UPDATE generations SET token_logprobs = 'words'",
}


@pytest.fixture(params=["", "a secret of sixteen bytes or more"], ids=["no secret", "secret"])
def directory(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_lm: MakeLM, tokenizer: Any
) -> Path:
    """A database that remembers something in every table, of a model in files."""
    monkeypatch.setenv(VARIABLE, request.param)
    with bp.open(tmp_path / "db") as db:
        lm = make_lm(db=db)
        lm.model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        lm(lm.text("The quick brown fox jumps", split=2))
        bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db)
        db.flush()
        with closing(sqlite3.connect(catalog_of(tmp_path / "db"))) as catalog:
            ((found,),) = catalog.execute("SELECT address FROM representations LIMIT 1").fetchall()
        address = Address(found)
        generated = GenerationRecord(b"k" * 32, address, "a", (1, 2), bytes(8), num_kept=1, is_finished=True)
        db.model_metadata.save(GreedyPath(address, (1, 2)), generated)
    return tmp_path / "db"


def change(directory: Path, edit: str) -> int:
    """Edit rows, and return how many."""
    with closing(sqlite3.connect(catalog_of(directory))) as catalog, catalog:
        return catalog.execute(edit).rowcount


def num_rows(directory: Path, table: str) -> int:
    with closing(sqlite3.connect(catalog_of(directory))) as catalog:
        return int(catalog.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608 - our own names


def test_none_is_reported_where_nothing_was_changed(directory: Path) -> None:
    assert all(num_rows(directory, table) for table in EDITS)
    assert verified(directory).is_clean
    assert reindexed(directory).num_changed_rows == 0


@pytest.mark.parametrize("edits", [EDITS, OF_ANOTHER_TYPE], ids=["values", "types"])
@pytest.mark.parametrize("table", EDITS)
def test_they_are_reported_and_removed_by_reindex(directory: Path, table: str, edits: dict[str, str]) -> None:
    number = change(directory, edits[table])
    found = verified(directory)
    assert (found.changed_rows, found.found, found.problems) == ({table: number}, Found.CATALOG, ())
    assert reindexed(directory).num_changed_rows == number > 0
    assert num_rows(directory, table) == (table == "models"), "a model that has representations stays, unchecked"
    assert verified(directory).is_clean


def test_rows_without_a_signature_are_not_reported(directory: Path) -> None:
    for table in EDITS:
        change(directory, f"UPDATE {table} SET signature = NULL")  # noqa: S608 - our own names
    assert verified(directory).is_clean
    assert reindexed(directory).num_changed_rows == 0


def test_one_row_of_another_type_does_not_hide_the_others(directory: Path) -> None:
    with bp.open(directory) as db:
        db.model_metadata.save(*(GreedyPath(Address(number.to_bytes(32, "big")), (number,)) for number in range(600)))
    change(
        directory, "UPDATE greedy_paths SET token_ids = '[9]' WHERE address = (SELECT max(address) FROM greedy_paths)"
    )
    change(directory, "UPDATE greedy_paths SET signature = 'words' WHERE address = zeroblob(32)")
    assert verified(directory).changed_rows == {"greedy_paths": 2}
    assert reindexed(directory).num_changed_rows == 2
    assert num_rows(directory, "greedy_paths") == 599


def test_commands_say_so(directory: Path) -> None:
    number = change(directory, EDITS["cuts"])
    rows = plural(number, "row")
    result = run("verify", "--structure", "--db", directory)
    assert (result.exit_code, f"changed: {rows} of cuts in the catalog" in result.stdout) == (8, True)
    as_json = run("verify", "--structure", "--json", "--db", directory)
    assert json.loads(as_json.stdout)["changed_rows"] == {"cuts": number}
    [check] = [check for check in diagnose(directory) if check.name == "catalog"]
    assert (check.status, check.remedy) == (Status.WARNING, "Run `backprompt-db reindex`.")
    assert check.what == f"What {number} of its rows remember is not what was written, and is not used."
    result = run("reindex", "--db", directory)
    assert f"{plural(number, 'changed row')} forgotten: what they said is found out again." in result.stdout
    assert [check.status for check in diagnose(directory) if check.name == "catalog"] == [Status.OK]


def test_without_the_secret_the_doctor_does_not_judge_them(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(directory, EDITS["cuts"])
    monkeypatch.setenv(VARIABLE, "another secret of sixteen bytes or more")
    assert [check.status for check in diagnose(directory) if check.name == "catalog"] == [Status.OK]
