"""Short prompts, and those that grow or take turns: what stays in memory between them, and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil
import torch

import backprompt_db as bp
from benchmarks import plain
from benchmarks.report import Measurement
from benchmarks.timing import seconds
from benchmarks.workload import TOKEN_NBYTES, digits, gpt2, language_model
from tests.conftest import train_tokenizer

NUM_SHORT, SHORT_TOKENS = 60, 10
NUM_AFTER_PREFIX, PREFIX_TOKENS, AFTER_TOKENS = 100, 10, 30
NUM_TURNS, TURN_TOKENS = 12, 10
NUM_CHATS = 4
NUM_COMPARED = 10
PEAK_MB = 160
TOLERANCE = 1e-3


def memory(directory: Path) -> list[Measurement]:
    """Unrelated short prompts, many after one prefix, one chat that grows, and several that take turns."""
    prefix = digits(PREFIX_TOKENS, seed=7000)
    chats = [_turns(7200 + 20 * chat) for chat in range(NUM_CHATS)]
    workloads = {
        f"{NUM_SHORT} prompts of {SHORT_TOKENS} tokens": [[digits(SHORT_TOKENS, seed=n)] for n in range(NUM_SHORT)],
        f"{NUM_AFTER_PREFIX} of {AFTER_TOKENS} after one of {PREFIX_TOKENS}": [
            [prefix, digits(AFTER_TOKENS, seed=n)] for n in range(NUM_AFTER_PREFIX)
        ],
        f"a chat of {NUM_TURNS} turns": _turns(7100),
        f"{NUM_CHATS} such chats in turn": [turn for turns in zip(*chats, strict=True) for turn in turns],
    }
    return [each for what, pieces in workloads.items() for each in _measure(directory / "scratch" / what, what, pieces)]


def _turns(seed: int) -> list[list[str]]:
    """Return a chat, each time with one turn more."""
    turns = [digits(TURN_TOKENS, seed=seed + turn) for turn in range(NUM_TURNS)]
    return [turns[: number + 1] for number in range(NUM_TURNS)]


def _measure(place: Path, what: str, prompts: Sequence[Sequence[str]]) -> list[Measurement]:
    """Run prompts, each given in pieces, one after the other, and compare some of them with plain forward passes."""
    model = gpt2()
    with bp.open(place) as db:
        lm = language_model(model, db)
        texts = [sum(map(lm.text, pieces), lm.text("")) for pieces in prompts]
        before = peak = psutil.Process().memory_info().rss
        times = []
        for text in texts:
            times.append(seconds(partial(lm.run, text)))
            peak = max(peak, psutil.Process().memory_info().rss)
        buffers = db.memory.grouped()
        held_nbytes = sum(buffer.nbytes for buffer in buffers)
        num_tokens = sum(length for buffer in buffers for _, length in buffer.contents)
        for text in texts[:: max(1, len(texts) // NUM_COMPARED)]:
            ids = torch.tensor([train_tokenizer()(str(text))["input_ids"]])
            logprobs = plain.chosen(plain.run(model, ids[:, :-1], use_cache=False).logits, ids[:, 1:])[0]
            assert torch.allclose(text().token_logprobs[1:], logprobs, atol=TOLERANCE, rtol=0)
    tokens_nbytes = num_tokens * TOKEN_NBYTES
    useful = f"{len(buffers)} buffers, {held_nbytes / 1e6:,.0f} MB for {tokens_nbytes / 1e6:,.0f} MB of tokens"
    peak_mb, average_ms = (peak - before) / 1e6, sum(times) / len(times) * 1e3
    return [
        Measurement("memory", f"{what}: peak over the loaded model's; {useful} stay", peak_mb, "MB", PEAK_MB,
                    is_lower_better=True),
        Measurement("memory", f"{what}: time of one, on average", average_ms, "ms"),
    ]  # fmt: skip
