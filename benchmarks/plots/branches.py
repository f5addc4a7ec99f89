"""Time of short branches of one stored prefix by their number."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import backprompt_db as bp
from benchmarks import plain
from benchmarks.plots.curves import Curve, Figure
from benchmarks.timing import Times, timed
from benchmarks.workload import digits, gpt2, language_model, leaves
from tests.conftest import train_tokenizer

NUMS_BRANCHES = (1, 4, 16, 64, 256, 1024)
BRANCH_TOKENS = 3
PREFIX_TOKENS = 500
REPETITIONS = 3
MAX_WHOLE = 16
BATCH_SIZE = 32
TOLERANCE = 1e-3

WHOLE = "transformers, each prompt whole"
REPEATED = f"transformers, batches of {BATCH_SIZE} over the prefix's repeated cache"
OURS = "prefix stored, branches computed"
STORED = "everything stored"

Row = dict[str, float]


def numbers_of_branches(directory: Path) -> Figure:
    """Score new branches in each way; the scores are asserted equal."""
    model, prefix = gpt2(), digits(PREFIX_TOKENS)
    every = iter(leaves((REPETITIONS + 1) * sum(NUMS_BRANCHES), BRANCH_TOKENS))
    with bp.open(directory / "db") as db:
        lm = language_model(model, db)
        lm(prefix)
        db.flush()
        times = {num: _times(lm, prefix, every, num) for num in NUMS_BRANCHES}
    return Figure(
        name="time-by-branches",
        title=f"Time of branches of {BRANCH_TOKENS} tokens after {PREFIX_TOKENS} common ones",
        what=f"GPT-2 124M, seeded; medians of {REPETITIONS}; whole prompts up to {MAX_WHOLE} branches",
        size_label="branches",
        value_label="milliseconds",
        curves=[_curve(name, times) for name in (WHOLE, REPEATED, OURS, STORED)],
    )


def _curve(name: str, times: dict[int, Times]) -> Curve:
    measured = {num: each.median(name) * 1e3 for num, each in times.items() if name in each.samples}
    return Curve(name, list(measured), list(measured.values()))


def _times(lm: bp.LanguageModel, prefix: str, every: Iterator[str], num_branches: int) -> Times:
    rows = [_row(lm, prefix, list(itertools.islice(every, num_branches))) for _ in range(REPETITIONS + 1)]
    return Times.collect(rows[1:])


def _row(lm: bp.LanguageModel, prefix: str, branches: Sequence[str]) -> Row:
    tokenizer = train_tokenizer()
    ids, endings = tokenizer(prefix)["input_ids"], tokenizer(list(branches))["input_ids"]
    filled = plain.prefill(lm.model, ids)
    ours, scores = timed(lambda: lm.score(prefix, branches))
    lm.db.flush()
    stored, again = timed(lambda: lm.score(prefix, branches))
    assert (scores == again).all()
    repeated, others = timed(lambda: _repeated(lm.model, filled, endings))
    assert np.allclose(scores, others, atol=TOLERANCE, rtol=0)
    row = {OURS: ours, STORED: stored, REPEATED: repeated}
    if len(branches) <= MAX_WHOLE:
        row[WHOLE], wholes = timed(lambda: [_whole(lm.model, ids, ending) for ending in endings])
        assert np.allclose(scores, wholes, atol=TOLERANCE, rtol=0)
    return row


def _repeated(model: Any, filled: plain.Prefix, endings: Sequence[plain.Ids]) -> list[float]:
    batches = plain.chunks(endings, BATCH_SIZE)
    return [score for batch in batches for score in plain.score_batch(model, filled, batch)]


def _whole(model: Any, ids: Sequence[int], ending: plain.Ids) -> float:
    """Score one ending with all before it, and only the logits that are needed."""
    fed = torch.tensor([[*ids, *ending]])
    logits = plain.run(model, fed[:, :-1], use_cache=False, logits_to_keep=len(ending)).logits[0]
    return float(plain.chosen(logits, torch.tensor(ending)).double().sum())
