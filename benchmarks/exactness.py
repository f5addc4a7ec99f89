"""How exact packed results are on a real model and real text."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import backprompt_db as bp
from backprompt_db.cli.demo.job import load_task
from backprompt_db.cli.demo.smollm2 import smollm2_directory
from benchmarks.report import Measurement
from benchmarks.workload import NUM_THREADS
from tests.conftest import plain_logprobs

NUM_REQUESTS = 6


def exactness(_: Path) -> list[Measurement]:
    """Every log-probability of a prompt tree, against one plain forward pass per branch."""
    torch.set_num_threads(NUM_THREADS)
    directory = smollm2_directory()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    task = load_task(NUM_REQUESTS)
    with bp.open(":memory:") as db:
        lm = bp.LanguageModel(model, tokenizer, db=db, progress=False)
        context = lm.text(task.context)
        texts = [
            context + ending + completion for ending, completion in zip(task.endings, task.completions, strict=False)
        ]
        lm(context)
        results = lm(texts)
        errors = []
        for result in results:
            logprobs, logits = plain_logprobs(model, result.input_ids)
            errors.append(float((result.token_logprobs - logprobs)[1:].abs().max()))
            errors.append(float((result.logits.log_softmax(-1) - logits.log_softmax(-1)).abs().max()))
    num_tokens = sum(len(result.input_ids) for result in results)
    what = (
        f"largest error of a log-probability, {num_tokens:,} tokens of SmolLM2-135M-Instruct in a prompt tree, float32"
    )
    return [Measurement("exactness", what, max(errors), "nats", 1e-4, is_lower_better=True)]
