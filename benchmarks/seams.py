"""Few-shot reviews after a blank line: healed and kept pieces, against plain passes of the joined string."""

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
from benchmarks.workload import NUM_THREADS
from tests.conftest import plain_logprobs

NUM_REVIEWS = 60
NUM_EXAMPLES = 8
LABELS = [" positive", " negative"]

_SUBJECTS = ["The film", "The plot", "The cast", "The music", "The ending", "The first hour"]
_VERDICTS = {
    " positive": ["is a small wonder", "made me laugh twice", "stays with you for days", "could not be better"],
    " negative": ["is a waste of time", "made me look at my watch", "falls apart at once", "could not be duller"],
}


def seams(_: Path) -> list[Measurement]:
    """How far labels' log-probabilities are from plain ones, with healed and with kept pieces, and what each costs."""
    torch.set_num_threads(NUM_THREADS)
    directory = smollm2_directory()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    dice = random.Random(0)
    context = "".join(f"{review(dice, label)}{label}\n\n" for label in LABELS * (NUM_EXAMPLES // 2))
    endings = few_shot_reviews(dice)
    plain = np.array([[_plain(model, tokenizer, context + ending, label) for label in LABELS] for ending in endings])
    measured = []
    for rule in ("keep", "heal"):
        scores, seconds, num_tokens = _scored(model, tokenizer, context, endings, rule)
        what = f"{len(endings)} few-shot reviews after a blank line, SmolLM2-135M-Instruct, seams={rule!r}"
        error = float(np.abs(scores - plain).max())
        num_changed = int((scores.argmax(1) != plain.argmax(1)).sum())
        target = 1e-4 if rule == "heal" else None
        measured += [
            Measurement(
                f"seams: {rule}", f"{what}: largest error of a score", error, "nats", target, is_lower_better=True
            ),
            Measurement(f"seams: {rule}", f"{what}: predicted labels that differ", num_changed, "labels"),
            Measurement(f"seams: {rule}", f"{what}: tokens computed", num_tokens, "tokens"),
            Measurement(f"seams: {rule}", f"{what}: time of all scores", seconds, "s"),
        ]
    return measured


def few_shot_reviews(dice: random.Random) -> list[str]:
    """Return different reviews, up to where the label follows."""
    return list(dict.fromkeys(review(dice, dice.choice(LABELS)) for _ in range(NUM_REVIEWS * 2)))[:NUM_REVIEWS]


def review(dice: random.Random, label: str) -> str:
    """Return a review that deserves the label, up to where the label follows."""
    subject, one, other = dice.choice(_SUBJECTS), dice.choice(_VERDICTS[label]), dice.choice(_VERDICTS[label])
    return f"Review: {subject} {one}, and {other}.\nSentiment:"


def _scored(
    model: Any, tokenizer: Any, context: str, endings: list[str], rule: str
) -> tuple[np.ndarray[Any, Any], float, int]:
    """Return scores, seconds and computed tokens, after the context was run alone."""
    with bp.open(":memory:") as db:
        lm = bp.LanguageModel(model, tokenizer, db=db, progress=False)
        shots = lm.text(context, seams=rule)
        shots()
        num_before = lm.counters.num_computed_tokens
        began = time.perf_counter()
        scores = lm.score([shots + ending for ending in endings], LABELS)
        return scores, time.perf_counter() - began, lm.counters.num_computed_tokens - num_before


def _plain(model: Any, tokenizer: Any, prompt: str, label: str) -> float:
    """Return the log-probability of a label's tokens by one plain pass over the joined string."""
    ids = torch.tensor(tokenizer(prompt + label)["input_ids"])
    num_prompt_tokens = len(tokenizer(prompt)["input_ids"])
    return float(plain_logprobs(model, ids)[0][num_prompt_tokens:].double().sum())
