"""lm-evaluation-harness with a real model on real questions: the same answers as its own `hf` model, computed once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import backprompt_db as bp
from backprompt_db.cli.demo.smollm2 import smollm2_directory
from backprompt_db.integrations.lm_eval import BackpromptLM
from tests.support.harness import DATA, hf_model, requests

TOLERANCE = 1e-4
"""By how much the log-probability of a token may differ."""


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def prompt(shots: list[dict[str, Any]], question: str) -> str:
    examples = [f"Question: {shot['question']}\nAnswer: {shot['choices'][shot['answer']]}\n\n" for shot in shots]
    return "".join(examples) + f"Question: {question}\nAnswer:"


SHOTS = rows("shots.jsonl")[:5]
QUESTIONS = rows("questions.jsonl")[:8]
PAIRS = [(prompt(SHOTS, row["question"]), f" {choice}") for row in QUESTIONS for choice in row["choices"]]


@pytest.fixture(scope="module")
def hf() -> Any:
    return hf_model(str(smollm2_directory()), dtype="float32")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2") / "db"


@pytest.fixture
def lm(database: Path) -> Iterator[BackpromptLM]:
    """The model as another process would have it, on the database of all these tests."""
    with bp.open(database) as db:
        yield BackpromptLM(str(smollm2_directory()), db=db)


@pytest.fixture(scope="module")
def first(database: Path) -> list[tuple[float, bool]]:
    """The answers of a first run."""
    with bp.open(database) as db:
        lm = BackpromptLM(str(smollm2_directory()), db=db)
        answers: list[tuple[float, bool]] = lm.loglikelihood(requests("loglikelihood", PAIRS))
        return answers


@pytest.mark.exhaustive
def test_choices_have_the_log_likelihoods_and_greedy_flags_of_the_hf_model(
    hf: Any, first: list[tuple[float, bool]]
) -> None:
    theirs = hf.loglikelihood(requests("loglikelihood", PAIRS))
    for (mine, is_greedy), (expected, was_greedy), (_, choice) in zip(first, theirs, PAIRS, strict=True):
        assert abs(mine - expected) < TOLERANCE * len(hf.tok_encode(choice))
        assert is_greedy == was_greedy
    assert 0 < sum(is_greedy for _, is_greedy in first) < len(first)


def test_the_second_run_does_not_load_the_model(lm: BackpromptLM, first: list[tuple[float, bool]]) -> None:
    assert lm.loglikelihood(requests("loglikelihood", PAIRS)) == first
    assert not lm.is_loaded
    assert lm.counters.num_model_calls == lm.counters.num_computed_tokens == 0


@pytest.mark.exhaustive
def test_with_another_last_example_only_what_follows_is_computed(
    lm: BackpromptLM, first: list[tuple[float, bool]]
) -> None:
    shots = [*SHOTS[:-1], rows("shots.jsonl")[5]]
    pairs = [(prompt(shots, row["question"]), f" {row['choices'][0]}") for row in QUESTIONS]
    lm.loglikelihood(requests("loglikelihood", pairs))
    example = lm.tok_encode(prompt(shots[-1:], "").removesuffix("Question: \nAnswer:"))
    endings = [lm.tok_encode(prompt([], row["question"]) + f" {row['choices'][0]}") for row in QUESTIONS]
    newlines = 1 + len(endings)  # blank lines are cut in the middle
    assert 0 < lm.counters.num_computed_tokens <= len(example) + sum(map(len, endings)) + newlines
    assert lm.counters.num_computed_tokens < sum(len(lm.tok_encode(context)) for context, _ in pairs) / 4


@pytest.mark.exhaustive
def test_texts_and_continuations_are_those_of_the_hf_model(hf: Any, lm: BackpromptLM) -> None:
    texts = requests("loglikelihood_rolling", [(row["text"],) for row in rows("stories.jsonl")])
    for mine, expected, request in zip(
        lm.loglikelihood_rolling(texts), hf.loglikelihood_rolling(texts), texts, strict=True
    ):
        assert abs(mine - expected) < TOLERANCE * len(hf.tok_encode(request.args[0]))
    told = {"until": ["\n"], "max_gen_toks": 10}
    asked = requests("generate_until", [(context, dict(told)) for context, _ in PAIRS[::4]])
    assert lm.generate_until(asked) == hf.generate_until(asked)
