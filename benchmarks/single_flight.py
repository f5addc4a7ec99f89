"""Processes that miss the same long prefix at once, with and without waiting for each other."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GPT2LMHeadModel

import backprompt_db as bp
from benchmarks import plain
from benchmarks.report import Measurement
from benchmarks.workload import digits, language_model

NUM_PROCESSES = 8
PREFIX_TOKENS = 600
SUFFIX_TOKENS = 16
NUM_ROUNDS = 3
TIMEOUT_SECONDS = 600
TOLERANCE = 1e-3

WAYS = ("single flight", "each for itself", "one process")
"""How the prompts of a round are run; in the last way one process runs all of them, one after the other."""

_SPAWN: Any = multiprocessing.get_context("spawn")


class Run(NamedTuple):
    """What one process did in one way, in one round."""

    began: float
    ended: float
    num_computed_tokens: int


def single_flight(directory: Path) -> list[Measurement]:
    """A cold prefix that all share, a suffix for each: tokens computed and time until the last has its result."""
    barrier, queue = _SPAWN.Barrier(NUM_PROCESSES), _SPAWN.Queue()
    arguments = [(directory, number, barrier, queue) for number in range(NUM_PROCESSES)]
    processes = [_SPAWN.Process(target=_work, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    answers = dict(queue.get(timeout=TIMEOUT_SECONDS) for _ in processes)
    for process in processes:
        process.join()
    by_way = {
        way: [[answers[number][way][turn] for number in range(NUM_PROCESSES)] for turn in range(NUM_ROUNDS)]
        for way in WAYS
    }
    return _figures(by_way)


def _work(directory: Path, number: int, barrier: Any, queue: Any) -> None:
    """Be one of the processes: run a suffix of its own in every round, or all of them, or none."""
    torch.set_num_threads(1)
    model = GPT2LMHeadModel.from_pretrained(directory / "model").eval()
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    for turn in range(NUM_ROUNDS):
        for way in WAYS:
            suffixes = range(NUM_PROCESSES) if way == "one process" else [number]
            prefix = digits(PREFIX_TOKENS, seed=10 * turn + WAYS.index(way))
            with bp.open(directory / "scratch", single_flight=way == "single flight") as db:
                lm = language_model(model, db)
                barrier.wait(TIMEOUT_SECONDS)
                runs[way].append(_run(lm, prefix, [] if way == "one process" and number else suffixes))
                if not turn:
                    _require_right(lm, prefix, _suffix(number))
            barrier.wait(TIMEOUT_SECONDS)
    queue.put((number, runs))


def _run(lm: bp.LanguageModel, prefix: str, suffixes: Sequence[int]) -> Run:
    before = lm.counters.num_computed_tokens
    began = time.monotonic()
    for number in suffixes:
        lm(lm.text(prefix) + _suffix(number))
    return Run(began, time.monotonic(), lm.counters.num_computed_tokens - before)


def _suffix(number: int) -> str:
    return digits(SUFFIX_TOKENS, seed=1000 + number)


def _require_right(lm: bp.LanguageModel, prefix: str, suffix: str) -> None:
    """What is stored by now, whoever computed it, must be what a plain pass gives."""
    result = (lm.text(prefix) + suffix)()
    ids = torch.tensor(lm.tokenizer(prefix + suffix)["input_ids"])
    with torch.no_grad():
        logits = lm.model(ids[None]).logits[0]
    expected = plain.chosen(logits[:-1], ids[1:])
    assert torch.allclose(result.token_logprobs[1:], expected, atol=TOLERANCE, rtol=0)


def _figures(by_way: dict[str, list[list[Run]]]) -> list[Measurement]:
    tokens = {way: [sum(run.num_computed_tokens for run in runs) for runs in rounds] for way, rounds in by_way.items()}
    seconds = {
        way: statistics.median(max(run.ended for run in runs) - min(run.began for run in runs) for runs in rounds)
        for way, rounds in by_way.items()
    }
    shared, apart, alone = (max(tokens[way]) for way in WAYS)
    times = " / ".join(f"{seconds[way]:.2f} s" for way in WAYS)
    what = f"{NUM_PROCESSES} processes, cold {PREFIX_TOKENS}-token prefix, {SUFFIX_TOKENS}-token suffix each"
    return [
        Measurement(
            "single flight, tokens",
            f"{what}: tokens that all compute over one process's ({shared:,} / {alone:,}; each for itself {apart:,})",
            shared / alone,
            "x",
            1.1,
            is_lower_better=True,
        ),
        Measurement(
            "single flight, time",
            f"{what}: until the last has its result, each for itself over single flight ({' / '.join(WAYS)}: {times})",
            seconds["each for itself"] / seconds["single flight"],
            "x",
        ),
    ]
