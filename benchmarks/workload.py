"""What the benchmarks run on: a seeded full-size GPT-2 (124M, float32), and prompts of exact lengths."""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

import backprompt_db as bp
from tests.conftest import CORPUS, train_tokenizer

NUM_THREADS = 2
REPETITIONS = 7
TOKEN_NBYTES = 12 * 2 * 12 * 64 * 4
"""Keys and values of one token of GPT-2 small in float32."""

torch.set_num_threads(NUM_THREADS)  # the tests' fixtures, imported above, set one
logging.set_verbosity_error()
logging.disable_progress_bar()

_Result = TypeVar("_Result")

_UNSEEN = "".join(sorted(set(string.digits + string.ascii_uppercase) - set("".join(CORPUS))))
"""Characters that the small tokenizer never saw: each is a token of its own, whatever stands beside it."""


def gpt2(*, num_positions: int = 1024) -> Any:
    """Return GPT-2 small with seeded random weights: the same work as the trained one."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_positions=num_positions)).eval()


def save_gpt2(directory: Path) -> None:
    """Save the model and its tokenizer as files."""
    gpt2().save_pretrained(directory)
    train_tokenizer().save_pretrained(directory)


def language_model(model: Any, db: bp.Database) -> bp.LanguageModel:
    """Return a model with the small tokenizer on a database, warmed up and proven on a prompt that nobody else runs."""
    lm = bp.LanguageModel(model, train_tokenizer(), db=db, progress=False)
    lm("Warm up.")
    db.flush()
    return lm


def digits(num_tokens: int, *, seed: int = 0) -> str:
    """Return a string of that many tokens: each digit is a token of its own."""
    return "".join(random.Random(seed).choices(string.digits, k=num_tokens))


def leaves(num_leaves: int, num_tokens: int, *, seed: int = 0) -> list[str]:
    """Return that many different strings of `num_tokens` tokens."""
    every = ["".join(each) for each in itertools.product(_UNSEEN, repeat=num_tokens)]
    return random.Random(seed).sample(every, num_leaves)


def in_fresh_process(function: Callable[[Path], _Result], directory: Path) -> _Result:
    """Return `function(directory)`, run in a process that has done nothing before and ends afterwards."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, directory).result()
