"""Whatever stands in the catalog, answers are those of a new database, or an error of the library's own."""

from __future__ import annotations

import contextlib
import functools
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import backprompt_db as bp
from backprompt_db.errors import BackpromptError
from backprompt_db.integrations.lm_eval import BackpromptLM
from tests.conftest import tiny_gpt2, train_tokenizer
from tests.support.generation import only_digits
from tests.support.harness import requests, save_model
from tests.support.operations import catalog_of

CONTEXT = "Pick the endpoint for the request.\n"
PROMPTS = [CONTEXT, "The quick", "A prompt is", "Request:"]
DIGITS = only_digits(train_tokenizer())
TABLES = [
    *("models", "tokenizers", "sources", "cuts", "greedy_paths", "generations"),
    *("segments", "parents", "representations", "counts", "evictions", "namespaces", "sums", "alembic_version"),
]
TABLE_GROUPS = [
    pytest.param(TABLES[:6], id="remembered"),
    pytest.param(TABLES[6:], id="listed", marks=pytest.mark.exhaustive),
]
VALUES = (
    st.none()
    | st.sampled_from([0, 1, -1, 2**62, 0.5, "", "packs", "chains", "refused", "[]", "[1]", "[5, 9]", "[300, 7]"])
    | st.lists(st.integers(0, 50), max_size=4).map(str)
    | st.integers(-9, 9)
    | st.text(st.characters(codec="utf-8"), max_size=4)
    | st.binary(max_size=4)
    | st.binary(min_size=32, max_size=32)
)


@dataclass(frozen=True, slots=True)
class Answers:
    """What a user sees: texts and tokens must be the same, numbers equal but for their last bits."""

    exact: tuple[Any, ...]
    numbers: np.ndarray[Any, Any]

    def assert_same(self, other: Answers) -> None:
        assert self.exact == other.exact
        np.testing.assert_allclose(self.numbers, other.numbers, atol=1e-3)


def answers(place: Path, model: str) -> Answers:
    """Ask everything, as a process does that finds this database."""
    with bp.open(place) as db:
        lm = bp.LanguageModel.from_pretrained(model, db=db, progress=False)
        result = lm(lm.text(CONTEXT) + "GET /us")
        pieces = [segment.string for segment in lm.text(CONTEXT + "The quick brown fox", split=4).segments()]
        scores = lm.score(lm.text("The quick brown fo") + "x", [" jumps", "es"])
        generated = lm.generate(CONTEXT, max_new_tokens=3, do_sample=False, **DIGITS)
        harness = BackpromptLM(model, db=db)
        asked = requests("loglikelihood", [(CONTEXT, " GET"), *((prompt, greedy_after(prompt)) for prompt in PROMPTS)])
        likelihoods = harness.loglikelihood(asked)
        numbers = [*result.logits.tolist(), *scores, *(each for each, _ in likelihoods)]
        exact = (
            [segment.string for segment in result.segments],
            result.input_ids.tolist(),
            pieces,
            (generated.string, tuple(generated.ids)),
            [is_greedy for _, is_greedy in likelihoods],
        )
    return Answers(exact, np.array(numbers))


@functools.cache
def greedy_after(prompt: str) -> str:
    """What the model itself would write: two tokens, as far as they are characters."""
    with bp.open(":memory:") as db:
        lm = bp.LanguageModel(tiny_gpt2(), train_tokenizer(), db=db, progress=False)
        return lm.generate(prompt, max_new_tokens=2, do_sample=False).string.rstrip("\ufffd") or " x"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, model: str) -> Answers:
    return answers(tmp_path_factory.mktemp("new") / "db", model)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """A database that knows all the answers."""
    place = tmp_path_factory.mktemp("template") / "db"
    assert set(answers(place, model).exact[-1]) == {True, False}, "some continuations are greedy, some are not"
    with sqlite3.connect(catalog_of(place)) as catalog:
        assert all(catalog.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES[:6])  # noqa: S608
    return place


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Callable[[], Any]:
    @contextlib.contextmanager
    def copy() -> Iterator[Path]:
        place = tmp_path_factory.mktemp("copy") / "db"
        shutil.copytree(template, place)
        try:
            yield place
        finally:
            shutil.rmtree(place)

    return copy


def assert_unchanged(place: Path, model: str, expected: Answers) -> None:
    """A process may be told what is wrong; it is told nothing untrue."""
    with contextlib.suppress(BackpromptError):
        answers(place, model).assert_same(expected)


def edit(place: Path, data: st.DataObject, tables: list[str]) -> None:
    """Put any value into any cell, whatever the schema allows."""
    with contextlib.closing(sqlite3.connect(catalog_of(place))) as catalog, catalog:
        catalog.execute("PRAGMA writable_schema = ON")
        catalog.execute("UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '') WHERE type = 'table'")
    with contextlib.closing(sqlite3.connect(catalog_of(place))) as catalog, catalog:
        catalog.execute("PRAGMA ignore_check_constraints = ON")
        table = data.draw(st.sampled_from(tables), label="table")
        columns = [row[1] for row in catalog.execute(f"PRAGMA table_info({table})")]
        column = data.draw(st.sampled_from(columns), label="column")
        found = [value for (value,) in catalog.execute(f"SELECT {column} FROM {table} ORDER BY 1")]  # noqa: S608
        row = data.draw(st.integers(0, max(0, len(found) - 1)), label="row")
        value = data.draw(VALUES | st.sampled_from(found or [None]), label="value")
        where = f"{column} IN (SELECT {column} FROM {table} ORDER BY 1 LIMIT 1 OFFSET {row})"  # noqa: S608
        with contextlib.suppress(sqlite3.Error):  # a trigger or a key refuses it
            catalog.execute(f"UPDATE {table} SET {column} = ? WHERE {where}", (value,))  # noqa: S608


@pytest.mark.parametrize("tables", TABLE_GROUPS)
@given(data=st.data())
def test_no_edited_cells_change_an_answer(
    copied: Callable[[], Any], model: str, expected: Answers, tables: list[str], data: st.DataObject
) -> None:
    with copied() as place:
        for _ in range(data.draw(st.integers(1, 4), label="edits")):
            edit(place, data, tables)
        assert_unchanged(place, model, expected)


@pytest.mark.exhaustive
@given(seed=st.integers(0, 2**32), number=st.integers(1, 200))
def test_no_flipped_bits_change_an_answer(
    copied: Callable[[], Any], model: str, expected: Answers, seed: int, number: int
) -> None:
    with copied() as place:
        content = bytearray(catalog_of(place).read_bytes())
        chosen = random.Random(seed)
        for _ in range(number):
            content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
        catalog_of(place).write_bytes(content)
        assert_unchanged(place, model, expected)
