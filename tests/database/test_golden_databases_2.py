"""Databases and a bundle of the last commit before the package was divided into rooms, with all that they remember.

`tests/data/golden_databases_2.py` says what is in them and how they were made.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import backprompt_db as bp
from backprompt_db.compute.tokens import SegmentTokenizer
from backprompt_db.database.config import read_config
from backprompt_db.database.opening import open_store
from backprompt_db.database.reconcile import Reindexing
from backprompt_db.operations.reindex import reindex
from backprompt_db.operations.verify import verify
from backprompt_db.prompt.explanation import Reason
from backprompt_db.prompt.ids import address
from tests.conftest import tiny_gpt2
from tests.support.cli import run_json
from tests.support.operations import catalog_of

DATA = Path(__file__).parents[1] / "data"
EXPECTED: dict[str, Any] = json.loads((DATA / "golden_databases_2.json").read_text(encoding="utf-8"))
NAMES = ("exact", "bfloat16", "int8", "secret")
SECRET = "a secret of more than sixteen bytes"  # noqa: S105 - of a database that everybody may read
CONTEXT = "Pick the endpoint.\n"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("golden")
    with tarfile.open(DATA / "golden_databases_2.tar.gz") as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.fixture(params=NAMES)
def directory(request: pytest.FixtureRequest, unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "secret":
        monkeypatch.setenv("BACKPROMPT_DB_SECRET", SECRET)
    return Path(shutil.copytree(unpacked / request.param, tmp_path / request.param))


@pytest.fixture
def lm(directory: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> Iterator[bp.LanguageModel]:
    with bp.open(directory) as db:
        yield bp.LanguageModel(model, tokenizer, db=db, progress=False)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_gpt2()


NEW_COLUMNS = {"continuations_nbytes"}


def hexed(value: object) -> object:
    if not isinstance(value, bytes):
        return value
    return value.hex() if len(value) <= 64 else hashlib.sha256(value).hexdigest()


def rows_of(directory: Path, table: str) -> list[list[object]]:
    """Return the rows of a table, without the columns that it did not have then."""
    with closing(sqlite3.connect(catalog_of(directory))) as file:
        columns = [name for _, name, *_ in file.execute(f"PRAGMA table_info({table})") if name not in NEW_COLUMNS]
        found = file.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall()  # noqa: S608 - our own names
    return sorted(([hexed(value) for value in row] for row in found), key=repr)


def blobs_of(directory: Path) -> dict[str, list[object]]:
    with closing(open_store(directory)) as store:
        found = {key: store.get(key) for key, _ in store.keys()}
    return {
        f"{key.address.hex()}.{key.part.name.lower()}": [blob.nbytes, hashlib.sha256(blob).hexdigest()]
        for key, blob in found.items()
        if blob is not None
    }


def test_every_value_and_every_row_is_read(directory: Path) -> None:
    expected = EXPECTED[directory.name]
    with bp.open(directory) as db:
        assert db.fidelity == ("exact" if directory.name == "secret" else directory.name)
        assert reindex(db) == Reindexing(0, 0, 0, None)
        assert verify(db).is_clean
    assert blobs_of(directory) == expected["blobs"]
    tables = expected["rows"].keys() - {"alembic_version"}  # it was upgraded
    assert {table: rows_of(directory, table) for table in tables} == {
        table: expected["rows"][table] for table in tables
    }
    assert run_json("ls", "--limit", "100", "--db", directory) == expected["ls"]
    incident = run_json("stats", "--db", directory)["incidents"][0]
    assert (incident["at"], incident["kind"], incident["detail"]) == (1.5, "quarantine", "for this test")
    assert read_config(directory).max_nbytes == 2_000_000_000
    assert read_config(directory).ttl_seconds == 3650 * 24 * 3600


def test_prompts_are_answered_without_the_model(lm: bp.LanguageModel) -> None:
    found = lm(lm.text(CONTEXT) + "GET /users")
    assert (found.num_computed_tokens, lm.counters.num_model_calls, lm.db.counters.num_misses) == (0, 0, 0)
    with torch.no_grad():
        plain = lm.model(found.input_ids[None]).logits[0, -1]
    torch.testing.assert_close(found.logits, plain)


PIECES = ["The quick", " brown fox", " jumps"]


def pieces(lm: bp.LanguageModel) -> list[str]:
    return [segment.string for segment in lm.text("The quick brown fox jumps", split=2).segments()]


def greedy_paths(lm: bp.LanguageModel) -> list[tuple[int, ...]]:
    tip = (lm.text(CONTEXT) + "GET /users").tips()[0]
    end = address(tip.id, lm.weights_id, lm.tokenizer_id)
    return list(lm.db.model_metadata.greedy_paths([end]).values())


def cuts_of_a_stranger(*_: object) -> None:
    raise AssertionError("the database knows where it was cut")


@pytest.mark.parametrize("directory", ["secret"], indirect=True)
def test_signed_cuts_and_greedy_paths_are_remembered(lm: bp.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SegmentTokenizer, "cuts", cuts_of_a_stranger)
    assert (pieces(lm), greedy_paths(lm)) == (PIECES, [(7, 300, 1)])


@pytest.mark.parametrize("directory", [name for name in NAMES if name != "secret"], indirect=True)
def test_cuts_without_a_signature_are_found_out_again_and_signed(
    lm: bp.LanguageModel, model: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (pieces(lm), greedy_paths(lm)) == (PIECES, [])
    monkeypatch.setattr(SegmentTokenizer, "cuts", cuts_of_a_stranger)
    assert pieces(bp.LanguageModel(model, tokenizer, db=lm.db)) == PIECES


def test_opened_for_reading_only_it_answers_what_it_holds(
    directory: Path, model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    with bp.open(directory, mode="r") as db:
        lm = bp.LanguageModel(model, tokenizer, db=db, progress=False)
        assert lm(lm.text(CONTEXT) + "GET /users").num_computed_tokens == 0
        assert pieces(lm) == PIECES


def test_what_was_evicted_is_remembered(lm: bp.LanguageModel) -> None:
    last = lm.explain(lm.text(CONTEXT) + "to be evicted").segments[-1]
    assert last.miss is not None
    assert last.miss.reason is Reason.EVICTED


def test_it_can_be_written_to_evicted_and_made_anew(directory: Path, lm: bp.LanguageModel) -> None:
    prompt = lm.text(CONTEXT) + "DELETE everything"
    assert 0 < lm(prompt).num_computed_tokens < lm(prompt).input_ids.shape[0]
    lm.db.flush()
    assert run_json("evict", "--label", "users", "--db", directory)["num_parts"] == 3
    assert run_json("pin", "--label", "golden", "--remove", "--db", directory)["num_representations"] == 1
    lm.db.close()
    catalog_of(directory).unlink()
    with bp.open(directory) as db:
        assert reindex(db).num_added == len(blobs_of(directory))
        assert verify(db).is_clean


def test_the_bundle_is_imported_and_written_again(unpacked: Path, tmp_path: Path) -> None:
    expected = EXPECTED["bundle"]
    bundle, again = unpacked / "users.bundle", tmp_path / "again"
    with tarfile.open(bundle) as archive:
        assert [[member.name, member.size] for member in archive] == expected["listing"]
    bp.open(tmp_path / "db").close()
    assert run_json("import", bundle, "--db", tmp_path / "db")["num_stored"] == expected["report"]["num_parts"]
    found = blobs_of(tmp_path / "db")
    assert len(found) == expected["report"]["num_parts"]
    assert found.items() <= EXPECTED["exact"]["blobs"].items()
    assert run_json("export", again, "--label", "users", "--db", tmp_path / "db") == expected["report"]
    with tarfile.open(again) as archive:
        assert [[member.name, member.size] for member in archive] == expected["listing"]
