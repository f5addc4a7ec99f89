"""Time of a short suffix by the length of the prefix that it follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import backprompt_db as bp
from backprompt_db.compute.inference.kv_cache import CACHE_KEYWORD
from benchmarks import plain
from benchmarks.plots.curves import Curve, Figure
from benchmarks.timing import Times, timed
from benchmarks.workload import digits, gpt2, language_model
from tests.conftest import train_tokenizer

PREFIX_TOKENS = (128, 256, 512, 1024, 2048, 4096)
SUFFIX_TOKENS = 8
REPETITIONS = 5
TOLERANCE = 1e-3

COLD = "everything computed"
FROM_FILE = "prefix stored, first hit after opening"
FROM_MEMORY = "prefix stored, used before in this process"
LIMIT = "limit: the suffix's own pass, its cache in memory"


def prefix_lengths(directory: Path) -> Figure:
    """Compare the four ways at each length; their last logits are asserted equal."""
    model = gpt2(num_positions=max(PREFIX_TOKENS) + 2 * SUFFIX_TOKENS)
    times = {num_tokens: _times(model, directory / "db", num_tokens) for num_tokens in PREFIX_TOKENS}
    return Figure(
        name="time-by-prefix",
        title=f"Time until the last logits of a prefix and {SUFFIX_TOKENS} new tokens",
        what=f"GPT-2 124M with room for more positions, seeded; medians of {REPETITIONS}; files in the page cache",
        size_label="tokens of the prefix",
        value_label="milliseconds",
        curves=[
            Curve(name, PREFIX_TOKENS, [each.median(name) * 1e3 for each in times.values()], is_bound=name == LIMIT)
            for name in (COLD, FROM_FILE, FROM_MEMORY, LIMIT)
        ],
    )


def _times(model: Any, path: Path, num_tokens: int) -> Times:
    prefix = digits(num_tokens, seed=num_tokens)
    with bp.open(path) as db:
        language_model(model, db)(prefix)
    ids = torch.tensor([train_tokenizer()(prefix)["input_ids"]])
    cache = plain.in_place(plain.prefill(model, ids[0].tolist()).cache, capacity=num_tokens + SUFFIX_TOKENS)
    rows = [_row(model, path, prefix, ids, cache, seed) for seed in range(-1, REPETITIONS)]
    return Times.collect(rows[1:])


def _row(model: Any, path: Path, prefix: str, ids: torch.Tensor, cache: Any, seed: int) -> dict[str, float]:
    suffixes = [digits(SUFFIX_TOKENS, seed=10_000 + 2 * seed + number) for number in range(2)]
    new = torch.tensor(train_tokenizer()(suffixes)["input_ids"])
    with bp.open(path) as db:
        lm = language_model(model, db)
        lm(digits(SUFFIX_TOKENS, seed=20_000 + seed))  # is new: the model is prepared by it, and not by the first hit
        db.flush()
        from_file, first = timed(lambda: _hit(lm, prefix, suffixes[0]))
        db.flush()
        from_memory, second = timed(lambda: _hit(lm, prefix, suffixes[1]))
    limit, logits = timed(lambda: plain.run(model, new[:1], **{CACHE_KEYWORD: cache}, use_cache=True).logits[0, -1])
    plain.keep(cache, ids.shape[1])
    whole = torch.cat([ids, new[1:]], 1)
    cold, expected = timed(lambda: plain.run(model, whole, use_cache=False, logits_to_keep=1).logits[0, -1])
    assert torch.allclose(first, logits, atol=TOLERANCE, rtol=0)
    assert torch.allclose(second, expected, atol=TOLERANCE, rtol=0)
    return {COLD: cold, FROM_FILE: from_file, FROM_MEMORY: from_memory, LIMIT: limit}


def _hit(lm: bp.LanguageModel, prefix: str, suffix: str) -> torch.Tensor:
    result = (lm.text(prefix) + suffix)()
    assert result.num_computed_tokens == SUFFIX_TOKENS
    return result.logits
