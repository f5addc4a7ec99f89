"""Many unrelated prompts in one call, nothing of which is stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import backprompt_db as bp
from benchmarks import plain
from benchmarks.plain import Ids
from benchmarks.plaintree import fastest
from benchmarks.report import Measurement
from benchmarks.timing import Run, alternate, seconds
from benchmarks.workload import digits, gpt2, language_model
from tests.conftest import train_tokenizer

NUM_PROMPTS = 64
SHORTEST, LONGEST = 10, 120
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
TOLERANCE = 1e-3


def unrelated_prompts(directory: Path) -> list[Measurement]:
    """Prompts that share nothing, against padded batches of the best size; both give every token's log-probability."""
    model, tokenizer = gpt2(), train_tokenizer()

    def ids(repetition: int) -> list[Ids]:
        return list(tokenizer(_prompts(repetition))["input_ids"])

    def cost(size: int) -> float:
        return seconds(lambda: _padded_logprobs(model, ids(0)[::2], size))

    size = fastest(cost, BATCH_SIZES, num_runs=1)
    with bp.open(directory / "scratch") as db:
        lm = language_model(model, db)
        ways: dict[str, Run] = {
            "ours": lambda n: [result.token_logprobs for result in lm(_prompts(n))],
            "padded": lambda n: _padded_logprobs(model, ids(n), size),
        }
        times = alternate(ways, warm_up=False, settle=db.flush)
    for ours, theirs in zip(times.results["ours"], times.results["padded"], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one[1:], other, atol=TOLERANCE, rtol=0)
    what = (
        f"{NUM_PROMPTS} prompts of {SHORTEST} to {LONGEST} tokens in one call, all stored, against padded batches of "
        f"{size} in order of length ({times.ms('ours')} / {times.ms('padded')})"
    )
    return [Measurement("unrelated prompts", what, times.ratio("ours", "padded"), "x", 1.0, is_lower_better=True)]


def _prompts(repetition: int) -> list[str]:
    """Return prompts of evenly spread lengths, in no order of length."""
    step = (LONGEST - SHORTEST) / (NUM_PROMPTS - 1)
    lengths = [round(SHORTEST + step * (number * 29 % NUM_PROMPTS)) for number in range(NUM_PROMPTS)]
    return [digits(length, seed=1000 * (repetition + 2) + number) for number, length in enumerate(lengths)]


def _padded_logprobs(model: Any, prompts: Sequence[Ids], size: int) -> list[torch.Tensor]:
    """Return the log-probability of every token but the first of each prompt."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    found: dict[int, torch.Tensor] = {}
    for numbers in plain.chunks(order, size):
        batch = plain.padded([prompts[number] for number in numbers])
        logprobs = plain.chosen(plain.run(model, batch[:, :-1], use_cache=False).logits, batch[:, 1:])
        found |= {number: row[: len(prompts[number]) - 1] for number, row in zip(numbers, logprobs, strict=True)}
    return [found[number] for number in range(len(prompts))]
