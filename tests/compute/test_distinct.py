"""No token twice within a pass: what begins alike is computed once, and every segment gets what it has alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import backprompt_db as bp
from backprompt_db.compute.inference import forward
from backprompt_db.prompt.representation import Part
from tests.conftest import tiny_gpt2
from tests.support.families import by_name

MakeLM = Callable[..., bp.LanguageModel]

WORDS = [" the", " dog", " fox", " GET", " /users"]


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass gives to its model."""
    numbers: list[int] = []
    extend = forward.extend

    def counting(model: Any, input_ids: Any, *arguments: Any, **others: Any) -> Any:
        numbers.append(len(input_ids))
        return extend(model, input_ids, *arguments, **others)

    monkeypatch.setattr(forward, "extend", counting)
    return numbers


def num_tokens(lm: bp.LanguageModel, string: str) -> int:
    return len(lm.tokenizer(string)["input_ids"])


def test_completions_that_begin_alike_share_their_beginnings(lm: bp.LanguageModel, fed: list[int]) -> None:
    labels = [" GET /users", " GET /orders", " GET /users lists", " POST"]
    lm.score("Pick one.", labels)
    ids = [lm.tokenizer(label)["input_ids"] for label in labels]
    beginnings = {tuple(each[:end]) for each in ids for end in range(1, len(each))}
    assert fed == [num_tokens(lm, "Pick one.") + len(beginnings)]
    assert len(beginnings) < sum(len(each) - 1 for each in ids)


def test_unrelated_texts_share_their_beginnings(lm: bp.LanguageModel, fed: list[int]) -> None:
    lm(["The quick brown fox jumps", "The quick brown fox GET"], keep="all")
    ids = [lm.tokenizer(each)["input_ids"] for each in ("The quick brown fox jumps", "The quick brown fox GET")]
    assert fed == [len({tuple(each[:end]) for each in ids for end in range(1, len(each) + 1)})]


def test_pieces_that_lead_to_the_same_tokens_are_one(lm: bp.LanguageModel, fed: list[int]) -> None:
    whole, pieces = bp.Text("The quick brown fox jumps"), bp.Text("The quick brown") + " fox" + " jumps"
    first, second = lm([whole, pieces], keep="all")
    assert fed == [first.input_ids.numel()] == [second.input_ids.numel()]
    assert torch.equal(first.token_logprobs[1:], second.token_logprobs[1:])


def test_branches_that_begin_alike_are_seen_twice_by_what_follows(lm: bp.LanguageModel, fed: list[int]) -> None:
    text = "The quick" + bp.parallel(" brown fox", " brown dog") + " jumps"
    result = lm(text, keep="all")
    assert fed == [result.input_ids.numel()]


def test_with_deterministic_each_segment_is_computed_alone(make_lm: MakeLM, fed: list[int]) -> None:
    lm = make_lm(deterministic=True)
    lm(["The quick brown fox jumps", "The quick brown fox GET"])
    assert fed == [num_tokens(lm, "The quick brown fox jumps"), num_tokens(lm, "The quick brown fox GET")]


@pytest.fixture(scope="module", params=["gpt2", "mistral-window"])
def models(request: pytest.FixtureRequest, tokenizer: Any) -> tuple[bp.LanguageModel, Callable[[], bp.LanguageModel]]:
    """A model that computes each segment alone, and how to make one that does not."""
    model = tiny_gpt2() if request.param == "gpt2" else by_name(request.param).build()
    alone = bp.LanguageModel(model, tokenizer, db=bp.open(":memory:"), deterministic=True)
    return alone, lambda: bp.LanguageModel(model, tokenizer, db=bp.open(":memory:"))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10)
def test_every_segment_has_what_it_has_alone(models: Any, seed: int) -> None:
    """Trees of pieces with few different words, branches and explicit starts: scores, logits, keys and values."""
    alone, make = models
    dice = random.Random(seed)

    def text(depth: int) -> bp.Text:
        found = bp.Text("".join(dice.choices(WORDS, k=dice.randint(1, 4))), start=dice.choice([None] * 9 + [40]))
        if depth and dice.random() < 0.4:
            found += bp.parallel(text(0), text(0))
        return found + text(depth - 1) if depth else found

    texts = [text(2) for _ in range(5)]
    together = make()
    for one, other in zip(alone(texts, keep="all"), together(texts, keep="all"), strict=True):
        assert torch.allclose(one.token_logprobs, other.token_logprobs, atol=1e-4, equal_nan=True)
        assert np.allclose(one.logits, other.logits, atol=1e-3)
        for left, right in zip(one.past_key_values.layers, other.past_key_values.layers, strict=True):
            assert torch.allclose(left.keys, right.keys, atol=1e-4)
            assert torch.allclose(left.values, right.values, atol=1e-4)
    labels = ["".join(dice.choices(WORDS, k=dice.randint(1, 4))) for _ in range(6)]
    prompts = ["The quick" + each for each in WORDS[:3]]
    assert np.allclose(alone.score(prompts, labels), together.score(prompts, labels), atol=1e-4)


def test_what_is_kept_of_each_is_whole(lm: bp.LanguageModel, make_lm: MakeLM) -> None:
    """A buffer that later passes go on from ends before the first token that is shared."""
    texts = [bp.Text("The quick brown") + ending for ending in (" fox jumps", " fox GET", " fox jumps over")]
    lm(texts, keep="all")
    lm.db.flush()
    lm.db.store.delete([key for key, _ in list(lm.db.store.keys()) if key.part is Part.SCORES])
    other = make_lm(db=lm.db)
    fresh = make_lm(deterministic=True)
    for text in texts:
        longer = text + " and the dog"
        assert torch.allclose(other(longer).token_logprobs[1:], fresh(longer).token_logprobs[1:], atol=1e-4)
