"""What was generated once is found again, cut or gone on with, and is always what a plain call gives."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, MinLengthLogitsProcessor
from transformers.generation.streamers import BaseStreamer

import backprompt_db as bp
from backprompt_db.catalog.records import Selection
from backprompt_db.errors import PromptError
from backprompt_db.operations.purge import purge
from tests.conftest import tiny_gpt2
from tests.support.generation import assert_equals_plain, only_digits, plain
from tests.support.scripts import run_here, run_in_a_process

MakeLM = Callable[..., bp.LanguageModel]

CONTEXT = "Pick the endpoint for the request.\n"
PROMPTS = [CONTEXT + "Request: show me everyone", "Request:", "The quick brown fox jumps over the lazy dog"]

RUN = """
import json, sys
import backprompt_db as bp
with bp.open(sys.argv[1]) as db:
    lm = bp.LanguageModel.from_pretrained(sys.argv[2], db=db)
    prompts = [lm.text("The quick brown fox") + " jumps over", lm.text("The lazy") + " dog"]
    results = [
        *lm.generate(prompts, max_new_tokens=6, do_sample=False, **json.loads(sys.argv[3])),
        *lm.generate(prompts, max_new_tokens=6, do_sample=True, seed=7, **json.loads(sys.argv[3])),
    ]
    print(json.dumps({
        "found": [[result.string, list(result.ids), result.logprobs.tolist()] for result in results],
        "decoded": [result.num_decoded_tokens for result in results],
        "modules": [name for name in ("torch", "transformers", "tokenizers") if name in sys.modules],
        "calls": lm.counters.num_model_calls,
        "is_loaded": lm.is_loaded,
    }))
"""


def digits(lm: bp.LanguageModel) -> dict[str, Any]:
    return only_digits(lm.tokenizer)


def values(results: Any) -> list[Any]:
    return [(each.string, list(each.ids), each.logprobs.tolist(), each.is_stored) for each in results]


class TestFoundAgain:
    @pytest.mark.parametrize(
        "told",
        [{}, {"do_sample": True, "seed": 3}, {"num_beams": 3}, {"repetition_penalty": 1.3}, {"stop_strings": ["3"]}],
        ids=str,
    )
    def test_a_second_handle_makes_no_model_call(
        self, lm: bp.LanguageModel, make_lm: MakeLM, open_db: Any, told: dict[str, Any]
    ) -> None:
        first = lm.generate(PROMPTS, max_new_tokens=8, **told, **digits(lm))
        assert sum(each.num_decoded_tokens for each in first) > 0
        lm.db.close()
        other = make_lm(db=open_db(lm.db.directory))
        again = other.generate(PROMPTS, max_new_tokens=8, **told, **digits(lm))
        assert values(again) == values(first)
        assert (other.counters.num_model_calls, other.counters.num_decoded_tokens) == (0, 0)
        assert all(each.text().num_computed_tokens == 0 for each in again)

    def test_a_second_process_loads_nothing(self, tmp_path: Path, tokenizer: Any) -> None:
        tiny_gpt2().save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        told = json.dumps(only_digits(tokenizer))
        first, second = (run(RUN, tmp_path / "db", tmp_path / "model", told) for run in (run_here, run_in_a_process))
        assert first["calls"] > 0
        assert second == {**first, "decoded": [0] * 4, "modules": [], "calls": 0, "is_loaded": False}

    def test_a_database_in_memory_remembers_too(self, make_lm: MakeLM) -> None:
        with bp.open(":memory:") as db:
            lm = make_lm(db=db)
            first = lm.generate(PROMPTS, **digits(lm))
            assert values(lm.generate(PROMPTS, **digits(lm))) == values(first)
            assert lm.counters.num_decoded_tokens == sum(len(each.ids) for each in first)

    def test_a_prompt_that_is_new_in_a_batch_is_generated_alone(self, lm: bp.LanguageModel) -> None:
        lm.generate(PROMPTS[:2], **digits(lm))
        results = lm.generate(PROMPTS, **digits(lm))
        assert [each.num_decoded_tokens for each in results] == [0, 0, 20]
        for result in results:
            assert_equals_plain(lm, result, **digits(lm))

    def test_a_chat_is_found_again(self, lm: bp.LanguageModel, make_lm: MakeLM) -> None:
        template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
        messages = [{"role": "user", "content": "Show me everyone"}]
        prompt = lm.chat(messages, chat_template=template)
        first = lm.generate(prompt, **digits(lm))
        other = make_lm(db=lm.db)
        again = other.generate(other.chat(messages, chat_template=template), **digits(lm))
        assert values([again]) == values([first])
        assert other.counters.num_model_calls == 0

    def test_a_streamer_is_given_the_same(self, lm: bp.LanguageModel) -> None:
        class Recorder(BaseStreamer):  # type: ignore[misc]  # transformers is untyped
            def __init__(self) -> None:
                self.seen: list[Any] = []

            def put(self, value: torch.Tensor) -> None:
                self.seen.append(value.tolist())

            def end(self) -> None:
                self.seen.append("end")

        recorders = [Recorder(), Recorder()]
        for recorder in recorders:
            lm.generate(PROMPTS[0], streamer=recorder, **digits(lm))
        assert recorders[0].seen == recorders[1].seen
        assert lm.counters.num_decoded_tokens == 20


class TestLength:
    def test_a_shorter_one_is_the_beginning_of_a_longer_one(self, lm: bp.LanguageModel) -> None:
        lm.generate(PROMPTS, max_new_tokens=12, **digits(lm))
        before = lm.counters
        for result in lm.generate(PROMPTS, max_new_tokens=5, **digits(lm)):
            assert_equals_plain(lm, result, max_new_tokens=5, **digits(lm))
            assert result.string == lm.tokenizer.decode(result.token_ids)
        assert lm.counters.num_decoded_tokens == before.num_decoded_tokens

    def test_what_was_cut_short_is_gone_on_with(self, lm: bp.LanguageModel, make_lm: MakeLM) -> None:
        lm.generate(PROMPTS[:2], max_new_tokens=5, **digits(lm))
        other = make_lm(db=lm.db)
        results = other.generate(PROMPTS, max_new_tokens=12, **digits(lm))
        assert [each.num_decoded_tokens for each in results] == [7, 7, 12]
        for result in results:
            assert_equals_plain(other, result, max_new_tokens=12, **digits(lm))
            assert result.is_stored
            assert result.text().num_computed_tokens == 0

    def test_what_ended_by_itself_is_not_gone_on_with(self, lm: bp.LanguageModel) -> None:
        (first,) = lm.generate(PROMPTS[:1], max_new_tokens=1, **digits(lm))
        told = {"eos_token_id": list(lm.generate(PROMPTS[0], max_new_tokens=4, **digits(lm)).ids)[2], **digits(lm)}
        short = lm.generate(PROMPTS[0], max_new_tokens=10, **told)
        before = lm.counters.num_decoded_tokens
        longer = lm.generate(PROMPTS[0], max_new_tokens=30, **told)
        assert values([longer]) == values([short])
        assert lm.counters.num_decoded_tokens == before
        assert first.num_decoded_tokens == 1

    def test_where_the_prompt_ends_matters_to_some_arguments(self, lm: bp.LanguageModel) -> None:
        eos = list(lm.generate(PROMPTS[0], max_new_tokens=4, **digits(lm)).ids)[3]
        told = {"eos_token_id": eos, "min_new_tokens": 5, **digits(lm)}
        lm.generate(PROMPTS[0], max_new_tokens=6, **told)
        result = lm.generate(PROMPTS[0], max_new_tokens=12, **told)
        tokens, _ = plain(lm.model, lm(PROMPTS[0]).input_ids.tolist(), max_new_tokens=12, **told)
        assert list(result.ids) == tokens

    @given(
        st.lists(
            st.tuples(
                st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=3),
                st.integers(1, 9),
                st.sampled_from([{}, {"stop_strings": ["7", "4"]}, {"repetition_penalty": 1.5}, {"store": False}]),
                st.sampled_from(["auto", "scores"]),
            ),
            min_size=2,
            max_size=4,
        )
    )
    def test_any_sequence_of_calls_gives_what_plain_calls_give(
        self, make_lm: MakeLM, calls: list[tuple[list[str], int, dict[str, Any], str]]
    ) -> None:
        with bp.open(":memory:") as db:
            lm = make_lm(db=db)
            for prompts, num_tokens, told, keep in calls:
                results = lm.generate(prompts, max_new_tokens=num_tokens, keep=keep, **told, **digits(lm))
                for result in results:
                    kept = {name: value for name, value in told.items() if name != "store"}
                    if "stop_strings" in kept:
                        kept["tokenizer"] = lm.tokenizer
                    assert_equals_plain(lm, result, max_new_tokens=num_tokens, **kept, **digits(lm))


class TestNotRemembered:
    @pytest.mark.parametrize(
        "told", [{"do_sample": True}, {"store": False}, {"max_time": 100.0}, {"logits_processor": None}], ids=str
    )
    def test_what_cannot_be_repeated_is_generated_again(self, lm: bp.LanguageModel, told: dict[str, Any]) -> None:
        if "logits_processor" in told:
            told = {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(2, 0)])}
        for _ in range(2):
            lm.generate(PROMPTS[1], max_new_tokens=3, **told, **digits(lm))
        assert lm.counters.num_decoded_tokens == 6

    def test_a_model_that_has_changed_generates_again(self, lm: bp.LanguageModel) -> None:
        lm.generate(PROMPTS[1], **digits(lm))
        with torch.no_grad():
            next(lm.model.parameters()).mul_(-1)
        assert_equals_plain(lm, lm.generate(PROMPTS[1], **digits(lm)), **digits(lm))
        assert lm.counters.num_decoded_tokens == 40

    def test_a_generation_configuration_that_has_changed_counts(self, lm: bp.LanguageModel) -> None:
        lm.generate(PROMPTS[1], **digits(lm))
        lm.model.generation_config.repetition_penalty = 1.9
        try:
            result = lm.generate(PROMPTS[1], **digits(lm))
            assert_equals_plain(lm, result, **digits(lm))
            assert lm.counters.num_decoded_tokens == 40
        finally:
            lm.model.generation_config.repetition_penalty = None

    def test_other_arguments_are_another_question(self, lm: bp.LanguageModel) -> None:
        results: list[Any] = [
            lm.generate(PROMPTS[1], max_new_tokens=4, **told, **digits(lm))
            for told in ({"do_sample": True, "seed": 1}, {"do_sample": True, "seed": 2}, {"num_beams": 2}, {})
        ]
        assert [each.num_decoded_tokens for each in results] == [4] * 4


class TestSeeds:
    def test_a_seed_gives_what_a_plain_call_gives_with_it(self, lm: bp.LanguageModel) -> None:
        result = lm.generate(PROMPTS[1], max_new_tokens=9, do_sample=True, seed=11, **digits(lm))
        ids = lm(PROMPTS[1]).input_ids.tolist()
        torch.manual_seed(11)
        tokens, _ = plain(lm.model, ids, max_new_tokens=9, do_sample=True, **digits(lm))
        assert list(result.ids) == tokens

    def test_the_numbers_of_the_process_stay_as_they_are(self, lm: bp.LanguageModel) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        lm.generate(PROMPTS[1], max_new_tokens=3, do_sample=True, seed=11, **digits(lm))
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize("seed", [-1, "seven", 1.5, True])
    def test_anything_else_is_refused(self, lm: bp.LanguageModel, seed: Any) -> None:
        with pytest.raises(PromptError, match="is no seed"):
            lm.generate(PROMPTS[1], seed=seed)


class TestCatalog:
    def test_what_is_purged_is_not_remembered(self, lm: bp.LanguageModel) -> None:
        lm.generate(lm.text(CONTEXT) + PROMPTS[1], **digits(lm))
        kept = lm.generate(PROMPTS[2], **digits(lm))
        lm.db.flush()
        purge(lm.db, Selection(text_prefix=CONTEXT))
        assert lm.db.directory is not None
        with closing(sqlite3.connect(lm.db.directory / "catalog.sqlite")) as file:
            assert file.execute("SELECT string FROM generations").fetchall() == [(kept.string,)]

    @pytest.mark.parametrize(
        "damage",
        ["token_ids = '[1, -2]'", "token_ids = 'null'", "token_logprobs = X'00'", "num_kept = 99", "string = X'41'"],
    )
    def test_a_damaged_row_is_generated_again(self, lm: bp.LanguageModel, make_lm: MakeLM, damage: str) -> None:
        first = lm.generate(PROMPTS[1], **digits(lm))
        assert lm.db.directory is not None
        with closing(sqlite3.connect(lm.db.directory / "catalog.sqlite")) as file, file:
            assert file.execute(f"UPDATE generations SET {damage}").rowcount == 1  # noqa: S608
        other = make_lm(db=lm.db)
        assert values([other.generate(PROMPTS[1], **digits(lm))]) == values([first])
        assert other.counters.num_decoded_tokens == 20


class TestNumbers:
    def test_a_result_says_what_was_found_computed_and_decoded(self, lm: bp.LanguageModel) -> None:
        num_tokens = len(lm.tokenizer(PROMPTS[0])["input_ids"])
        first = lm.generate(PROMPTS[0], max_new_tokens=5, **digits(lm))
        assert (first.num_computed_tokens, first.num_cached_tokens, first.num_decoded_tokens) == (num_tokens, 0, 5)
        assert first.num_model_calls == 7  # the prompt, five tokens, and the logits after the last of them
        assert first.report().startswith(f"{num_tokens} tokens: 0 found, {num_tokens} computed, 5 decoded in ")
        longer = lm.generate(PROMPTS[0], max_new_tokens=7, **digits(lm))
        assert (longer.num_computed_tokens, longer.num_cached_tokens) == (0, num_tokens + 5)
        again = lm.generate(PROMPTS[0], max_new_tokens=7, **digits(lm))
        assert (again.num_cached_tokens, again.num_decoded_tokens) == (num_tokens + 7, 0)
        assert "saved" in again.report()
        counters = lm.counters
        assert counters.num_decoded_tokens == 7
        assert counters.num_computed_tokens == num_tokens
        assert counters.num_asked_tokens == counters.num_computed_tokens + counters.num_cached_tokens
