"""What is stored of what is computed: scores always, the rest where something follows or may follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import backprompt_db as bp
from backprompt_db.errors import ModelMismatch, PromptError
from backprompt_db.prompt.representation import OWN_PARTS, Part
from tests.conftest import plain_logprobs
from tests.support.stored import parts_of

MakeLM = Callable[..., bp.LanguageModel]

ALL, SCORES = set(OWN_PARTS), {Part.SCORES}
CONTEXT = "Say whether the review is good."
REVIEWS = [f"\nReview {number}: the film was {word}" for number, word in enumerate(["long", "short", "loud", "good"])]


class TestRuns:
    def test_a_text_that_begins_a_prompt_is_kept(self, lm: bp.LanguageModel) -> None:
        lm(CONTEXT)
        assert parts_of(lm, lm.text(CONTEXT)) == [{Part.SCORES, Part.KV, Part.LOGITS}]

    def test_the_first_continuation_is_kept_and_of_further_ones_only_scores(self, lm: bp.LanguageModel) -> None:
        context = lm.text(CONTEXT)
        for review in REVIEWS:
            lm(context + review)
        assert [parts_of(lm, context + review)[-1] for review in REVIEWS] == [ALL, SCORES, SCORES, SCORES]
        assert parts_of(lm, context) == [ALL]

    def test_of_continuations_that_come_together_only_scores_are_kept(self, lm: bp.LanguageModel) -> None:
        context = lm.text(CONTEXT)
        lm([context + review for review in REVIEWS])
        assert [parts_of(lm, context + review)[-1] for review in REVIEWS] == [SCORES] * 4
        assert parts_of(lm, context) == [ALL]
        lm(context + " One more.")
        assert parts_of(lm, context + " One more.")[-1] == SCORES

    def test_a_later_process_knows_what_has_gone_on(self, lm: bp.LanguageModel, make_lm: MakeLM, open_db: Any) -> None:
        lm(lm.text(CONTEXT) + REVIEWS[0])
        directory = lm.db.directory
        lm.db.close()
        other = make_lm(db=open_db(directory))
        other(other.text(CONTEXT) + REVIEWS[1])
        assert parts_of(other, other.text(CONTEXT) + REVIEWS[1])[-1] == SCORES

    def test_a_document_that_grows_is_computed_once(self, lm: bp.LanguageModel) -> None:
        document = lm.text(CONTEXT)
        for piece in (" It was", " a long", " evening."):
            document += piece
            document()
        assert lm.counters.num_computed_tokens == document().input_ids.numel()

    def test_what_is_computed_for_the_second_time_is_kept(self, lm: bp.LanguageModel) -> None:
        context = lm.text(CONTEXT)
        lm([context + review for review in REVIEWS])
        lm(context + REVIEWS[1] + ", and so on")
        assert parts_of(lm, context + REVIEWS[1])[-1] == ALL
        before = lm.counters.num_computed_tokens
        other = lm(context + REVIEWS[1] + ", as ever")
        assert lm.counters.num_computed_tokens - before == other.num_computed_tokens
        assert other.is_computed == (False, False, True)

    def test_a_second_run_of_all_of_it_computes_nothing(self, lm: bp.LanguageModel, make_lm: MakeLM) -> None:
        texts = [bp.Text(CONTEXT) + review for review in ("", *REVIEWS)]
        first = lm(texts)
        other = make_lm(db=lm.db)
        for before, after in zip(first, other(texts), strict=True):
            assert torch.equal(before.token_logprobs[1:], after.token_logprobs[1:])
        assert other.counters.num_model_calls == 0


class TestLogits:
    def test_those_that_were_asked_for_are_found_later(self, lm: bp.LanguageModel, make_lm: MakeLM) -> None:
        first = lm([lm.text(CONTEXT) + review for review in REVIEWS])
        assert parts_of(lm, first[1].text)[-1] == SCORES
        assert first[1].top_k(1)
        assert parts_of(lm, first[1].text)[-1] == {Part.SCORES, Part.LOGITS}
        other = make_lm(db=lm.db)
        assert torch.equal(other(bp.Text(CONTEXT) + REVIEWS[1]).logits, first[1].logits)
        assert other.counters.num_model_calls == 0

    def test_those_that_nobody_asked_for_are_computed_when_somebody_does(
        self, lm: bp.LanguageModel, make_lm: MakeLM
    ) -> None:
        context = bp.Text(CONTEXT)
        lm([context + review for review in REVIEWS])
        other = make_lm(db=lm.db)
        result = other(context + REVIEWS[2])
        assert other.counters.num_model_calls == 0
        _, plain = plain_logprobs(other.model, result.input_ids)
        assert torch.allclose(result.logits.log_softmax(-1), plain.log_softmax(-1), atol=1e-4)
        assert other.counters.num_model_calls == 1
        assert parts_of(lm, result.text)[-1] == {Part.SCORES, Part.LOGITS}

    def test_a_model_that_has_changed_is_not_asked(self, lm: bp.LanguageModel) -> None:
        context = lm.text(CONTEXT)
        lm([context + review for review in REVIEWS])
        result = lm(context + REVIEWS[2])
        with torch.no_grad():
            next(lm.model.parameters()).mul_(2)
        with pytest.raises(ModelMismatch, match="has changed"):
            _ = result.logits

    def test_those_of_a_result_are_there_after_the_database_was_closed(self, lm: bp.LanguageModel) -> None:
        results = lm([lm.text(CONTEXT) + review for review in REVIEWS])
        lm.db.close()
        assert results[0].logits.isfinite().all()


class TestScores:
    def test_of_prompts_and_completions_only_scores_are_kept(self, lm: bp.LanguageModel) -> None:
        prompts = [lm.text(CONTEXT) + review for review in REVIEWS]
        lm.score(prompts, [" yes", " no"])
        assert [parts_of(lm, prompt) for prompt in prompts] == [[ALL, SCORES]] * 4
        assert parts_of(lm, prompts[0] + " yes")[-1] == SCORES

    def test_other_completions_compute_a_prompt_once_more_and_then_never(self, lm: bp.LanguageModel) -> None:
        prompt = lm.text(CONTEXT) + REVIEWS[0]
        lm.score(prompt, [" yes"])
        lm.score(prompt, [" no"])
        assert parts_of(lm, prompt) == [ALL, ALL]
        before = lm.counters.num_computed_tokens
        lm.score(prompt, [" maybe"])
        assert lm.counters.num_computed_tokens - before == len(lm.tokenizer(" maybe")["input_ids"])

    def test_completions_are_what_they_are_whatever_is_kept(self, lm: bp.LanguageModel, make_lm: MakeLM) -> None:
        prompts, completions = [bp.Text(CONTEXT) + review for review in REVIEWS], [" yes", " no", " maybe so"]
        expected = make_lm(db=bp.open(":memory:")).score(prompts, completions, keep="all")
        assert np.allclose(lm.score(prompts, completions[:1]), expected[:, :1], atol=1e-4)
        assert np.allclose(lm.score(prompts, completions), expected, atol=1e-4)


class TestAsked:
    @pytest.mark.parametrize(
        ("keep", "parts"),
        [("all", ALL), ("scores", SCORES), (["kv"], {Part.KV}), (("scores", "logits"), {Part.SCORES, Part.LOGITS})],
    )
    def test_a_call_says_what_is_kept_of_every_piece(self, lm: bp.LanguageModel, keep: Any, parts: set[Part]) -> None:
        prompt = lm.text(CONTEXT) + REVIEWS[0]
        lm(prompt, keep=keep)
        assert parts_of(lm, prompt) == [parts, parts]

    def test_a_model_says_it_for_all_calls(self, gpt2: Any, tokenizer: Any, db: bp.Database) -> None:
        lm = bp.LanguageModel(gpt2, tokenizer, db=db, keep="all")
        assert lm.keep == "all"
        lm.score(lm.text(CONTEXT) + REVIEWS[0], [" yes"])
        assert parts_of(lm, lm.text(CONTEXT) + REVIEWS[0]) == [ALL, ALL]
        lm.keep = ["scores"]
        lm(lm.text(CONTEXT) + REVIEWS[1])
        assert parts_of(lm, lm.text(CONTEXT) + REVIEWS[1])[-1] == SCORES

    def test_a_generation_keeps_what_it_is_told_to(self, lm: bp.LanguageModel) -> None:
        result = lm.generate(lm.text(CONTEXT) + REVIEWS[0], max_new_tokens=3, keep="scores")
        assert parts_of(lm, result.prompt) == [SCORES, SCORES]
        other = lm.generate(lm.text(CONTEXT) + REVIEWS[1], max_new_tokens=3)
        assert parts_of(lm, other.prompt) == [ALL, ALL]

    @pytest.mark.parametrize("keep", ["everything", [], ["kv", "values"], "auto scores", ["auto", "kv"]])
    def test_anything_else_is_refused(self, lm: bp.LanguageModel, keep: Any) -> None:
        with pytest.raises(PromptError, match="are no parts"):
            lm(CONTEXT, keep=keep)
        with pytest.raises(PromptError, match="are no parts"):
            lm.keep = keep
        assert lm.keep == "auto"

    def test_keys_and_values_that_are_asked_for_are_kept(self, lm: bp.LanguageModel) -> None:
        results = lm([lm.text(CONTEXT) + review for review in REVIEWS])
        assert results[1].past_key_values.get_seq_length() == results[1].input_ids.numel()
        assert Part.KV in parts_of(lm, results[1].text)[-1]


PIECES = st.lists(st.sampled_from([" the", " quick", " brown", " fox", "\n", ", and"]), min_size=1, max_size=4)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(PIECES, st.sampled_from(["run", "score", "logits", "together"])), min_size=1, max_size=8))
def test_results_are_right_and_no_token_is_computed_more_than_three_times(
    make_lm: MakeLM, steps: list[tuple[list[str], str]]
) -> None:
    with bp.open(":memory:") as db:
        lm = make_lm(db=db)
        num_tokens: dict[Any, int] = {}
        for pieces, kind in steps:
            text = lm.text("Once", seams="keep")
            for piece in pieces:
                text += piece
            results = lm([text, text + " end"] if kind == "together" else [text]) if kind != "score" else []
            for result in results:
                logprobs, logits = plain_logprobs(lm.model, result.input_ids)
                assert torch.allclose(result.token_logprobs[1:], logprobs[1:], atol=1e-4)
                if kind == "logits":
                    assert torch.allclose(result.logits, logits, atol=1e-4)
            if kind == "score":
                assert np.isfinite(lm.score(text, [" a", " b"])).all()
            ids = lm.tokenizer
            for segment in (text + " end").segments() + (text + " a").segments() + (text + " b").segments():
                num_tokens[segment.id] = len(ids(segment.string)["input_ids"])
        # Once for its scores, once for what follows it, and once if only its logits were asked for in between.
        assert lm.counters.num_computed_tokens <= 3 * sum(num_tokens.values())
