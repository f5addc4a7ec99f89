"""Databases of every released format stay readable for ever. Those in `tests/data` were made by the released code."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import backprompt_db as bp
from backprompt_db.catalog.catalog import Catalog
from backprompt_db.codec.blob import decode, decode_origin
from backprompt_db.database.reconcile import Reindexing
from backprompt_db.operations.reindex import reindex
from backprompt_db.operations.verify import verify
from backprompt_db.prompt.ids import Address
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key
from backprompt_db.store.lmdb import LmdbStore
from tests.conftest import VOCAB_SIZE, tiny_gpt2
from tests.support.operations import catalog_of

DATA = Path(__file__).parents[1] / "data"
EXPECTED: dict[str, dict[str, tuple[int, str]]] = json.loads((DATA / "golden_databases_1.json").read_text())

_OLD_ROWS = "SELECT address, is_pinned, label, num_hits, created_at, kv_nbytes FROM representations ORDER BY address"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("golden")
    with tarfile.open(DATA / "golden_databases_1.tar.gz") as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.fixture(params=sorted(EXPECTED))
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def directory(unpacked: Path, tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(unpacked / name, tmp_path / name))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_gpt2()


def run(directory: Path, model: Any, tokenizer: PreTrainedTokenizerFast, *, namespace: str = "") -> bp.LanguageModel:
    db = bp.open(directory, namespace=namespace)
    return bp.LanguageModel(model, tokenizer, db=db, progress=False)


def key_of(name: str) -> Key:
    address, part = name.split(".")
    return Key(Address(bytes.fromhex(address)), Part[part.upper()])


def test_all_of_them_are_there(unpacked: Path) -> None:
    assert {path.name for path in unpacked.iterdir()} == set(EXPECTED) == {"exact", "bfloat16", "int8"}


def test_every_blob_is_read_as_it_was_written(directory: Path, name: str) -> None:
    with closing(LmdbStore(directory / "store")) as store:
        blobs = {key: store.get(key) for key, _ in store.keys()}
    assert {key: (blob.nbytes, hashlib.sha256(blob).hexdigest()) for key, blob in blobs.items() if blob} == {
        key_of(key): tuple(found) for key, found in EXPECTED[name].items()
    }
    for key, blob in blobs.items():
        assert blob is not None
        part, origin = decode_origin(blob)
        assert Key(origin.address, part) == key
        shapes = {array.shape for array in decode(part, blob).values()}
        lengths = {shape[2 if part is Part.KV else 0] for shape in shapes}
        assert lengths == {VOCAB_SIZE if part is Part.LOGITS else origin.num_tokens}


def test_nothing_is_wrong_with_it(directory: Path, name: str) -> None:
    with bp.open(directory) as db:
        assert db.fidelity == name
        assert reindex(db) == Reindexing(0, 0, 0, None)
        verification = verify(db)
    assert verification.is_clean
    assert verification.num_parts == len(EXPECTED[name])


def test_its_catalog_is_upgraded_with_all_that_people_have_set(directory: Path, name: str) -> None:
    with closing(sqlite3.connect(catalog_of(directory))) as file:
        before = file.execute(_OLD_ROWS).fetchall()
        assert file.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
    with Catalog.open(catalog_of(directory)) as catalog:
        rows = sorted(catalog.rows(), key=lambda row: row.address)
        totals = catalog.totals()
    assert before == [
        (row.address, row.is_pinned, row.label, row.num_hits, row.created_at, row.nbytes.get(Part.KV)) for row in rows
    ]
    assert [(row.is_pinned, row.label) for row in rows if row.label is not None] == [(True, "golden")]
    assert sum(totals.nbytes.values()) == sum(nbytes for nbytes, _ in EXPECTED[name].values())
    assert totals.num_representations == len({key_of(key).address for key in EXPECTED[name]})


def test_a_catalog_made_anew_says_the_same_of_what_is_stored(directory: Path) -> None:
    def told(catalog: Catalog) -> list[object]:
        rows = sorted(catalog.rows(), key=lambda row: row.address)
        return [(row.address, row.text, row.namespace, row.num_tokens, row.nbytes) for row in rows]

    with Catalog.open(catalog_of(directory)) as upgraded:
        before = told(upgraded), upgraded.totals_by_model()
    catalog_of(directory).unlink()
    with bp.open(directory) as db:
        reindex(db)
    with Catalog.open(catalog_of(directory)) as anew:
        assert (told(anew), anew.totals_by_model()) == before


def test_a_prompt_is_answered_without_the_model(
    directory: Path, model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    lm = run(directory, model, tokenizer)
    with lm.db:
        found = lm(lm.text("Pick the endpoint.\n") + "GET /users")
        assert (found.num_computed_tokens, lm.counters.num_model_calls, lm.db.counters.num_misses) == (0, 0, 0)
    with torch.no_grad():
        plain = model(found.input_ids[None]).logits[0, -1]
    torch.testing.assert_close(found.logits, plain)


def test_branches_and_scores_are_answered_without_the_model(
    unpacked: Path, tmp_path: Path, model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    lm = run(Path(shutil.copytree(unpacked / "exact", tmp_path / "exact")), model, tokenizer)
    with lm.db:
        context = lm.text("Pick the endpoint.\n")
        lm(context + bp.parallel("One. ", "Zwei \N{EN DASH} δύο. ") + "Which?")
        lm(context + lm.text("At sixty-four.", start=64))
        lm.score(context + "Request: buy this\n", [" GET /users", " POST /orders"])
        assert (lm.counters.num_model_calls, lm.db.counters.num_misses) == (0, 0)


def test_a_namespace_is_answered_without_the_model(
    unpacked: Path, tmp_path: Path, model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    directory = Path(shutil.copytree(unpacked / "exact", tmp_path / "exact"))
    tenant = run(directory, model, tokenizer, namespace="tenant")
    with tenant.db:
        assert tenant("In a namespace.").num_computed_tokens == 0
        assert tenant.counters.num_model_calls == 0
    outside = run(directory, model, tokenizer)
    with outside.db:
        assert outside("In a namespace.").num_computed_tokens > 0


def test_stored_keys_and_values_are_continued(
    directory: Path, name: str, model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    lm = run(directory, model, tokenizer)
    with lm.db:
        found = lm(lm.text("Pick the endpoint.\n") + "DELETE everything")
    assert found.num_cached_tokens > 0
    assert found.fidelity == name
    with torch.no_grad():
        plain = model(found.input_ids[None]).logits[0, -1]
    tolerance = {"exact": 1e-4, "bfloat16": 0.05, "int8": 0.1}[name]
    torch.testing.assert_close(found.logits, plain, atol=tolerance, rtol=0)
