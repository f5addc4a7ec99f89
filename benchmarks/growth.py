"""How time and memory grow with the number of leaves, the length of a prefix and the depth of a chain."""

from __future__ import annotations

import itertools
import random
import resource
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch

import backprompt_db as bp
from benchmarks import plain
from benchmarks.report import Measurement
from benchmarks.timing import alternate, seconds
from benchmarks.workload import digits, gpt2, language_model, leaves
from tests.conftest import train_tokenizer

NUMS_LEAVES = (100, 300, 1000, 3000, 10_000)
LEAF_TOKENS = 3
LEAVES_PREFIX_TOKENS = 500
NUM_COMPARED = 20
PEAK_MB = 600

PREFIX_TOKENS = (125, 250, 500, 1000)
SUFFIX_TOKENS = 8

CHAIN_TOKENS = 256
DEPTHS = (1, 2, 4, 8, 16, 32, 64)

TOLERANCE = 1e-3


def many_leaves(directory: Path) -> list[Measurement]:
    """Leaves of one stored prefix: time by their number, once for many of them, and the peak of memory."""
    model, tokenizer = gpt2(), train_tokenizer()
    prefix = digits(LEAVES_PREFIX_TOKENS)
    every = iter(leaves(sum(num * _num_runs(num) for num in NUMS_LEAVES), LEAF_TOKENS))
    with bp.open(directory / "scratch") as db:
        lm = language_model(model, db)
        lm(prefix)
        lm.score(prefix, leaves(10, 2))
        before = psutil.Process().memory_info().rss

        def time_of(num_leaves: int) -> float:
            db.flush()
            batch = list(itertools.islice(every, num_leaves))
            return seconds(lambda: scored.update(zip(batch, lm.score(prefix, batch), strict=True)))

        scored: dict[str, float] = {}
        times = {num: statistics.median(time_of(num) for _ in range(_num_runs(num))) for num in NUMS_LEAVES}
        # The peak may be that of loading the model: then this is too much, never too little.
        peak = (_peak_nbytes() - before) / 1e6
    some = random.Random(0).sample(list(scored), NUM_COMPARED)
    filled = plain.prefill(model, tokenizer(prefix)["input_ids"])
    expected = plain.score_batch(model, filled, tokenizer(some)["input_ids"])
    assert np.allclose([scored[leaf] for leaf in some], expected, atol=TOLERANCE, rtol=0)
    few, many = min(times), max(times)
    what = (
        f"exponent of time over number of leaves, {few:,} to {many:,} of {LEAF_TOKENS} tokens "
        f"({times[few] / few * 1e3:.2f} / {times[many] / many * 1e3:.2f} ms each)"
    )
    memory = f"peak over the loaded model's, {many:,} leaves on a stored {LEAVES_PREFIX_TOKENS}-token prefix"
    return [
        Measurement("growth, leaves", what, _exponent(times), "", 1.1, is_lower_better=True),
        Measurement("memory, leaves", memory, peak, "MB", PEAK_MB, is_lower_better=True),
    ]


def lengths_and_depths(directory: Path) -> list[Measurement]:
    """A suffix of longer and longer prefixes in memory; and the same tokens cut into more and more pieces."""
    with bp.open(directory / "scratch") as db:
        lm = language_model(gpt2(), db)
        for num_tokens in PREFIX_TOKENS:
            lm(digits(num_tokens))
        logits: dict[int, list[torch.Tensor]] = defaultdict(list)

        def suffix(num_tokens: int, repetition: int) -> None:
            result = (lm.text(digits(num_tokens)) + digits(SUFFIX_TOKENS, seed=9000 + repetition))()
            assert result.num_computed_tokens == SUFFIX_TOKENS

        def chain(depth: int, repetition: int) -> None:
            string = digits(CHAIN_TOKENS, seed=8000 + repetition)
            text = lm.text("")
            for piece in plain.chunks(string, CHAIN_TOKENS // depth):
                text += piece
            result = text()
            assert result.num_computed_tokens == CHAIN_TOKENS
            logits[repetition].append(result.logits)

        by_length = _medians(suffix, PREFIX_TOKENS, db)
        by_depth = _medians(chain, DEPTHS, db)
    for first, *others in logits.values():
        assert all(torch.allclose(first, other, atol=TOLERANCE, rtol=0) for other in others)
    return [
        _growth("length", f"time of a {SUFFIX_TOKENS}-token suffix over tokens of a prefix in memory", by_length),
        _growth("depth", f"time of computing {CHAIN_TOKENS} tokens over pieces of their chain", by_depth),
    ]


def _peak_nbytes() -> int:
    """Return the most memory that this process has had."""
    if sys.platform == "win32":
        nbytes = int(psutil.Process().memory_info().peak_wset)
    else:
        nbytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return nbytes


def _num_runs(num_leaves: int) -> int:
    return 3 if num_leaves < 1000 else 1


def _medians(run: Callable[[int, int], None], sizes: Sequence[int], db: bp.Database) -> dict[int, float]:
    """Return the median seconds of `run(size, repetition)` by size."""
    ways = {str(size): partial(run, size) for size in sizes}
    times = alternate(ways, settle=db.flush)
    return {size: times.median(str(size)) for size in sizes}


def _growth(name: str, what: str, times: Mapping[int, float]) -> Measurement:
    few, many = min(times), max(times)
    steps = f"{few:,} to {many:,}: {times[few] * 1e3:.0f} / {times[many] * 1e3:.0f} ms"
    return Measurement(f"growth, {name}", f"exponent of {what} ({steps})", _exponent(times), "")


def _exponent(times: Mapping[int, float]) -> float:
    """Return the slope of a line through the logarithms: 1 where twice as much takes twice as long."""
    return float(np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0])
