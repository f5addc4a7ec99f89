"""Every family of decoder-only models is right or refused: tiny seeded models against plain forward passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import backprompt_db as bp
from backprompt_db import Text, parallel
from backprompt_db.compute.inference.selfcheck import examine, probe_shape
from backprompt_db.errors import UnsupportedModel
from tests.support.families import (
    CONTEXT,
    FAMILIES,
    FULL,
    LABELS,
    MIXED,
    REFUSED,
    REPRESENTATIVES,
    REQUEST,
    SUPPORTED,
    TOLERANCE,
    VOCAB_SIZE,
    Family,
    family_cases,
    logprobs_as_defined,
    logprobs_of_last,
)


@dataclass(frozen=True)
class Subject:
    """A model under test, on a database of its own."""

    family: Family
    model: Any
    tokenizer: PreTrainedTokenizerFast
    db: bp.Database
    lm: bp.LanguageModel

    def again(self) -> bp.LanguageModel:
        """Another user of the same weights and database."""
        return bp.LanguageModel(self.model, self.tokenizer, db=self.db)

    def oracle(self, *pieces: str) -> npt.NDArray[np.float32]:
        """The log-probabilities of the last piece, from one plain forward pass over the tokens of all."""
        ids = [self.tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
        return logprobs_of_last(self.model, ids)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these models do."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=family_cases(SUPPORTED))
def subject(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subject]:
    model = request.param.build()
    with bp.open(tmp_path_factory.mktemp("families")) as db:
        yield Subject(request.param, model, tokenizer, db, bp.LanguageModel(model, tokenizer, db=db))


def logprobs_of_piece(representation: bp.ModelRepr, expected: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The log-probabilities of as many last tokens as the oracle gives."""
    logprobs: npt.NDArray[np.float32] = representation.token_logprobs[-len(expected) :].numpy()
    return logprobs


def assert_same(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def test_the_verdict_is_the_one_on_record(subject: Subject) -> None:
    subject.lm(CONTEXT)
    assert subject.db.catalog is not None
    record = subject.db.catalog.model(subject.lm.weights_id)
    assert record is not None
    assert record.verdict == subject.family.verdict
    assert record.max_error is not None
    assert record.max_error < TOLERANCE


def test_a_wrong_context_shows_in_the_oracle(subject: Subject) -> None:
    right = subject.oracle(CONTEXT, REQUEST, LABELS[0])
    wrong = subject.oracle(CONTEXT, REQUEST.replace("everyone", "the dog"), LABELS[0])
    assert np.abs(right - wrong).max() > 100 * TOLERANCE


def test_a_chain_is_one_plain_pass(subject: Subject) -> None:
    chain = subject.lm(Text(CONTEXT) + REQUEST + LABELS[0])
    for pieces in ([CONTEXT, REQUEST], [CONTEXT, REQUEST, LABELS[0]]):
        expected = subject.oracle(*pieces)
        assert_same(logprobs_of_piece(subject.lm(sum(pieces[1:], Text(pieces[0]))), expected), expected)
    ids = torch.tensor([[*chain.input_ids]])
    with torch.no_grad():
        assert_same(chain.logits.numpy(), subject.model(ids, use_cache=False).logits[0, -1].numpy())


def test_a_tree_is_a_plain_pass_for_each_of_its_branches(subject: Subject) -> None:
    requests = [REQUEST, "Request: the quick brown fox", "\n"]
    prompts = [Text(CONTEXT) + request for request in requests]
    expected = [[subject.oracle(CONTEXT, request, label) for label in LABELS] for request in requests]
    sums = [[logprobs.sum() for logprobs in row] for row in expected]
    np.testing.assert_allclose(subject.lm.score(prompts, LABELS), sums, rtol=0, atol=10 * TOLERANCE)
    results = subject.lm([prompt + label for prompt in prompts for label in LABELS])
    for result, logprobs in zip(results, itertools.chain(*expected), strict=True):
        assert_same(logprobs_of_piece(result, logprobs), logprobs)


def test_another_object_continues_from_what_is_stored(subject: Subject) -> None:
    subject.lm(Text(CONTEXT) + REQUEST)
    subject.db.flush()
    other = subject.again()
    continued = other(Text(CONTEXT) + REQUEST + ", sorted by name" + "\n")
    assert continued.num_cached_tokens > continued.num_computed_tokens > 0
    expected = subject.oracle(CONTEXT, REQUEST, ", sorted by name", "\n")
    assert_same(logprobs_of_piece(continued, expected), expected)


def test_a_piece_longer_than_what_precedes_it_crosses_every_window(subject: Subject) -> None:
    pieces = [REQUEST, CONTEXT * 16, REQUEST, CONTEXT]
    expected = subject.oracle(*pieces)
    result = subject.lm(sum(pieces[1:], Text(pieces[0])))
    assert len(result.input_ids) > 300
    assert_same(logprobs_of_piece(result, expected), expected)


@pytest.mark.parametrize(
    ("model_type", "windowed", "full"),
    [
        ("gpt_neo", {"attention_types": [[["global", "local", "local"], 1]]}, {"attention_types": [[["global"], 3]]}),
        ("mistral", {"sliding_window": 16}, {"sliding_window": None}),
        ("gemma3_text", MIXED, {"layer_types": [FULL] * 3}),
        ("llama4_text", {"attention_chunk_size": 16}, {"attention_chunk_size": 1024}),
    ],
)
def test_a_forgotten_window_would_show_in_the_long_prompt(
    model_type: str, windowed: dict[str, Any], full: dict[str, Any]
) -> None:
    ids = [[token % VOCAB_SIZE for token in range(7, 7 + 13 * 350, 13)]]
    one, other = (
        logprobs_of_last(Family(model_type, "", model_type, options).build(), [[3], *ids])
        for options in (windowed, full)
    )
    assert np.abs(one - other).max() > 100 * TOLERANCE


def test_parallel_branches_do_not_see_each_other_or_are_refused(subject: Subject) -> None:
    documents = ["POST /orders creates an order.", "the dog does not mind"]
    text = Text(CONTEXT) + parallel(*documents) + REQUEST
    if subject.family.verdict == "chains":
        with pytest.raises(UnsupportedModel, match="plain chains only"):
            subject.lm(text)
        return
    segments = text.segments()
    ids = {each: subject.tokenizer(each.string, add_special_tokens=False)["input_ids"] for each in segments}
    expected = np.concatenate(logprobs_as_defined(subject.model, segments, ids))
    assert_same(subject.lm(text).token_logprobs.numpy(), expected)


@pytest.mark.parametrize("family", family_cases(REFUSED))
def test_what_cannot_be_right_is_refused_and_nothing_is_stored(
    family: Family, tokenizer: PreTrainedTokenizerFast, db: bp.Database
) -> None:
    lm = bp.LanguageModel(family.build(), tokenizer, db=db)
    with pytest.raises(UnsupportedModel, match=r"cannot be cached and stay right: .{20}"):
        lm(CONTEXT)
    db.flush()
    assert db.catalog is not None
    (record,) = db.catalog.models()
    assert record.verdict == "refused"
    assert db.counters.num_stored == 0


@pytest.mark.exhaustive
def test_the_representatives_have_each_form_of_mask_verdict_and_shape_of_a_cache() -> None:
    found: dict[bool, set[Any]] = {True: set(), False: set()}
    for family in FAMILIES:
        model = family.build()
        verdict = examine(model)
        assert verdict.kind == family.verdict
        found[family.name in REPRESENTATIVES].add(verdict.form and verdict.form.name)
        if verdict.form is not None:
            shape = probe_shape(model)
            found[family.name in REPRESENTATIVES].add((shape.num_kv_heads, shape.key_dim, shape.value_dim))
    assert found[False] <= found[True]
