"""What stays in memory between calls, and what a call does not compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import backprompt_db as bp
from backprompt_db.prompt.ids import address
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key
from tests.conftest import plain_logprobs


@pytest.fixture
def num_reads(lm: bp.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[bp.Text], int]:
    """Counts how often the stored keys and values of a text's last segment are read."""
    read: list[Key] = []
    scan = lm.db.store.scan

    def counted(key: Key, *arguments: Any, **options: Any) -> bool:
        read.append(key)
        return scan(key, *arguments, **options)

    monkeypatch.setattr(lm.db.store, "scan", counted)

    def count(text: bp.Text) -> int:
        return read.count(Key(address(text.segments()[-1].id, lm.weights_id, lm.tokenizer_id), Part.KV))

    return count


def assert_right(lm: bp.LanguageModel, text: bp.Text) -> None:
    result = text()
    logprobs, logits = plain_logprobs(lm.model, result.input_ids)
    assert torch.allclose(result.token_logprobs, logprobs, atol=1e-4, equal_nan=True)
    assert torch.allclose(result.logits.log_softmax(-1), logits.log_softmax(-1), atol=1e-4)


def stored(lm: bp.LanguageModel, *texts: bp.Text) -> None:
    """Store texts, as another process would have done: nothing of them is in memory."""
    lm(texts)
    lm.db.flush()
    lm.db.memory.clear()


def test_a_prefix_that_many_prompts_share_is_read_once(
    lm: bp.LanguageModel, num_reads: Callable[[bp.Text], int]
) -> None:
    context = lm.text("Pick the endpoint.\n")
    stored(lm, context)
    for number in range(20):
        assert_right(lm, context + f"request {number}")
    assert num_reads(context) == 1


def test_prompts_that_take_turns_keep_their_prefixes(lm: bp.LanguageModel, num_reads: Callable[[bp.Text], int]) -> None:
    contexts = [lm.text("Pick the endpoint.\n"), lm.text("Say hello.\n"), lm.text("Pick the endpoint, please.\n")]
    stored(lm, *contexts)
    for number in range(5):
        for context in contexts:
            assert_right(lm, context + f"request {number}")
    assert [num_reads(context) for context in contexts] == [1, 1, 1]


def test_documents_after_one_system_prompt_stay_side_by_side(
    lm: bp.LanguageModel, num_reads: Callable[[bp.Text], int]
) -> None:
    system = lm.text("Pick.\n")
    documents = [system + f"Document {number}:" + " GET /users lists users." * 3 for number in range(4)]
    stored(lm, *documents)
    for number in range(4):
        for document in documents:
            assert_right(lm, document + f" request {number}")
    assert [num_reads(document) for document in documents] == [1, 1, 1, 1]


def test_a_growing_chat_reads_nothing_again(lm: bp.LanguageModel, num_reads: Callable[[bp.Text], int]) -> None:
    chat = lm.text("Hello.\n")
    for number in range(8):
        chat += f"turn {number}\n"
        assert_right(lm, chat)
    assert num_reads(chat) == 0


def test_branches_of_one_prefix_do_not_disturb_each_other(lm: bp.LanguageModel) -> None:
    context = lm.text("Pick the endpoint.\n")
    left, right = context + "left left left", context + "right"
    stored(lm, left, right)
    for number in range(4):
        assert_right(lm, left + f" and {number}")
        assert_right(lm, right + f" or {number}")


def test_without_a_budget_everything_is_read_each_time(make_lm: Any, tmp_path: Path) -> None:
    with bp.open(tmp_path / "none", memory_nbytes=0) as db:
        lm = make_lm(db=db)
        context = lm.text("Pick the endpoint.\n")
        stored(lm, context)
        assert_right(lm, context + "request")
        assert_right(lm, context + "another")
        assert db.memory.nbytes == 0


def test_memory_stays_within_its_budget(make_lm: Any, tmp_path: Path) -> None:
    with bp.open(tmp_path / "little", memory_nbytes=200_000) as db:
        lm = make_lm(db=db)
        for number in range(30):
            assert_right(lm, lm.text(f"context number {number}\n") + "request")
            assert db.memory.nbytes <= 200_000


def test_a_database_that_is_closed_in_the_middle_of_a_pass_keeps_nothing(
    lm: bp.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = lm.text("Pick the endpoint.\n")
    stored(lm, context)
    scan = lm.db.store.scan

    def scan_and_close(key: Key, *arguments: Any, **options: Any) -> bool:
        is_there = scan(key, *arguments, **options)
        lm.db.close()
        return is_there

    monkeypatch.setattr(lm.db.store, "scan", scan_and_close)
    with pytest.raises(bp.errors.StoreClosed):
        (context + "request")()
    assert lm.db.memory.nbytes == 0


def test_changed_weights_never_meet_a_buffer_of_the_old_ones(lm: bp.LanguageModel) -> None:
    context = lm.text("Pick the endpoint.\n")
    assert_right(lm, context + "request")
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.mul_(1.5)
    assert_right(lm, context + "request")
    assert_right(lm, context + "another")


def test_completions_of_one_token_cost_no_model_call(lm: bp.LanguageModel) -> None:
    prompt = lm.text("The quick")
    prompt()
    calls = lm.counters.num_model_calls
    completions = [completion for completion in "abcdefgh" if len(lm.tokenizer(completion)["input_ids"]) == 1]
    assert len(completions) > 1
    scores = lm.score(prompt, completions)
    assert lm.counters.num_model_calls == calls
    expected = prompt().logits.log_softmax(-1)
    ids = [lm.tokenizer(completion)["input_ids"][0] for completion in completions]
    assert torch.allclose(torch.tensor(scores).float(), expected[ids], atol=1e-4)


def test_a_scored_completion_that_is_continued_costs_itself_alone(lm: bp.LanguageModel) -> None:
    prompt, completion = lm.text("The quick"), " brown fox jumps over the lazy dog"
    prompt()
    score = lm.score(prompt, [completion])[0]
    lm.db.flush()
    before = lm.counters.num_computed_tokens
    num_tokens = len(lm.tokenizer(completion)["input_ids"])
    continued = prompt + completion + ", twice."
    result = continued()
    others = len(lm.tokenizer(", twice.")["input_ids"])
    assert lm.counters.num_computed_tokens - before == num_tokens + others
    logprobs, _ = plain_logprobs(lm.model, result.input_ids)
    assert torch.allclose(result.token_logprobs, logprobs, atol=1e-4, equal_nan=True)
    # What was scored first stays as it is, to the last bit.
    assert lm.score(prompt, [completion])[0] == score


def test_the_likeliest_tokens_are_those_of_the_logits(lm: bp.LanguageModel) -> None:
    result = lm.text("The quick")()
    logprobs = result.logits.log_softmax(-1)
    best = logprobs.topk(5)
    top = result.top_k(5)
    assert [token for token, _ in top] == best.indices.tolist()
    assert torch.allclose(torch.tensor([logprob for _, logprob in top]), best.values, atol=1e-5)
    wrong: list[Any] = [0, len(logprobs) + 1, "a", 1.5, None]
    for each in wrong:
        with pytest.raises(bp.errors.PromptError, match="number of tokens"):
            result.top_k(each)
