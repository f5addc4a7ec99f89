"""Short reviews under several wordings of a context: what is on disk with `keep="auto"`, and with all parts kept."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import backprompt_db as bp
from backprompt_db.cli.demo.smollm2 import smollm2_directory
from benchmarks.report import Measurement
from benchmarks.seams import LABELS, NUM_EXAMPLES, few_shot_reviews, review
from benchmarks.workload import NUM_THREADS

NUM_RUNS = 6


def keeping(directory: Path) -> list[Measurement]:
    """Score reviews after each of six contexts, and run them after one; then again by a handle that finds all."""
    torch.set_num_threads(NUM_THREADS)
    model = AutoModelForCausalLM.from_pretrained(smollm2_directory()).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_directory())
    dice = random.Random(1)
    contexts = [
        "".join(f"{review(dice, label)}{label}\n\n" for label in LABELS * (NUM_EXAMPLES // 2)) for _ in range(NUM_RUNS)
    ]
    reviews = few_shot_reviews(dice)
    measured: list[Measurement] = []
    for kind, some in (("score", contexts), ("lm(...)", contexts[:1])):
        found = {
            keep: _work(directory / "scratch" / f"{kind} {keep}", model, tokenizer, some, reviews, kind, keep)
            for keep in ("all", "auto")
        }
        assert np.allclose(found["all"][0], found["auto"][0], atol=1e-4), "keep= changed a number"
        what = f"{len(reviews)} reviews after each of {len(some)} contexts, {kind}, SmolLM2-135M-Instruct"
        nbytes = {keep: each[1] for keep, each in found.items()}
        target = 0.1 if kind == "score" else None
        measured += [
            Measurement("keep", f"{what}: bytes in use, keep='all'", nbytes["all"], "B"),
            Measurement("keep", f"{what}: bytes in use, by default", nbytes["auto"], "B"),
            Measurement(
                "keep", f"{what}: by default / all", nbytes["auto"] / nbytes["all"], "x", target, is_lower_better=True
            ),
            Measurement("keep", f"{what}: first run, by default / all", found["auto"][2] / found["all"][2], "x"),
        ]
    return measured


def _work(
    place: Path, model: Any, tokenizer: Any, contexts: list[str], reviews: list[str], kind: str, keep: str
) -> tuple[np.ndarray[Any, Any], int, float]:
    """Return the numbers of the first run, the bytes in use after it, and its seconds."""
    with bp.open(place) as db:
        lm = bp.LanguageModel(model, tokenizer, db=db, progress=False, keep=keep)
        lm("Proves the model.")
        began = time.perf_counter()
        first = _run(lm, contexts, reviews, kind)
        db.flush()
        seconds, nbytes = time.perf_counter() - began, db.store.usage().live_nbytes
    with bp.open(place) as db:
        lm = bp.LanguageModel(model, tokenizer, db=db, progress=False, keep=keep)
        assert np.array_equal(_run(lm, contexts, reviews, kind), first), "the second run gave other numbers"
        assert lm.counters.num_model_calls == 0, "the second run computed something"
    return first, nbytes, seconds


def _run(lm: bp.LanguageModel, contexts: list[str], reviews: list[str], kind: str) -> np.ndarray[Any, Any]:
    rows = []
    for context in contexts:
        prompts = [lm.text(context) + each for each in reviews]
        if kind == "score":
            rows.append(lm.score(prompts, LABELS).ravel())
        else:
            rows.append(np.array([float(lm(each).token_logprobs[1:].double().sum()) for each in prompts]))
    return np.concatenate(rows)
