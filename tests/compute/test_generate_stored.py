"""What was generated is kept as it would have been computed, and what generating cannot do is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import backprompt_db as bp
from backprompt_db.cli.demo.smollm2 import smollm2_directory
from backprompt_db.errors import ContextLengthExceeded, PromptError, UnsupportedModel
from backprompt_db.operations.verify import verify
from backprompt_db.prompt.ids import address
from backprompt_db.prompt.representation import Part
from backprompt_db.prompt.text import Text
from backprompt_db.store.contract import Blob, Key
from tests.conftest import VOCAB_SIZE, cases, plain_logprobs, tiny_gpt2
from tests.support.families import REPRESENTED, by_name, family_cases
from tests.support.generation import TOLERANCE, assert_equals_plain, decoded_by_hand, only_digits

MakeLM = Callable[..., bp.LanguageModel]

CONTEXT = "Pick the endpoint for the request.\nGET /users lists users. POST /orders creates an order.\n"
PROMPTS = [CONTEXT + "Request: show me everyone", "Request:", "a", "The quick brown fox jumps over the lazy dog"]


def digits(lm: bp.LanguageModel) -> dict[str, Any]:
    return only_digits(lm.tokenizer)


def assert_stored_like_a_plain_pass(lm: bp.LanguageModel, result: bp.Generated) -> bp.ModelRepr:
    """Run the text of a result: nothing is computed, and all numbers are those of one pass over its tokens."""
    assert result.is_stored
    before = lm.counters
    found = result.text()
    assert (found.num_computed_tokens, lm.counters.num_model_calls) == (0, before.num_model_calls)
    logprobs, logits = plain_logprobs(lm.model, found.input_ids)
    assert torch.allclose(found.token_logprobs, logprobs, atol=TOLERANCE, equal_nan=True)
    assert (found.logits.float().log_softmax(-1) - logits.log_softmax(-1)).abs().max() < TOLERANCE
    continued = (result + " and so on")()
    logprobs, _ = plain_logprobs(lm.model, continued.input_ids)
    assert torch.allclose(continued.token_logprobs, logprobs, atol=TOLERANCE, equal_nan=True)
    return found


def test_a_continuation_is_stored_and_its_text_computes_nothing(lm: bp.LanguageModel) -> None:
    result = lm.generate(PROMPTS[0], **digits(lm))
    found = assert_stored_like_a_plain_pass(lm, result)
    assert found.input_ids[-20:].tolist() == result.token_ids.tolist()
    assert torch.equal(found.token_logprobs[-20:], result.token_logprobs)
    lm.db.flush()
    assert verify(lm.db).is_clean


def test_another_handle_finds_the_continuation(
    lm: bp.LanguageModel, make_lm: MakeLM, open_db: Callable[..., bp.Database]
) -> None:
    result = lm.generate(lm.text(CONTEXT) + PROMPTS[1], **digits(lm))
    lm.db.close()
    other = make_lm(db=open_db(lm.db.directory))
    again = (other.text(CONTEXT) + PROMPTS[1] + result.string)()
    assert again.num_computed_tokens == 0
    assert torch.equal(again.token_logprobs[-20:], result.token_logprobs)


@pytest.mark.parametrize("digit", cases("0123456789", by_default="05"))
def test_what_ended_early_is_stored_without_its_end(lm: bp.LanguageModel, digit: str) -> None:
    eos_token_id = lm.tokenizer.convert_tokens_to_ids(digit)
    results = lm.generate(PROMPTS, eos_token_id=eos_token_id, max_new_tokens=30, **digits(lm))
    for result in results:
        assert_stored_like_a_plain_pass(lm, result)
        num_kept = len(result.token_ids) - (int(result.token_ids[-1]) == eos_token_id)
        assert lm.tokenizer.decode(result.token_ids[:num_kept]) == result.string


@pytest.mark.parametrize("num_beams", [1, 3])
def test_every_sequence_of_a_prompt_is_stored(lm: bp.LanguageModel, num_beams: int) -> None:
    told = {"do_sample": num_beams == 1, "num_beams": num_beams, **digits(lm)}
    several = lm.generate(PROMPTS, num_return_sequences=3, max_new_tokens=8, **told)
    for result in [result for results in several for result in results]:
        assert_stored_like_a_plain_pass(lm, result)


@pytest.mark.parametrize("family", family_cases(REPRESENTED))
def test_families_store_what_they_generate(family: Any, make_lm: MakeLM) -> None:
    lm = make_lm(family.build())
    for result in lm.generate(PROMPTS, max_new_tokens=8, **digits(lm)):
        assert_stored_like_a_plain_pass(lm, result)


def all_but(*tokens: int) -> list[int]:
    return [token for token in range(VOCAB_SIZE) if token not in tokens]


def test_half_a_character_is_not_stored(lm: bp.LanguageModel) -> None:
    first_byte, _ = lm.tokenizer("é")["input_ids"]
    lm(PROMPTS[0])
    lm.db.flush()
    before = lm.db.counters.num_stored
    result = lm.generate(PROMPTS[0], suppress_tokens=all_but(first_byte), max_new_tokens=1)
    lm.db.flush()
    assert (result.string, result.is_stored) == ("\N{REPLACEMENT CHARACTER}", False)
    assert lm.db.counters.num_stored == before
    assert result.text().num_computed_tokens > 0


def test_a_continuation_is_stored_exactly_when_it_is_read_as_it_was_written(lm: bp.LanguageModel) -> None:
    pair = min(token for token in lm.tokenizer.get_vocab() if len(token) == 2 and token.isalpha() and token.isascii())
    letters = lm.tokenizer.convert_tokens_to_ids(list(pair))
    told: dict[str, Any] = {
        "do_sample": True,
        "suppress_tokens": all_but(*letters),
        "temperature": 10.0,
        "max_new_tokens": 3,
    }
    results = lm.generate(PROMPTS[0], num_return_sequences=20, **told)
    for result in results:
        is_same = lm.tokenizer(result.string)["input_ids"] == result.token_ids.tolist()
        assert result.is_stored == is_same
    assert {result.is_stored for result in results} == {True, False}


def test_an_empty_continuation_is_its_prompt(lm: bp.LanguageModel) -> None:
    result = lm.generate(PROMPTS[0], eos_token_id=list(range(VOCAB_SIZE)), pad_token_id=0)
    assert (str(result), len(result.token_ids), result.is_stored) == ("", 1, True)
    assert result.text == lm.text(PROMPTS[0])
    assert result.text().num_computed_tokens == 0


def test_generating_again_computes_no_prompt_and_stores_nothing_more(lm: bp.LanguageModel) -> None:
    first = lm.generate(PROMPTS[0], **digits(lm))
    lm.db.flush()
    counters = lm.counters.num_computed_tokens, lm.db.counters.num_stored
    again = lm.generate(PROMPTS[0], **digits(lm))
    lm.db.flush()
    assert (lm.counters.num_computed_tokens, lm.db.counters.num_stored) == counters
    assert (again.string, again.is_stored) == (first.string, True)


def test_keys_and_values_of_another_shape_are_computed_again(lm: bp.LanguageModel) -> None:
    context, other = lm.text(CONTEXT), lm.text("x")
    lm([context, other])
    lm.db.flush()
    key, foreign = (
        Key(address(text.segments()[0].id, lm.weights_id, lm.tokenizer_id), Part.KV) for text in (context, other)
    )
    blob = lm.db.store.get(foreign)
    assert blob is not None
    lm.db.store.delete([key])
    lm.db.store.put([Blob(key, bytes(blob))])
    assert_equals_plain(lm, lm.generate(context + "Request:"))
    assert_equals_plain(lm, lm.generate(context))


@pytest.mark.parametrize("fidelity", ["bfloat16", "int8"])
def test_a_lossy_database_says_so_and_keeps_continuations_too(make_lm: MakeLM, fidelity: str) -> None:
    with bp.open(":memory:", fidelity=fidelity) as db:
        lm = make_lm(db=db)
        result = lm.generate(PROMPTS[0], **digits(lm))
        assert (result.fidelity, result.is_stored) == (fidelity, True)
        assert result.text().num_computed_tokens == 0
        exact = make_lm(db=db, exact=True)
        again = exact.generate(PROMPTS[0], **digits(lm))
        assert again.fidelity == "exact"
        assert_equals_plain(exact, again, **digits(lm))


def test_nothing_is_stored_on_request_or_in_a_database_that_is_only_read(
    lm: bp.LanguageModel, make_lm: MakeLM, open_db: Callable[..., bp.Database], tmp_path: Any
) -> None:
    result = lm.generate(PROMPTS[0], store=False, **digits(lm))
    assert not result.is_stored
    assert result.text().num_computed_tokens == 20
    lm.db.close()
    db = open_db(lm.db.directory)
    db.readonly = True
    other = make_lm(db=db)
    assert other.generate(PROMPTS[0], **digits(lm)).is_stored
    assert not other.generate(PROMPTS[1], **digits(lm)).is_stored


def test_deterministic_keeps_the_bits_of_a_pass_of_its_own(make_lm: MakeLM) -> None:
    first = make_lm(deterministic=True)
    generated = first.generate(PROMPTS[0], **digits(first))
    assert generated.is_stored
    other = make_lm(deterministic=True)
    computed = (other.text(PROMPTS[0]) + generated.string)()
    assert computed.num_computed_tokens > 0
    assert torch.equal(generated.text().logits, computed.logits)
    assert torch.equal(generated.text().token_logprobs[1:], computed.token_logprobs[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_in_the_dtype_of_the_model(make_lm: MakeLM, dtype: torch.dtype) -> None:
    lm = make_lm(tiny_gpt2().to(dtype))
    result = lm.generate(PROMPTS[0], **digits(lm))
    found = result.text()
    assert found.num_computed_tokens == 0
    assert found.logits.dtype == found.past_key_values.layers[0].keys.dtype == dtype
    logprobs, _ = plain_logprobs(lm.model, found.input_ids)
    assert torch.allclose(found.token_logprobs, logprobs, atol=0.2, equal_nan=True)
    assert result.token_logprobs.dtype == torch.float32


def test_a_result_is_a_string_and_goes_on_as_a_text(lm: bp.LanguageModel) -> None:
    prompt = lm.text(CONTEXT) + "Request:"
    result = lm.generate(prompt, max_new_tokens=4, **digits(lm))
    assert str(result) == result.string == str(result.text).removeprefix(str(prompt))
    assert result.prompt is prompt
    assert result.text == prompt + result.string
    assert result + "\nEndpoint:" == prompt + result.string + "\nEndpoint:"
    assert [segment.string for segment in result.text.segments()] == [CONTEXT, "Request:", result.string]
    assert repr(result).startswith("Generated(prompt=Text(")
    assert (result.token_ids.dtype, result.token_logprobs.dtype) == (torch.int64, torch.float32)


def test_the_text_of_an_eager_prompt_is_computed_when_it_is_asked_for(lm: bp.LanguageModel) -> None:
    result = lm.generate(lm.text(CONTEXT, eager=True), **digits(lm))
    assert result.text.model_repr is not None
    assert result.text.model_repr.num_computed_tokens == 0


@pytest.mark.parametrize(
    "told",
    [
        {"past_key_values": None},
        {"input_ids": [[1]]},
        {"attention_mask": None},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"return_dict_in_generate": True},
        {"output_logits": True},
        {"generation_config": None},
        {"max_length": 50},
        {"prompt_lookup_num_tokens": 2},
        {"token_healing": True},
        {"tokenizer": None},
        {"temprature": 0.5},
        {"negative_prompt_ids": [[1]]},
        {"num_beams": 0},
        {"num_beams": True},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"num_return_sequences": 0},
    ],
    ids=str,
)
def test_arguments_that_would_break_it_are_refused_before_anything_is_computed(
    lm: bp.LanguageModel, told: dict[str, Any]
) -> None:
    with pytest.raises(PromptError, match=next(iter(told))):
        lm.generate(PROMPTS[0], **told)
    assert lm.counters.num_computed_tokens == 0


def test_prompts_that_cannot_be_continued_are_refused(lm: bp.LanguageModel, make_lm: MakeLM) -> None:
    with pytest.raises(PromptError, match="ends in parallel branches"):
        lm.generate(lm.text("a") + bp.parallel("b", "c"))
    with pytest.raises(PromptError, match="is empty"):
        lm.generate(["a", ""])
    with pytest.raises(PromptError, match="one prompt"):
        lm.generate(["a", "b"], streamer=TextStreamer(lm.tokenizer))
    with pytest.raises(PromptError, match="is no streamer"):
        lm.generate("a", streamer=object())
    bloom = by_name("bloom")
    with pytest.raises(UnsupportedModel, match="plain chains only"):
        make_lm(bloom.build()).generate(Text("a") + bp.parallel("b", "c") + "d")
    assert lm.counters.num_computed_tokens == 0


def test_branches_are_continued_within_a_window_and_refused_beyond_it(make_lm: MakeLM) -> None:
    family = by_name("mistral-window")
    lm = make_lm(family.build())
    strings = ["a", "b", "c", "d"]
    prompt = lm.text("a") + bp.parallel("b", "c") + "d"
    ids = [lm.tokenizer(string)["input_ids"] for string in strings]
    starts = [0, len(ids[0]), len(ids[0]), len(ids[0]) + max(map(len, ids[1:3]))]
    graph = list(zip(ids, starts, [set(), {0}, {0}, {0, 1, 2}], strict=True))
    tokens, logprobs = decoded_by_hand(lm.model, graph, 8, forbidden=digits(lm)["suppress_tokens"])
    result = lm.generate(prompt, max_new_tokens=8, **digits(lm))
    assert result.token_ids.tolist() == tokens
    assert (result.token_logprobs - logprobs).abs().max() < TOLERANCE
    with pytest.raises(UnsupportedModel, match="longer than its window of 16"):
        lm.generate(prompt, max_new_tokens=16)


def test_a_continuation_that_would_pass_the_last_position_is_refused(lm: bp.LanguageModel) -> None:
    num_tokens = len(lm.tokenizer(CONTEXT)["input_ids"])
    room = 256 - num_tokens
    with pytest.raises(ContextLengthExceeded, match="257 positions, this model takes 256"):
        lm.generate(CONTEXT, max_new_tokens=room + 1)
    assert lm.counters.num_computed_tokens == 0
    assert_stored_like_a_plain_pass_until_the_end(lm, lm.generate(CONTEXT, max_new_tokens=room, **digits(lm)))
    with pytest.raises(ContextLengthExceeded):
        lm.generate(lm.text("a") + lm.text("b", start=250), max_new_tokens=10)


def assert_stored_like_a_plain_pass_until_the_end(lm: bp.LanguageModel, result: bp.Generated) -> None:
    found = result.text()
    assert (len(found.input_ids), found.num_computed_tokens) == (256, 0)
    logprobs, _ = plain_logprobs(lm.model, found.input_ids)
    assert torch.allclose(found.token_logprobs, logprobs, atol=TOLERANCE, equal_nan=True)


@pytest.fixture(scope="module")
def smollm2() -> Iterator[bp.LanguageModel]:
    """A trained model, on one database for the tests of this file."""
    directory = smollm2_directory()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    with bp.open(":memory:") as db:
        yield bp.LanguageModel(model, tokenizer, db=db)


QUESTIONS = ["What is the capital of France?", "Name three colours of the rainbow.", "When does the sun rise?"]


@pytest.mark.exhaustive
def test_a_trained_model_writes_what_a_plain_call_writes_alone_and_together(smollm2: bp.LanguageModel) -> None:
    prompts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
    together = smollm2.generate(prompts, max_new_tokens=24)
    for result in together:
        assert_equals_plain(smollm2, result, max_new_tokens=24, pad_token_id=2)
        assert "<|im_end|>" not in result.string
        assert torch.equal(smollm2.generate(result.prompt, max_new_tokens=24).token_ids, result.token_ids)
        assert_stored_like_a_plain_pass(smollm2, result)
    assert "Paris" in together[0].string


def test_a_second_turn_reuses_what_the_model_itself_has_written(smollm2: bp.LanguageModel) -> None:
    first = smollm2.text(f"<|im_start|>user\n{QUESTIONS[0]}<|im_end|>\n<|im_start|>assistant\n")
    answer = smollm2.generate(first, max_new_tokens=24)
    before = smollm2.counters.num_computed_tokens
    question = "<|im_end|>\n<|im_start|>user\nAnd of Italy?<|im_end|>\n<|im_start|>assistant\n"
    second = smollm2.generate(answer + question, max_new_tokens=24)
    num_new = smollm2.counters.num_computed_tokens - before
    assert num_new == len(smollm2.tokenizer(question)["input_ids"])
    assert_equals_plain(smollm2, second, max_new_tokens=24, pad_token_id=2)
    assert "Rome" in second.string
