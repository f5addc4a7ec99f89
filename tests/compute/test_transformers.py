"""Calls of transformers over our keys and values give what they give without, and change nothing that is ours."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import backprompt_db as bp
from backprompt_db.cli.demo.smollm2 import smollm2_directory
from backprompt_db.compute.inference.kv_cache import CACHE_KEYWORD
from tests.support.families import by_name

CONTEXT = "Pick the endpoint for the request.\nGET /users lists users. POST /orders creates an order.\n"
QUESTION = "Request: show me everyone who signed up this week\nEndpoint:"
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def inputs(lm: bp.LanguageModel, prompt: str = CONTEXT + QUESTION) -> Any:
    return lm.tokenizer(prompt, return_tensors="pt")


def tensors(cache: Any) -> torch.Tensor:
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers])


@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True, "temperature": 0.8}, {"repetition_penalty": 1.3}], ids=str
)
def test_generate_over_a_stored_prefix_gives_what_a_plain_call_gives(
    lm: bp.LanguageModel, settings: dict[str, Any]
) -> None:
    result = lm(CONTEXT)
    torch.manual_seed(0)
    plain = lm.model.generate(**inputs(lm), **{**GREEDY, **settings})
    torch.manual_seed(0)
    assert torch.equal(
        lm.model.generate(**inputs(lm), **{**GREEDY, **settings}, **{CACHE_KEYWORD: result.past_key_values}), plain
    )


def test_the_cache_of_a_whole_prompt_is_continued_without_its_last_token(lm: bp.LanguageModel) -> None:
    cache = (lm.text(CONTEXT) + QUESTION)().past_key_values
    cache.crop(-1)
    assert torch.equal(
        lm.model.generate(**inputs(lm), **GREEDY, **{CACHE_KEYWORD: cache}), lm.model.generate(**inputs(lm), **GREEDY)
    )


def test_beams_take_a_cache_with_a_row_for_each(lm: bp.LanguageModel) -> None:
    cache = lm(CONTEXT).past_key_values
    cache.batch_repeat_interleave(3)
    ours = lm.model.generate(**inputs(lm), **GREEDY, num_beams=3, **{CACHE_KEYWORD: cache})
    assert torch.equal(ours, lm.model.generate(**inputs(lm), **GREEDY, num_beams=3))


def test_generating_extends_the_cache_that_it_is_given_and_no_other(lm: bp.LanguageModel) -> None:
    result = lm(CONTEXT)
    given, before = result.past_key_values, tensors(result.past_key_values).clone()
    lm.model.generate(**inputs(lm), **GREEDY, **{CACHE_KEYWORD: given})
    assert given.get_seq_length() > before.shape[-2]
    assert torch.equal(tensors(result.past_key_values), before)
    lm.db.flush()
    assert torch.equal(tensors(lm.past_key_values(result.text)), before)


def test_a_cache_that_is_overwritten_leaves_what_is_stored_alone(lm: bp.LanguageModel) -> None:
    result = lm(CONTEXT)
    before = tensors(result.past_key_values).clone()
    for layer in result.past_key_values.layers:
        layer.keys.zero_()
    assert torch.equal(tensors(result.past_key_values), before)


def test_a_pipeline_over_a_stored_prefix_writes_what_it_writes_without(lm: bp.LanguageModel) -> None:
    result = lm(CONTEXT)
    generator = pipeline("text-generation", model=lm.model, tokenizer=lm.tokenizer)
    plain = generator(CONTEXT + QUESTION, **GREEDY)
    assert generator(CONTEXT + QUESTION, **GREEDY, **{CACHE_KEYWORD: result.past_key_values}) == plain


def test_a_pipeline_chats_over_the_stored_beginning_of_a_conversation(lm: bp.LanguageModel) -> None:
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = CHAT
    lm = bp.LanguageModel(lm.model, tokenizer, db=lm.db)
    messages = [
        {"role": "user", "content": "Which endpoint lists users?"},
        {"role": "assistant", "content": "GET /users"},
        {"role": "user", "content": "And orders?"},
    ]
    beginning = lm.chat(messages[:2], add_generation_prompt=False)()
    generator = pipeline("text-generation", model=lm.model, tokenizer=tokenizer)
    plain = generator(messages, **GREEDY)
    assert generator(messages, **GREEDY, **{CACHE_KEYWORD: beginning.past_key_values}) == plain


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_families_generate_the_same_over_a_stored_prefix(lm: bp.LanguageModel, name: str) -> None:
    lm = bp.LanguageModel(by_name(name).build(), lm.tokenizer, db=lm.db)
    ours = lm.model.generate(**inputs(lm), **GREEDY, **{CACHE_KEYWORD: lm(CONTEXT).past_key_values})
    assert torch.equal(ours, lm.model.generate(**inputs(lm), **GREEDY))


@pytest.mark.exhaustive
def test_a_trained_model_writes_the_same_in_a_pipeline_and_its_cache_is_adopted_again() -> None:
    directory = smollm2_directory()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    with bp.open(":memory:") as db:
        lm = bp.LanguageModel(model, tokenizer, db=db)
        result = lm(CONTEXT)
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        plain = generator(CONTEXT + QUESTION, **GREEDY)
        assert generator(CONTEXT + QUESTION, **GREEDY, **{CACHE_KEYWORD: result.past_key_values}) == plain
        cache = result.past_key_values
        lm.model.generate(**inputs(lm), **GREEDY, **{CACHE_KEYWORD: cache})
        cache.crop(len(inputs(lm)["input_ids"][0]) - cache.get_seq_length())
        adopted = lm.adopt(lm.text(CONTEXT) + QUESTION, cache)
        assert adopted.num_stored_tokens == adopted.num_tokens - len(result.input_ids)
