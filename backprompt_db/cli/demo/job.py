"""The job of the demo: which API endpoint serves a request? Scored with `LanguageModel.score`, in one process."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from backprompt_db.database.opening import open_database
from backprompt_db.errors import PromptError
from backprompt_db.model import LanguageModel

CONTENT_FREE = ("N/A", "[MASK]", "")
"""Requests that say nothing. What a model answers to them is its bias, which calibration takes away."""

_INSTRUCTION = "Choose the API endpoint that serves each request.\n\n"


@dataclass(frozen=True, slots=True)
class Task:
    """What is scored: every completion after every prompt, which is the context and one ending."""

    context: str
    """The documentation, in the same form as the requests: a description, then its endpoint."""
    endings: list[str]
    """The content-free ones, then one per request."""
    completions: list[str]
    gold: list[int]
    """Per request, the index of the right completion."""

    @property
    def num_pairs(self) -> int:
        """How many completions are scored, over all prompts."""
        return len(self.endings) * len(self.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What one process did, as it reports it."""

    scores: list[list[float]]
    """[num_prompts, num_endpoints]"""
    scoring_seconds: float
    """From the first lookup until everything is on disk."""
    num_asked_tokens: int | None
    """Tokens of all pairs of prompt and completion; None where no tokenizer was loaded."""
    num_computed_tokens: int
    num_hits: int
    num_model_calls: int
    is_model_loaded: bool
    has_torch: bool
    """Whether anything imported torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceResult:
    """What one process did that only looked for the best endpoint of each request."""

    endpoints: list[int]
    """[num_requests]: their indices, calibrated."""
    gains: list[float]
    """[num_requests]: what they were chosen by."""
    scoring_seconds: float
    num_computed_tokens: int
    num_model_calls: int


def load_task(num_requests: int | None = None) -> Task:
    """Return the job on the first `num_requests` requests, all if None. Raises `PromptError` for less than one."""
    if num_requests is not None and num_requests < 1:
        raise PromptError(f"{num_requests} requests are no job", hint="Ask for at least one request.")
    endpoints = json.loads(_data("endpoints.json"))
    names = [entry["endpoint"] for entry in endpoints]
    requests = [json.loads(line) for line in _data("requests.jsonl").splitlines()][:num_requests]
    pairs = [_ending(entry["doc"]) + _completion(entry["endpoint"]) for entry in endpoints]
    return Task(
        context=_INSTRUCTION + "".join(f"{pair}\n\n" for pair in pairs),
        endings=[_ending(request) for request in (*CONTENT_FREE, *(entry["request"] for entry in requests))],
        completions=[_completion(name) for name in names],
        gold=[names.index(entry["endpoint"]) for entry in requests],
    )


def _ending(request: str) -> str:
    return f"Request: {request}\nEndpoint:"


def _completion(endpoint: str) -> str:
    return f" {endpoint}"


def _data(name: str) -> str:
    return files("backprompt_db.cli.demo").joinpath(name).read_text(encoding="utf-8")


def run_once(*, model: str, directory: Path, num_requests: int | None) -> int:
    """Run the job on the database in `directory`, and write a `JobResult` to stdout, as one line of JSON."""
    task = load_task(num_requests)
    with open_database(directory) as db:
        lm = LanguageModel.from_pretrained(model, db=db)
        context = lm.text(task.context)
        began = time.perf_counter()
        scores = lm.score([context + ending for ending in task.endings], task.completions)
        db.flush()
        result = JobResult(
            scores=scores.tolist(),
            scoring_seconds=time.perf_counter() - began,
            num_asked_tokens=_num_asked_tokens(lm.tokenizer, task) if lm.is_loaded else None,
            num_computed_tokens=lm.counters.num_computed_tokens,
            num_hits=db.counters.num_hits,
            num_model_calls=lm.counters.num_model_calls,
            is_model_loaded=lm.is_loaded,
            has_torch="torch" in sys.modules,
        )
    sys.stdout.write(json.dumps(asdict(result)) + "\n")
    return 0


def choose_once(*, model: str, directory: Path, num_requests: int | None) -> int:
    """Find the best endpoint of each request, and write a `ChoiceResult` to stdout, as one line of JSON."""
    task = load_task(num_requests)
    with open_database(directory) as db:
        lm = LanguageModel.from_pretrained(model, db=db)
        prompts = [lm.text(task.context) + ending for ending in task.endings]
        free, real = prompts[: len(CONTENT_FREE)], prompts[len(CONTENT_FREE) :]
        began = time.perf_counter()
        bias = _bias(lm.score(free, task.completions))
        found = lm.best(real, task.completions, bias=-bias)
        db.flush()
        result = ChoiceResult(
            endpoints=[best.index for best in found],
            gains=[best.value for best in found],
            scoring_seconds=time.perf_counter() - began,
            num_computed_tokens=lm.counters.num_computed_tokens,
            num_model_calls=lm.counters.num_model_calls,
        )
    sys.stdout.write(json.dumps(asdict(result)) + "\n")
    return 0


def _num_asked_tokens(tokenizer: Any, task: Task) -> int:
    """Count what plain running would feed to the model, pair by pair."""

    def count(strings: list[str], **options: bool) -> int:
        return sum(len(ids) for ids in tokenizer(strings, **options)["input_ids"])

    num_prompt_tokens = count([task.context + ending for ending in task.endings])
    num_completion_tokens = count(task.completions, add_special_tokens=False)
    return len(task.completions) * num_prompt_tokens + len(task.endings) * num_completion_tokens


def accuracy(scores: Sequence[Sequence[float]], gold: Sequence[int], *, is_calibrated: bool) -> float:
    """Return the share of requests whose best completion is the right one.

    Without calibration, the best completion is the most probable one. With it, the best one gains most over its average
    probability after the content-free requests, so that short or common completions are not preferred (contextual
    calibration, Zhao et al. 2021, arXiv 2102.09690).
    """
    values = gains(scores) if is_calibrated else np.asarray(scores)[len(CONTENT_FREE) :]
    return float(np.mean(values.argmax(axis=1) == np.asarray(gold)))


def gains(scores: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    """Return what the completions of each request are chosen by after calibration: [num_requests, num_completions]."""
    free, real = np.split(np.asarray(scores), [len(CONTENT_FREE)])
    return real - _bias(free)


def _bias(free: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return what is taken from the log-probability of each completion, by those after requests that say nothing."""
    bias: npt.NDArray[np.float64] = np.logaddexp.reduce(free, axis=0)
    return bias
