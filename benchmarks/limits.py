"""What the machine can do at best, and how far the figures are from it."""

from __future__ import annotations

from pathlib import Path

import torch

import backprompt_db as bp
from benchmarks import plain
from benchmarks.plain import Prefix
from benchmarks.reads import PREFIX_TOKENS, SUFFIX_TOKENS
from benchmarks.report import Measurement
from benchmarks.timing import alternate
from benchmarks.trees import COMPLETION_TOKENS, NUM_COMPLETIONS
from benchmarks.trees import PREFIX_TOKENS as TREE_PREFIX_TOKENS
from benchmarks.workload import TOKEN_NBYTES, digits, gpt2, language_model
from tests.conftest import train_tokenizer

COPY_NBYTES = 512 << 20


def limits(directory: Path) -> list[Measurement]:
    """Copies and matrix products at full speed, beside a hit and a prompt tree."""
    return [*_of_the_hit(directory), *_of_the_tree(directory)]


def _of_the_hit(directory: Path) -> list[Measurement]:
    """A hit cannot be faster than one copy of its bytes and the suffix's own pass."""
    model, tokenizer = gpt2(), train_tokenizer()
    prefix = plain.prefill(model, tokenizer(digits(PREFIX_TOKENS))["input_ids"])
    cache = plain.in_place(prefix.cache, capacity=PREFIX_TOKENS + SUFFIX_TOKENS)
    source, target = torch.ones(COPY_NBYTES, dtype=torch.uint8), torch.ones(COPY_NBYTES, dtype=torch.uint8)

    def suffix(repetition: int) -> str:
        return digits(SUFFIX_TOKENS, seed=11_000 + repetition)

    def in_ram(repetition: int) -> None:
        ids = tokenizer(suffix(repetition))["input_ids"]
        plain.continue_prefix(model, Prefix(plain.keep(cache, PREFIX_TOKENS), prefix.logits), ids)

    with bp.open(directory / "db") as db:
        lm = language_model(model, db)

        def hit(repetition: int) -> None:
            db.memory.clear()  # as if the process had just begun
            result = (lm.text(digits(PREFIX_TOKENS)) + suffix(repetition))()
            assert result.num_computed_tokens == SUFFIX_TOKENS

        ways = {"hit": hit, "suffix": in_ram, "copy": lambda _: target.copy_(source)}
        times = alternate(ways, settle=db.flush)
    nbytes = PREFIX_TOKENS * TOKEN_NBYTES
    copy_seconds = times.median("copy") * nbytes / COPY_NBYTES
    limit = copy_seconds + times.median("suffix")
    what = (
        f"a hit of {nbytes / 1e6:.0f} MB over its limit: one copy of these bytes and the suffix's own pass in memory "
        f"({times.ms('hit')} / {copy_seconds * 1e3:.0f} + {times.ms('suffix')})"
    )
    bandwidth = 2 * COPY_NBYTES / times.median("copy") / 1e9
    return [
        Measurement("memory bandwidth", f"copy of {COPY_NBYTES >> 20} MiB, read and written", bandwidth, "GB/s"),
        Measurement("hit over its limit", what, times.median("hit") / limit, "x"),
    ]


def _of_the_tree(directory: Path) -> list[Measurement]:
    """A prompt tree cannot be faster than the matrix products of its new tokens."""
    model = gpt2()
    num_rows = NUM_COMPLETIONS * (COMPLETION_TOKENS - 1)
    rows = {num: torch.randn(num_rows, num) for num in (model.config.n_embd, 4 * model.config.n_embd)}
    weights = [each for each in model.transformer.h.parameters() if each.ndim == 2]
    num_operations = 2 * num_rows * sum(each.numel() for each in weights)
    num_all = num_operations + 2 * num_rows * model.lm_head.weight.numel()
    string = digits(TREE_PREFIX_TOKENS, seed=1)

    def products() -> None:
        with torch.no_grad():
            for weight in weights:
                torch.mm(rows[len(weight)], weight)

    with bp.open(directory / "scratch") as db:
        lm = language_model(model, db)
        lm(string)

        def tree(repetition: int) -> None:
            seeds = range(1000 * (repetition + 2), 1000 * (repetition + 2) + NUM_COMPLETIONS)
            lm.score(string, [digits(COMPLETION_TOKENS, seed=seed) for seed in seeds])

        times = alternate({"tree": tree, "products": lambda _: products()}, settle=db.flush)
    rate = num_operations / times.median("products")
    explained = num_all / rate
    what = (
        f"share of the prompt tree's time that the matrix products of its {num_rows} new tokens take at this rate "
        f"({explained * 1e3:.0f} ms of {times.ms('tree')})"
    )
    return [
        Measurement("matrix products", f"the model's own, {num_rows} rows, without the head", rate / 1e9, "GFLOP/s"),
        Measurement("products in a tree", what, explained / times.median("tree"), ""),
    ]
