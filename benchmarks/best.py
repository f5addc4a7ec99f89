"""The best of many completions: what finding it computes, against scoring all of them to the end."""

from __future__ import annotations

import ast
import sysconfig
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import backprompt_db as bp
from backprompt_db.cli.demo.job import CONTENT_FREE, load_task
from backprompt_db.cli.demo.smollm2 import smollm2_directory
from benchmarks.report import Measurement
from benchmarks.workload import NUM_THREADS

NUM_REQUESTS = 40
NUM_NAMES = 10_000
TOLERANCE = 1e-3
_LEFT_OUT = {"site-packages", "test", "tests"}
REQUESTS = ("join two paths", "parse a date", "count the words of a list", "send a mail", "compress bytes")


def endpoints(directory: Path) -> list[Measurement]:
    """The demo's task: the best of 28 endpoints after 40 requests, by three rankings."""
    model, tokenizer = _smollm2()
    task = load_task(NUM_REQUESTS)
    num_label_tokens = sum(map(len, tokenizer(task.completions, add_special_tokens=False)["input_ids"]))
    free, real = task.endings[: len(CONTENT_FREE)], task.endings[len(CONTENT_FREE) :]
    with bp.open(directory / "scratch" / "all") as db:
        lm = bp.LanguageModel(model, tokenizer, db=db, progress=False)
        lm([lm.text(task.context) + ending for ending in task.endings], keep="all")
        began = time.perf_counter()
        scores = lm.score([lm.text(task.context) + ending for ending in real], task.completions)
        seconds = time.perf_counter() - began
        prior = np.logaddexp.reduce(lm.score([lm.text(task.context) + each for each in free], task.completions))
    lengths = np.array([len(ids) for ids in tokenizer(task.completions, add_special_tokens=False)["input_ids"]])
    rankings: dict[str, tuple[dict[str, Any], np.ndarray[Any, Any], float]] = {
        "largest sum": ({}, scores, 17 / num_label_tokens),
        "calibrated": ({"bias": -prior}, scores - prior, 46 / num_label_tokens),
        "per token": ({"normalize": "tokens"}, scores / lengths, 55 / num_label_tokens),
    }
    measured = []
    for name, (ranking, values, target) in rankings.items():
        place = directory / "scratch" / name.replace(" ", "-")
        num_tokens, num_calls, took = _best_of(
            place, model, tokenizer, task.context, real, task.completions, ranking, values
        )
        what = (
            f"{NUM_REQUESTS} requests, {len(task.completions)} endpoints, {name}, SmolLM2-135M-Instruct: label tokens "
            f"computed, of {num_label_tokens} a request ({num_tokens / NUM_REQUESTS:.1f} a request in {num_calls} "
            f"passes; {took / seconds:.2f} of the time of scoring all, prompts stored before)"
        )
        share = num_tokens / NUM_REQUESTS / num_label_tokens
        measured.append(Measurement("best", what, share, "x", target, is_lower_better=True))
    return measured


def names(directory: Path) -> list[Measurement]:
    """The likeliest of 10,000 names of functions after a request for one."""
    model, tokenizer = _smollm2()
    completions = [f" {name}" for name in function_names(NUM_NAMES)]
    context = "Name the function of Python's standard library.\nRequest: read a JSON file\nFunction: json.load\n"
    endings = [f"Request: {request}\nFunction:" for request in REQUESTS]
    num_label_tokens = sum(map(len, tokenizer(completions, add_special_tokens=False)["input_ids"]))
    with bp.open(directory / "scratch" / "some") as db:
        lm = bp.LanguageModel(model, tokenizer, db=db, progress=False)
        sample = lm.score([lm.text(context) + endings[0]], completions[:: NUM_NAMES // 200])[0]
    with bp.open(directory / "scratch" / "names") as db:
        lm = bp.LanguageModel(model, tokenizer, db=db, progress=False)
        prompts = [lm.text(context) + ending for ending in endings]
        lm(prompts, keep="all")
        before = lm.counters
        began = time.perf_counter()
        found = lm.best(prompts, completions, k=5)
        seconds = time.perf_counter() - began
        num_tokens = lm.counters.num_computed_tokens - before.num_computed_tokens
        num_calls = lm.counters.num_model_calls - before.num_model_calls
        best = lm.score(prompts, list({str(each) for some in found for each in some}))
        values = np.array([[each.value for each in some] for some in found])
        assert found[0][-1].value > sample.max() - TOLERANCE, "a completion that was left is better"
        assert np.allclose(np.sort(best, axis=1)[:, ::-1][:, :5], values, atol=TOLERANCE), "values differ from scores"
    share = num_tokens / len(endings) / num_label_tokens
    what = (
        f"five best of {len(completions):,} names of functions after {len(endings)} requests, SmolLM2-135M-Instruct: "
        f"label tokens computed, of {num_label_tokens:,} ({num_calls} passes, {seconds / len(endings):.1f} s a request)"
    )
    return [Measurement("best of many", what, share, "x", 0.03, is_lower_better=True)]


def function_names(num_names: int) -> list[str]:
    """Return names of public functions, classes and methods of Python's standard library and NumPy."""
    places = Path(sysconfig.get_path("stdlib")), Path(np.__path__[0])
    found = dict.fromkeys([name for place in places for name in _public_names(place)])
    step = max(1, len(found) // num_names)
    return list(found)[::step][:num_names]


def _public_names(directory: Path) -> Iterator[str]:
    for path in sorted(directory.rglob("*.py")):
        parts = path.relative_to(directory).with_suffix("").parts
        if set(parts) & _LEFT_OUT or any(part.startswith("_") for part in parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield ".".join((*parts, node.name))
                for inner in node.body if isinstance(node, ast.ClassDef) else ():
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        yield ".".join((*parts, node.name, inner.name))


def _best_of(
    place: Path,
    model: Any,
    tokenizer: Any,
    context: str,
    endings: list[str],
    completions: list[str],
    ranking: Mapping[str, Any],
    values: np.ndarray[Any, Any],
) -> tuple[int, int, float]:
    """Return the tokens computed, the passes, and the seconds of finding the best; it is the largest of `values`."""
    with bp.open(place) as db:
        lm = bp.LanguageModel(model, tokenizer, db=db, progress=False)
        prompts = [lm.text(context) + ending for ending in endings]
        lm(prompts, keep="all")
        db.flush()
        before = lm.counters
        began = time.perf_counter()
        found = lm.best(prompts, completions, **ranking)
        seconds = time.perf_counter() - began
        for best, row in zip(found, values, strict=True):
            assert best.value > row.max() - TOLERANCE, "another completion is better"
            assert abs(best.value - row[best.index]) < TOLERANCE, "its value differs from its score"
        after = lm.counters
    return (
        after.num_computed_tokens - before.num_computed_tokens,
        after.num_model_calls - before.num_model_calls,
        seconds,
    )


def _smollm2() -> tuple[Any, Any]:
    torch.set_num_threads(NUM_THREADS)
    directory = smollm2_directory()
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
