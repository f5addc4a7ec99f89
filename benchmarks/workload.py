"""What the benchmarks run on: a seeded full-size GPT-2 (124M, float32), and prompts of exact lengths."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import train_tokenizer

NUM_THREADS = 2
REPETITIONS = 7


def gpt2() -> Any:
    """Return GPT-2 small with seeded random weights: the same work as the trained one."""
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval()


def save_gpt2(directory: Path) -> None:
    """Save the model and its tokenizer as files."""
    gpt2().save_pretrained(directory)
    train_tokenizer().save_pretrained(directory)


def digits(num_tokens: int, *, seed: int = 0) -> str:
    """Return a string of that many tokens: the small tokenizer never saw a digit, so each is a token of its own."""
    return "".join(random.Random(seed).choices("0123456789", k=num_tokens))


def median_seconds(run: Callable[[int], Any]) -> float:
    """Return the median time of `run(repetition)`, after one call that is not counted."""
    run(-1)
    times = []
    for repetition in range(REPETITIONS):
        began = time.perf_counter()
        run(repetition)
        times.append(time.perf_counter() - began)
    return statistics.median(times)
