"""Results equal one plain forward pass over the same tokens, whatever the shape of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import backprompt_db as bp
from backprompt_db.compute.inference.kv_cache import CACHE_KEYWORD
from backprompt_db.prompt.ids import SegmentId
from backprompt_db.prompt.segments import Segment
from backprompt_db.prompt.text import Text
from tests.conftest import plain_logprobs
from tests.support.families import graphs

TOLERANCE = 1e-4


def masked_logprobs(
    model: Any, segments: Sequence[Segment], ids: dict[SegmentId, list[int]]
) -> dict[SegmentId, torch.Tensor]:
    """The oracle for graphs: one pass, with a mask and position ids written from the definition, token by token.

    Returns the log-softmax after each token of each segment.
    """
    visible: dict[SegmentId, set[SegmentId]] = {}
    start: dict[SegmentId, int] = {}
    for s in segments:
        visible[s.id] = set().union(*(visible[p.id] | {p.id} for p in s.parents)) if s.parents else set()
        last = [start[p.id] + len(ids[p.id]) - 1 for p in s.parents]
        start[s.id] = s.start if s.start is not None else (max(last) + 1 if last else 0)
    tokens = [(s.id, i) for s in segments for i in range(len(ids[s.id]))]
    mask = torch.full((1, 1, len(tokens), len(tokens)), torch.finfo(torch.float32).min)
    for row, (own, i) in enumerate(tokens):
        for column, (other, j) in enumerate(tokens):
            if other in visible[own] or (other == own and j <= i):
                mask[0, 0, row, column] = 0.0
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([[ids[s][i] for s, i in tokens]]),
            position_ids=torch.tensor([[start[s] + i for s, i in tokens]]),
            attention_mask=mask,
        ).logits[0]
    after = {s.id: [row for row, (own, _) in enumerate(tokens) if own == s.id] for s in segments}
    return {own: logits[rows].log_softmax(-1) for own, rows in after.items()}


def assert_equals_oracle(lm: bp.LanguageModel, text: Text, result: bp.ModelRepr) -> None:
    """Compare every log-probability and the last logits with the masked oracle."""
    segments = text.segments()
    ids = {s.id: list(lm.tokenizer(s.string)["input_ids"]) for s in segments}
    expected = masked_logprobs(lm.model, segments, ids)
    logprobs = iter(torch.split(result.token_logprobs, [len(ids[s.id]) for s in segments]))
    for s in segments:
        actual = next(logprobs)
        rows = expected[s.id]
        own = rows[:-1].gather(1, torch.tensor(ids[s.id][1:])[:, None])[:, 0]
        assert torch.allclose(actual[1:], own, atol=TOLERANCE)
        if len(s.parents) == 1:
            assert abs(actual[0] - expected[s.parents[0].id][-1, ids[s.id][0]]) < TOLERANCE
        else:
            assert actual[0].isnan()
    tips = text.tips()
    if len(tips) == 1:
        assert torch.allclose(result.logits.log_softmax(-1), expected[tips[0].id][-1], atol=TOLERANCE)
    assert result.input_ids.tolist() == [i for s in segments for i in ids[s.id]]


def test_a_chain_equals_a_plain_forward_pass(lm: bp.LanguageModel) -> None:
    result = (lm.text("Pick the endpoint.\n") + "Request: hello" + "\nEndpoint:")()
    logprobs, logits = plain_logprobs(lm.model, result.input_ids)
    assert torch.allclose(result.token_logprobs, logprobs, atol=TOLERANCE, equal_nan=True)
    assert torch.allclose(result.logits, logits, atol=TOLERANCE)
    assert result.token_logprobs[0].isnan()


def test_continuing_from_stored_keys_and_values_equals_a_plain_forward_pass(
    lm: bp.LanguageModel, make_lm: Callable[..., bp.LanguageModel]
) -> None:
    context = "The quick brown fox jumps over the lazy dog.\n"
    lm(context)
    other = make_lm(db=lm.db)
    result = (other.text(context) + "Request: what does the dog mind?")()
    logprobs, logits = plain_logprobs(lm.model, result.input_ids)
    assert 0 < result.num_computed_tokens < len(result.input_ids)
    assert torch.allclose(result.token_logprobs, logprobs, atol=TOLERANCE, equal_nan=True)
    assert torch.allclose(result.logits, logits, atol=TOLERANCE)


def test_a_batch_equals_plain_forward_passes_and_computes_shared_prefixes_once(lm: bp.LanguageModel) -> None:
    context = lm.text("Pick the endpoint for the request.\n")
    prompts = [context + f"Request: number {n}" + "\nEndpoint:" for n in range(5)]
    results = lm(prompts)
    for result in results:
        logprobs, logits = plain_logprobs(lm.model, result.input_ids)
        assert torch.allclose(result.token_logprobs, logprobs, atol=TOLERANCE, equal_nan=True)
        assert torch.allclose(result.logits, logits, atol=TOLERANCE)
    distinct = {s.id: len(lm.tokenizer(s.string)["input_ids"]) for p in prompts for s in p.segments()}
    assert sum(r.num_computed_tokens for r in results) == sum(distinct.values()) == lm.counters.num_computed_tokens
    assert lm.counters.num_model_calls == 1


def test_scores_are_sums_of_plain_log_probabilities(lm: bp.LanguageModel) -> None:
    prompts = ["Request: list users\nEndpoint:", "Request: make an order\nEndpoint:"]
    completions = [" GET /users", " POST /orders", " DELETE /users"]
    scores = lm.score(prompts, completions)
    for row, prompt in enumerate(prompts):
        for column, completion in enumerate(completions):
            begin, end = (list(lm.tokenizer(piece)["input_ids"]) for piece in (prompt, completion))
            logprobs, _ = plain_logprobs(lm.model, torch.tensor(begin + end))
            assert abs(scores[row, column] - float(logprobs[len(begin) :].sum())) < TOLERANCE * len(end)
    assert np.array_equal(lm.score(prompts[0], completions), scores[0])


def test_parallel_branches_do_not_see_each_other_and_what_follows_sees_all(lm: bp.LanguageModel) -> None:
    text = lm.text("context: ") + bp.parallel("document one.", "the other document", "third") + " question" + "?"
    assert_equals_oracle(lm, text, text())


def test_the_order_of_branches_changes_no_stored_value(lm: bp.LanguageModel) -> None:
    context = lm.text("context: ")
    first = (context + bp.parallel("doc one", "doc two") + " question?")()
    second = (context + bp.parallel("doc two", "doc one") + " question?")()
    assert second.num_computed_tokens == 0
    assert torch.equal(first.logits, second.logits)


def test_a_branch_is_shared_with_the_plain_chain(lm: bp.LanguageModel) -> None:
    context = lm.text("context:")
    (context + " doc one")()
    result = (context + bp.parallel(" doc one", " doc two"))()
    assert result.num_computed_tokens == len(lm.tokenizer(" doc two")["input_ids"])


def test_a_text_that_ends_in_branches_has_no_logits(lm: bp.LanguageModel) -> None:
    result = (lm.text("context: ") + bp.parallel("one", "two"))()
    with pytest.raises(bp.errors.PromptError, match="parallel branches"):
        _ = result.logits


def test_an_explicit_start_moves_the_position_ids(lm: bp.LanguageModel) -> None:
    text = lm.text("context: ") + lm.text("far away", start=100) + " and on"
    result = text()
    assert_equals_oracle(lm, text, result)
    plain = (lm.text("context: ") + "far away" + " and on")()
    assert not torch.allclose(result.logits, plain.logits, atol=1e-2)


GRAPHS = graphs(alphabet="ab \n.?", max_leaves=8)


@given(graphs=st.lists(GRAPHS, min_size=1, max_size=3), stored=GRAPHS)
def test_any_graph_equals_the_masked_oracle(
    make_lm: Callable[..., bp.LanguageModel], graphs: list[Text], stored: Text
) -> None:
    with bp.open(":memory:") as db:
        lm = make_lm(db=db)
        stored = Text("", seams="keep") + stored
        lm([stored])
        texts = [stored + text for text in graphs]
        for text, result in zip(texts, lm(texts), strict=True):
            assert_equals_oracle(lm, text, result)


def test_past_key_values_continue_like_a_plain_cache(lm: bp.LanguageModel) -> None:
    result = (lm.text("The quick brown fox") + " jumps over")()
    more = torch.tensor([lm.tokenizer(" the lazy dog")["input_ids"]])
    with torch.no_grad():
        continued = lm.model(more, **{CACHE_KEYWORD: result.past_key_values}).logits[0]
        plain = lm.model(torch.cat([result.input_ids[None], more], 1)).logits[0]
    assert torch.allclose(continued, plain[-more.shape[1] :], atol=TOLERANCE)


def test_past_key_values_generate_like_a_plain_prompt(lm: bp.LanguageModel) -> None:
    result = lm("Request: list all users\nEndpoint:")
    ids = result.input_ids[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "attention_mask": torch.ones_like(ids)}
    cache = result.past_key_values
    cache.crop(-1)
    ours = lm.model.generate(ids, **{CACHE_KEYWORD: cache}, **options)
    assert torch.equal(ours, lm.model.generate(ids, **options))


def test_start_tokens_come_once_at_the_beginning(
    gpt2: Any, tokenizer_with_bos: Any, make_lm: Callable[..., bp.LanguageModel], db: bp.Database
) -> None:
    lm = bp.LanguageModel(gpt2, tokenizer_with_bos, db=db)
    result = (lm.text("The quick") + " brown fox")()
    expected = tokenizer_with_bos("The quick")["input_ids"] + tokenizer_with_bos(" brown fox")["input_ids"][1:]
    assert result.input_ids.tolist() == expected
    logprobs, _ = plain_logprobs(gpt2, result.input_ids)
    assert torch.allclose(result.token_logprobs, logprobs, atol=TOLERANCE, equal_nan=True)


def test_a_model_in_training_mode_is_run_in_evaluation_mode_and_left_as_it_was(lm: bp.LanguageModel) -> None:
    lm.model.train()
    lm.model.transformer.h[1].eval()
    result = lm("The quick brown fox")
    assert lm.model.training
    assert not lm.model.transformer.h[1].training
    logprobs, _ = plain_logprobs(lm.model.eval(), result.input_ids)
    assert torch.allclose(result.token_logprobs, logprobs, atol=TOLERANCE, equal_nan=True)


def test_a_long_chain_of_pieces_is_exact(lm: bp.LanguageModel) -> None:
    text = lm.text("a")
    for number in range(120):
        text += " b" if number % 3 else ".c"
    result = text()
    logprobs, _ = plain_logprobs(lm.model, result.input_ids)
    assert torch.allclose(result.token_logprobs, logprobs, atol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_bit_for_bit(
    make_lm: Callable[..., bp.LanguageModel], gpt2: Any, dtype: torch.dtype
) -> None:
    lm = make_lm(gpt2.to(dtype))
    first = (lm.text("The quick brown") + " fox")()
    other = make_lm(gpt2, db=lm.db)
    again = (other.text("The quick brown") + " fox")()
    assert first.logits.dtype == dtype
    assert again.num_computed_tokens == 0
    assert torch.equal(again.logits, first.logits)
    assert again.past_key_values.layers[0].keys.dtype == dtype
    for ours, theirs in zip(again.past_key_values.layers, first.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
