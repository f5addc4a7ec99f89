"""Greedy generation after a stored prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

import backprompt_db as bp
from backprompt_db.cli.demo.smollm2 import smollm2_directory
from backprompt_db.compute.inference.kv_cache import CACHE_KEYWORD
from benchmarks import plain
from benchmarks.plain import Ids
from benchmarks.report import Measurement
from benchmarks.timing import Run, Times, alternate
from benchmarks.workload import REPETITIONS, digits, gpt2
from tests.conftest import train_tokenizer

NEW_TOKENS = 64
REQUEST_TOKENS = 8
GPT2_PREFIX_TOKENS = 900
SMOLLM2_PREFIX_TOKENS = 1000
SMOLLM2_REPETITIONS = 3


def after_stored_prefix(directory: Path) -> list[Measurement]:
    """GPT-2, whose 1,024 positions leave room for a prefix of 900 tokens."""
    times = _times(directory, gpt2(), train_tokenizer(), digits(GPT2_PREFIX_TOKENS, seed=5), REPETITIONS)
    return _figures(f"GPT-2, {GPT2_PREFIX_TOKENS}-token prefix", times, REPETITIONS)


def after_long_prefix(directory: Path) -> list[Measurement]:
    """SmolLM2-135M-Instruct; fewer repetitions, since nothing differs but the model."""
    where = smollm2_directory()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(where).eval(), AutoTokenizer.from_pretrained(where)
    times = _times(directory, model, tokenizer, digits(SMOLLM2_PREFIX_TOKENS, seed=5), SMOLLM2_REPETITIONS)
    return _figures(f"SmolLM2-135M, {SMOLLM2_PREFIX_TOKENS:,}-token prefix", times, SMOLLM2_REPETITIONS)


def _times(directory: Path, model: Any, tokenizer: Any, prefix: str, repetitions: int) -> Times:
    """Time new tokens after the stored prefix and a request that is new each time, in three ways."""
    filled = plain.prefill(model, tokenizer(prefix)["input_ids"])

    def request(repetition: int) -> str:
        return digits(REQUEST_TOKENS, seed=6000 + repetition)

    def ids(repetition: int) -> Ids:
        # Piece by piece, as ours.
        pieces = tokenizer(prefix)["input_ids"], tokenizer(request(repetition), add_special_tokens=False)["input_ids"]
        return [*pieces[0], *pieces[1]]

    with bp.open(directory / "scratch") as db:
        lm = bp.LanguageModel(model, tokenizer, db=db, progress=False)
        lm(prefix)
        lm.generate(digits(REQUEST_TOKENS), max_new_tokens=2, do_sample=False)
        _generate(model, tokenizer, ids(-1)[-REQUEST_TOKENS:], DynamicCache(), num_tokens=2)

        def ours(repetition: int) -> list[int]:
            text = lm.text(prefix) + request(repetition)
            result = lm.generate(text, max_new_tokens=NEW_TOKENS, do_sample=False)
            return [int(each) for each in result.token_ids]

        ways: dict[str, Run] = {
            "ours": ours,
            "plain": lambda n: _generate(model, tokenizer, ids(n), DynamicCache()),
            "RAM": lambda n: _generate(model, tokenizer, ids(n), plain.viewed(filled.cache)),
        }
        times = alternate(ways, repetitions=repetitions, warm_up=False, settle=db.flush)
    assert times.results["ours"] == times.results["plain"] == times.results["RAM"]
    return times


def _generate(model: Any, tokenizer: Any, ids: Ids, cache: Any, *, num_tokens: int = NEW_TOKENS) -> list[int]:
    """Return what transformers' `generate` adds to a prompt, from a cache of its beginning or an empty one."""
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        **{CACHE_KEYWORD: cache},
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return [int(each) for each in output[0, len(ids) :]]


def _figures(name: str, times: Times, repetitions: int) -> list[Measurement]:
    what = f"{name}, {REQUEST_TOKENS} tokens of a request, {NEW_TOKENS} greedy tokens, median of {repetitions}, against"
    whole = f"{what} generate on the whole prompt ({times.ms('plain')} / {times.ms('ours')})"
    ram = f"{what} generate on a DynamicCache of the prefix in memory ({times.ms('ours')} / {times.ms('RAM')})"
    return [
        Measurement("generation", whole, times.ratio("plain", "ours"), "x", 1.0),
        Measurement("generation against RAM", ram, times.ratio("ours", "RAM"), "x"),
    ]
