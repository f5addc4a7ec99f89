"""Many completions of few prompts: prompt trees, against the best that transformers' caches allow."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import backprompt_db as bp
from benchmarks import plain
from benchmarks.plain import Ids, Prefix
from benchmarks.plaintree import PlainTree, fastest, score_batches
from benchmarks.report import Measurement
from benchmarks.timing import Run, alternate, seconds, timed
from benchmarks.workload import REPETITIONS, digits, gpt2, language_model
from tests.conftest import train_tokenizer

PREFIX_TOKENS = 900
NUM_COMPLETIONS = 32
COMPLETION_TOKENS = 12
BATCH_SIZES = (4, 8, 16, 32)

CONTEXT_TOKENS = 600
NUM_REQUESTS = 40
REQUEST_TOKENS = 24
LABEL_TOKENS = (2, 3, 4, 5, 6)
NUM_LABELS = 25
TREE_REPETITIONS = 3

TOLERANCE = 1e-3


def completions(directory: Path) -> list[Measurement]:
    """Completions of a stored prefix, against transformers batches that repeat the prefix cache."""
    model, tokenizer = gpt2(), train_tokenizer()
    string = digits(PREFIX_TOKENS, seed=1)
    prefix = plain.prefill(model, tokenizer(string)["input_ids"])
    kept = Prefix(plain.in_place(prefix.cache, capacity=PREFIX_TOKENS + COMPLETION_TOKENS), prefix.logits)

    def texts(repetition: int) -> list[str]:
        return [digits(COMPLETION_TOKENS, seed=1000 * (repetition + 2) + number) for number in range(NUM_COMPLETIONS)]

    def ids(repetition: int) -> list[Ids]:
        return list(tokenizer(texts(repetition))["input_ids"])

    def cost(size: int) -> float:
        return seconds(lambda: plain.score_batch(model, prefix, ids(0)[:size])) / size

    size = fastest(cost, BATCH_SIZES)

    with bp.open(directory / "scratch") as db:
        lm = language_model(model, db)
        lm(string)
        ways: dict[str, Run] = {
            "ours": lambda n: lm.score(string, texts(n)),
            "batches": lambda n: score_batches(model, prefix, ids(n), size),
        }
        times = alternate(ways, settle=db.flush)
        single_seconds, single = timed(lambda: plain.score_in_place(model, kept, ids(0)))
    assert np.allclose(times.results["ours"], times.results["batches"], atol=TOLERANCE, rtol=0)
    assert np.allclose(times.results["ours"][0], single, atol=TOLERANCE, rtol=0)
    tree = f"{NUM_COMPLETIONS} completions x {COMPLETION_TOKENS} tokens on a stored {PREFIX_TOKENS}-token prefix"
    return [
        Measurement("prompt tree", f"{tree}, against the prefix cache repeated over batches of {size} "
                    f"({times.ms('batches')} / {times.ms('ours')})", times.ratio("batches", "ours"), "x", 8, goal=12),
        Measurement("prompt tree, one by one", f"{tree}, against one after the other on a preallocated cache "
                    f"({single_seconds * 1e3:,.0f} ms, once / {times.ms('ours')})",
                    single_seconds / times.median("ours"), "x"),
    ]  # fmt: skip


def three_levels(directory: Path) -> list[Measurement]:
    """All labels of many requests after a stored context, against the best way with transformers' caches."""
    model, tokenizer = gpt2(), train_tokenizer()
    context = digits(CONTEXT_TOKENS, seed=2)
    labels = [digits(LABEL_TOKENS[number % 5], seed=5000 + number) for number in range(NUM_LABELS)]

    def ids(strings: Sequence[str]) -> list[Ids]:
        return list(tokenizer(list(strings))["input_ids"])

    filled = plain.prefill(model, ids([context])[0])
    tree = PlainTree(model, filled, num_more_tokens=REQUEST_TOKENS + max(LABEL_TOKENS))
    sizes = tree.calibrate(ids(_requests(0)), ids(labels))
    with bp.open(directory / "scratch") as db:
        lm = language_model(model, db)
        lm(context)

        def ours(repetition: int) -> tuple[float, npt.NDArray[np.float64]]:
            db.flush()
            prompts = [lm.text(context) + request for request in _requests(repetition)]
            return timed(lambda: lm.score(prompts, labels))

        first, scores = ours(0)
        # In full, but once: it takes as long as many of ours.
        plain_seconds, expected = timed(lambda: tree.score(ids(_requests(0)), ids(labels), sizes))
        own = statistics.median([first, *(ours(repetition)[0] for repetition in range(1, TREE_REPETITIONS))])
    assert np.allclose(scores, expected, atol=TOLERANCE, rtol=0)
    what = (
        f"{NUM_REQUESTS} requests x {NUM_LABELS} labels after a stored {CONTEXT_TOKENS}-token context, against its "
        f"cache in memory, {sizes} ({plain_seconds:.1f} s, once / {own:.1f} s, median of {TREE_REPETITIONS})"
    )
    return [Measurement("three-level tree", what, plain_seconds / own, "x", 8)]


def continued_leaf(directory: Path) -> list[Measurement]:
    """A completion of which only the score was kept, then continued: its own tokens are computed, nothing else."""
    model, tokenizer = gpt2(), train_tokenizer()
    string = digits(PREFIX_TOKENS, seed=1)
    prefix = plain.prefill(model, tokenizer(string)["input_ids"])
    cache = plain.in_place(prefix.cache, capacity=PREFIX_TOKENS + 2 * COMPLETION_TOKENS)

    def pieces(repetition: int) -> tuple[str, str]:
        return digits(COMPLETION_TOKENS, seed=7000 + repetition), digits(COMPLETION_TOKENS, seed=8000 + repetition)

    with bp.open(directory / "scratch") as db:
        lm = language_model(model, db)
        lm(string)
        lm.score(string, [pieces(repetition)[0] for repetition in range(-1, REPETITIONS)])

        def continued(repetition: int) -> torch.Tensor:
            leaf, more = pieces(repetition)
            result = (lm.text(string) + leaf + more)()
            assert result.num_computed_tokens == 2 * COMPLETION_TOKENS
            return result.token_logprobs[PREFIX_TOKENS:]

        def in_ram(repetition: int) -> torch.Tensor:
            fed = tokenizer("".join(pieces(repetition)))["input_ids"]
            after = Prefix(plain.keep(cache, PREFIX_TOKENS), prefix.logits)
            return plain.continue_prefix(model, after, fed)[0]

        times = alternate({"ours": continued, "RAM": in_ram}, settle=db.flush)
    for own, other in zip(times.results["ours"], times.results["RAM"], strict=True):
        assert torch.allclose(own, other, atol=TOLERANCE, rtol=0)
    what = (
        f"a scored leaf of {COMPLETION_TOKENS} tokens and {COMPLETION_TOKENS} more after it, against a pass over these "
        f"tokens with all before them in memory ({times.ms('ours')} / {times.ms('RAM')})"
    )
    return [Measurement("continued leaf", what, times.ratio("ours", "RAM"), "x")]


def _requests(repetition: int) -> list[str]:
    return [digits(REQUEST_TOKENS, seed=100 * (repetition + 1) + number) for number in range(NUM_REQUESTS)]
