"""What a model generates after a stored prompt is what it generates after the prompt's plain tokens."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation import LogitsProcessor, StoppingCriteria

import backprompt_db as bp
from backprompt_db.prompt.text import Text
from tests.conftest import CORPUS, cases
from tests.support.families import REPRESENTED, family_cases
from tests.support.generation import TOLERANCE, assert_equals_plain, decoded_by_hand, only_digits, plain

MakeLM = Callable[..., bp.LanguageModel]

CONTEXT = "Pick the endpoint for the request.\nGET /users lists users. POST /orders creates an order.\n"
PROMPTS = [CONTEXT + "Request: show me everyone", "Request:", "a", "The quick brown fox jumps over the lazy dog"]


@pytest.fixture(params=family_cases(REPRESENTED))
def any_lm(request: pytest.FixtureRequest, make_lm: MakeLM) -> bp.LanguageModel:
    """A tiny seeded model of each of several families."""
    return make_lm(request.param.build())


def test_greedy_tokens_are_those_of_a_plain_call(lm: bp.LanguageModel) -> None:
    for prompt in PROMPTS:
        assert_equals_plain(lm, lm.generate(prompt, max_new_tokens=30), max_new_tokens=30)


def test_a_prompt_of_pieces_is_continued_like_its_joined_tokens(lm: bp.LanguageModel) -> None:
    prompt = lm.text(CONTEXT) + "Request: list users" + "\nEndpoint:"
    assert_equals_plain(lm, lm.generate(prompt))


def test_every_family_generates_what_a_plain_call_does_alone_and_together(any_lm: bp.LanguageModel) -> None:
    told = {"max_new_tokens": 8, **only_digits(any_lm.tokenizer)}
    for result in any_lm.generate(PROMPTS, **told):
        assert_equals_plain(any_lm, result, **told)
        alone = any_lm.generate(result.prompt, **told)
        assert torch.equal(alone.token_ids, result.token_ids)
        assert (alone.token_logprobs - result.token_logprobs).abs().max() < TOLERANCE


CUTS = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@given(source=st.sampled_from(CORPUS), begin=st.integers(0, 40), cuts=st.lists(CUTS, min_size=1, max_size=3))
def test_prompts_cut_anywhere_are_continued_like_their_joined_tokens(
    lm: bp.LanguageModel, source: str, begin: int, cuts: list[list[int]]
) -> None:
    prompts = [pieces(lm, source[begin:], sizes) for sizes in cuts]
    for result in lm.generate(prompts, max_new_tokens=8):
        assert_equals_plain(lm, result, max_new_tokens=8)


def pieces(lm: bp.LanguageModel, string: str, sizes: Sequence[int]) -> bp.Text:
    text = lm.text("")
    for size in sizes:
        text += string[:size]
        string = string[size:]
    return text


def test_prompts_that_share_a_prefix_are_generated_in_one_call(lm: bp.LanguageModel) -> None:
    context = lm.text(CONTEXT)
    results = lm.generate([context + f"Request: {'again ' * n}" for n in range(4)], max_new_tokens=10)
    for result in results:
        assert_equals_plain(lm, result, max_new_tokens=10)
    assert lm.generate([]) == []


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 5, "repetition_penalty": 1.3}, {"min_p": 0.1}]
)
def test_the_same_seed_gives_the_sample_of_a_plain_call(lm: bp.LanguageModel, sampling: dict[str, Any]) -> None:
    told = {"do_sample": True, **sampling}
    ids = lm(PROMPTS[0]).input_ids.tolist()
    for seed in range(3):
        torch.manual_seed(seed)
        tokens, logprobs = plain(lm.model, ids, **told)
        torch.manual_seed(seed)
        result = lm.generate(PROMPTS[0], **told)
        assert result.token_ids.tolist() == tokens
        assert (result.token_logprobs - logprobs).abs().max() < TOLERANCE


def test_several_samples_of_a_prompt_are_a_list_and_those_of_a_plain_call(lm: bp.LanguageModel) -> None:
    told = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6}
    ids = lm(PROMPTS[0]).input_ids[None]
    torch.manual_seed(0)
    expected = lm.model.generate(ids, attention_mask=torch.ones_like(ids), **told)[:, ids.shape[1] :]
    torch.manual_seed(0)
    results = lm.generate(PROMPTS[0], do_sample=True, num_return_sequences=3, max_new_tokens=6)
    assert [result.token_ids.tolist() for result in results] == expected.tolist()
    several = lm.generate(PROMPTS[:2], do_sample=True, num_return_sequences=2, max_new_tokens=6)
    assert [[str(each.prompt) for each in row] for row in several] == [[prompt] * 2 for prompt in PROMPTS[:2]]
    assert len(lm.generate(PROMPTS[0], num_return_sequences=1)) == 1


@pytest.mark.parametrize("num_returned", [1, 3])
def test_beams_are_those_of_a_plain_call(lm: bp.LanguageModel, num_returned: int) -> None:
    told = {"num_beams": 3, "num_return_sequences": num_returned, "max_new_tokens": 12, **eos_is("7", lm)}
    for prompt, results in zip(PROMPTS, lm.generate(PROMPTS, **told), strict=True):
        ids = lm(prompt).input_ids[None]
        expected = lm.model.generate(ids, attention_mask=torch.ones_like(ids), **told)[:, ids.shape[1] :].tolist()
        for result, tokens in zip(results, expected, strict=True):
            generated = result.token_ids.tolist()
            assert generated == tokens[: len(generated)]
            assert set(tokens[len(generated) :]) <= {told["pad_token_id"], told["eos_token_id"]}
            logprobs = logprobs_after(lm.model, ids[0].tolist(), generated)
            assert (result.token_logprobs - logprobs).abs().max() < TOLERANCE


def logprobs_after(model: Any, ids: list[int], tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    chosen: torch.Tensor = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return chosen


def eos_is(digit: str, lm: bp.LanguageModel) -> dict[str, Any]:
    """Let the model write digits only, and end with one of them."""
    return {"eos_token_id": lm.tokenizer.convert_tokens_to_ids(digit), "pad_token_id": 0, **only_digits(lm.tokenizer)}


@pytest.mark.parametrize("digit", cases("0123456789", by_default="05"))
def test_prompts_that_end_at_different_lengths_end_as_they_do_alone(lm: bp.LanguageModel, digit: str) -> None:
    told = {"max_new_tokens": 30, **eos_is(digit, lm)}
    for result in lm.generate(PROMPTS, **told):
        assert_equals_plain(lm, result, **told)
        assert digit not in result.string
        assert result.token_ids.tolist().count(told["eos_token_id"]) <= 1


def test_stop_strings_end_each_prompt_as_they_do_alone(lm: bp.LanguageModel) -> None:
    told: dict[str, Any] = {"max_new_tokens": 30, **only_digits(lm.tokenizer)}
    free = [str(result) for result in lm.generate(PROMPTS, **told)]
    stops = sorted({string[index : index + 2] for index, string in enumerate(free)})
    for result in lm.generate(PROMPTS, stop_strings=stops, **told):
        assert_equals_plain(lm, result, stop_strings=stops, tokenizer=lm.tokenizer, **told)
        assert result.string.endswith(tuple(stops))


class StopAfter(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.num_tokens)


class Shift(LogitsProcessor):  # type: ignore[misc]
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.roll(int(input_ids.shape[1]), dims=1)


@pytest.mark.parametrize(
    "told",
    [
        {"stopping_criteria": [StopAfter(40)]},
        {"logits_processor": [Shift()]},
        {"no_repeat_ngram_size": 2},
        {"min_length": 15, "eos_token_id": list(range(600))},
        {"bad_words_ids": [[435, 435]]},
        {"repetition_penalty": 1.5, "min_new_tokens": 3},
        {"prefix_allowed_tokens_fn": lambda _, ids: [len(ids), 300]},
    ],
    ids=lambda told: next(iter(told)),
)
def test_what_looks_at_the_prompt_sees_no_padding(lm: bp.LanguageModel, told: dict[str, Any]) -> None:
    for result in lm.generate(PROMPTS, **told):
        assert_equals_plain(lm, result, **told)


class CountingStop(StoppingCriteria):  # type: ignore[misc]
    """Stops at its sixth call."""

    num_calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.num_calls += 1
        return torch.full((len(input_ids),), self.num_calls >= 6)


class CountingShift(LogitsProcessor):  # type: ignore[misc]
    """Shifts the vocabulary by the number of its calls."""

    num_calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        return scores.roll(self.num_calls, 1)


class CountingTokens:
    """Allows one token after the other."""

    num_calls = 0

    def __call__(self, batch: int, input_ids: torch.Tensor) -> list[int]:
        self.num_calls += 1
        return [300 + self.num_calls]


@pytest.mark.parametrize(
    "told",
    [
        lambda: {"stopping_criteria": [CountingStop()]},
        lambda: {"logits_processor": [CountingShift()]},
        lambda: {"prefix_allowed_tokens_fn": CountingTokens()},
    ],
)
def test_what_counts_begins_anew_with_each_prompt(lm: bp.LanguageModel, told: Callable[[], dict[str, Any]]) -> None:
    for result in lm.generate(PROMPTS, **told()):
        assert_equals_plain(lm, result, **told())


def test_what_counts_is_used_itself_by_a_single_prompt(lm: bp.LanguageModel) -> None:
    counting = CountingStop()
    lm.generate(PROMPTS[0], stopping_criteria=[counting])
    assert counting.num_calls == 6


def test_what_holds_the_model_and_the_tokenizer_is_copied_without_them(lm: bp.LanguageModel) -> None:
    seen = set[tuple[int, int]]()

    class Holding(CountingShift):
        def __init__(self) -> None:
            super().__init__()
            self.held = lm.model, lm.tokenizer

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.add((id(self.held[0]), id(self.held[1])))
            return super().__call__(input_ids, scores)

    lm.generate(PROMPTS, logits_processor=[Holding()])
    assert seen == {(id(lm.model), id(lm.tokenizer))}


def test_what_cannot_be_copied_is_refused_for_several_prompts(lm: bp.LanguageModel) -> None:
    counting = CountingStop()
    counting.lock = threading.Lock()
    with pytest.raises(bp.errors.PromptError, match=r"stopping_criteria cannot be copied.*one by one"):
        lm.generate(PROMPTS, stopping_criteria=[counting])
    assert (lm.counters.num_computed_tokens, counting.num_calls) == (0, 0)
    assert lm.generate(PROMPTS[0], stopping_criteria=[counting]).num_decoded_tokens == 6


class Recorder(TextStreamer):  # type: ignore[misc]
    """Keeps the pieces that it would print."""

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self.pieces: list[tuple[str, bool]] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: FBT001, FBT002 - not ours
        self.pieces.append((text, stream_end))


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_a_streamer_receives_the_pieces_of_a_plain_call(lm: bp.LanguageModel, skip_prompt: bool) -> None:  # noqa: FBT001
    prompt = lm.text(CONTEXT) + "Request:"
    ours, theirs = (Recorder(lm.tokenizer, skip_prompt=skip_prompt) for _ in range(2))
    lm.generate(prompt, streamer=ours)
    plain(lm.model, lm(prompt).input_ids.tolist(), streamer=theirs)
    assert ours.pieces == theirs.pieces
    assert ours.pieces[-1][1]


def test_another_thread_can_read_what_is_being_generated(lm: bp.LanguageModel) -> None:
    streamer = TextIteratorStreamer(lm.tokenizer, skip_prompt=True, timeout=60)
    results: list[bp.Generated] = []
    told = {"streamer": streamer, **only_digits(lm.tokenizer)}
    thread = threading.Thread(target=lambda: results.append(lm.generate(PROMPTS[0], **told)))
    thread.start()
    read = "".join(streamer)
    thread.join()
    assert read == results[0].string


class Failing(LogitsProcessor):  # type: ignore[misc]
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (PROMPTS[0], {"logits_processor": [Failing()]}),
        (PROMPTS[0], {"temprature": 0.5}),
        (PROMPTS[0], {"max_new_tokens": 300}),
        (PROMPTS[0], {"keep": ["everything"]}),
        (PROMPTS, {}),
        ("", {}),
        (Text("a") + bp.parallel("b", "c"), {}),
    ],
)
def test_who_reads_what_is_generated_does_not_wait_after_an_error(
    lm: bp.LanguageModel, prompt: Any, told: dict[str, Any]
) -> None:
    streamer = TextIteratorStreamer(lm.tokenizer, skip_prompt=True, timeout=1)
    with pytest.raises((ZeroDivisionError, bp.errors.BackpromptError)):
        lm.generate(prompt, streamer=streamer, **told)
    assert "".join(streamer) == ""
    assert streamer.text_queue.empty()


def test_a_streamer_that_has_ended_is_not_ended_again(lm: bp.LanguageModel) -> None:
    class Refusing(Recorder):
        def end(self) -> None:
            super().end()
            raise ZeroDivisionError

    streamer = Refusing(lm.tokenizer)
    with pytest.raises(ZeroDivisionError):
        lm.generate(PROMPTS[0], streamer=streamer)
    assert [is_end for _, is_end in streamer.pieces].count(True) == 1


def test_a_gap_and_parallel_branches_continue_like_a_loop_written_by_hand(lm: bp.LanguageModel) -> None:
    strings = ["context: ", "document one.", "the other one!", " question?"]
    context, first, second, question = (list(lm.tokenizer(string)["input_ids"]) for string in strings)
    fork, told = len(context), only_digits(lm.tokenizer)
    after = fork + max(len(first), len(second))
    branches = [(context, 0, set[int]()), (first, fork, {0}), (second, fork, {0}), (question, after, {0, 1, 2})]
    far = [(context, 0, set[int]()), (first, 90, {0}), (question, 90 + len(first), {0, 1})]
    prompts = [
        lm.text(strings[0]) + bp.parallel(*strings[1:3]) + strings[3],
        lm.text(strings[0]) + lm.text(strings[1], start=90) + strings[3],
        lm.text(CONTEXT),
    ]
    *results, ordinary = lm.generate(prompts, max_new_tokens=10, **told)
    assert_equals_plain(lm, ordinary, max_new_tokens=10, **told)
    for result, graph in zip(results, (branches, far), strict=True):
        tokens, logprobs = decoded_by_hand(lm.model, graph, 10, forbidden=told["suppress_tokens"])
        assert result.token_ids.tolist() == tokens
        assert (result.token_logprobs - logprobs).abs().max() < TOLERANCE
        assert result.is_stored
        again = result.text()
        assert again.num_computed_tokens == 0
        assert (again.token_logprobs[-10:] - logprobs).abs().max() < TOLERANCE


def test_the_model_is_left_as_it_was_found(lm: bp.LanguageModel) -> None:
    lm.model.train()
    lm.model.transformer.h[1].eval()
    lm.model.generation_config.repetition_penalty = 1.2
    before = copy.deepcopy(lm.model.generation_config)
    weights_id = lm.weights_id
    result = lm.generate(PROMPTS[0])
    assert [module.training for module in (lm.model, *lm.model.transformer.h[:2])] == [True, True, False]
    assert lm.model.generation_config == before
    assert lm.weights_id == weights_id
    lm.model.eval()
    assert_equals_plain(lm, result)


def test_what_the_generation_configuration_says_holds_but_for_what_would_break_it(lm: bp.LanguageModel) -> None:
    config = lm.model.generation_config
    config.suppress_tokens = only_digits(lm.tokenizer)["suppress_tokens"]
    expected = plain(lm.model, lm(PROMPTS[0]).input_ids.tolist())
    config.use_cache, config.output_scores, config.return_dict_in_generate = False, True, False
    result = lm.generate(PROMPTS[0])
    assert result.string.isdigit()
    assert result.token_ids.tolist() == expected[0]


def test_an_adapter_generates_with_its_own_keys_and_values(gpt2: Any, make_lm: MakeLM) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    lm = make_lm(get_peft_model(gpt2, config))
    weights_id, told = lm.weights_id, only_digits(lm.tokenizer)
    with_adapter = lm.generate(PROMPTS[0], **told)
    assert_equals_plain(lm, with_adapter, **told)
    assert with_adapter.text().num_computed_tokens == 0
    assert lm.weights_id == weights_id
    with lm.model.disable_adapter():
        assert_equals_plain(lm, lm.generate(PROMPTS[0], **told), **told)
