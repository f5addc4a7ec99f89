"""What it costs to know which model this is."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import backprompt_db as bp
from backprompt_db.compute.inference import fingerprint
from benchmarks.report import Measurement
from benchmarks.timing import alternate
from benchmarks.workload import NUM_THREADS, digits, gpt2, language_model

NUM_PROMPTS = 20


def identity(directory: Path) -> list[Measurement]:
    """The weights id against hashing the same bytes in threads, and how often it is computed."""
    model = gpt2()
    nbytes = sum(each.nbytes for each in model.parameters())
    times = alternate({"ours": lambda _: fingerprint.weights_id(model), "hashing": lambda _: _hash_all(model)})
    with (
        patch.object(fingerprint, "weights_id", wraps=fingerprint.weights_id) as computed,
        bp.open(directory / "scratch") as db,
    ):
        lm = language_model(model, db)
        for number in range(NUM_PROMPTS):
            lm(digits(4, seed=number))
    what = (
        f"weights id, against SHA-256 of {nbytes / 1e6:,.0f} MB in threads ({times.ms('ours')} / {times.ms('hashing')})"
    )
    return [
        Measurement("weights id", what, times.ratio("ours", "hashing"), "x", 1.3, is_lower_better=True),
        Measurement("weights id computed", f"for {NUM_PROMPTS + 1} prompts on an unchanged model", computed.call_count,
                    "times", 1, is_lower_better=True),
    ]  # fmt: skip


def _hash_all(model: Any) -> list[bytes]:
    tensors = sorted(model.parameters(), key=lambda each: -each.nbytes)  # the longest first: no core waits at the end
    views = [each.detach().reshape(-1).numpy().data for each in tensors]
    with ThreadPoolExecutor(max_workers=NUM_THREADS) as pool:
        return [digest.digest() for digest in pool.map(hashlib.sha256, views)]
