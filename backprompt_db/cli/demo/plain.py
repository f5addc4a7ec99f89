"""The same scores with transformers alone, on a sample of the requests: what the demo compares with.

`python -m backprompt_db.cli.demo.plain MODEL NUM_REQUESTS SAMPLE` writes a list of `PlainResult` to stdout, as JSON.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from backprompt_db.cli.demo.job import CONTENT_FREE, Task, load_task

_BATCH_SIZE = 4
_PADDED_SHARE = 8
"""Full prompts cost much, so they are run on one in so many requests of the sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainResult:
    """The cost of one way to score: measured on the sample, extrapolated to all prompts."""

    name: str
    num_sampled: int
    sampled_seconds: float
    scoring_seconds: float
    num_computed_tokens: int
    num_model_calls: int
    scores: list[list[float]]
    """The log-probabilities after the first requests: [num_sampled, num_completions]."""


@dataclass(frozen=True, slots=True)
class _Tokens:
    context: list[int]
    endings: list[list[int]]
    """The tokens after the context, of each sampled request."""
    completions: list[list[int]]


class _Meter:
    """A model that counts what it is fed."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.num_tokens = self.num_calls = 0

    def __call__(self, input_ids: Any, **inputs: Any) -> Any:
        self.num_tokens += input_ids.numel()
        self.num_calls += 1
        return self._model(input_ids=input_ids, **inputs)


_Score = Callable[[list[int]], list[float]]
"""Give the log-probability of each completion after the tokens of one ending."""


def score_full_prompts(model: Any, tokens: _Tokens) -> _Score:
    """Run every prompt with every completion in full, in padded batches: what people do by default."""

    def score(ending: list[int]) -> list[float]:
        prompt = tokens.context + ending
        batches = _batches(tokens.completions, _BATCH_SIZE)
        return [logprob for batch in batches for logprob in _score_full(model, prompt, batch)]

    return score


def _score_full(model: Any, prompt: list[int], completions: list[list[int]]) -> list[float]:
    input_ids, attention_mask = _padded([prompt + completion for completion in completions])
    logits = model(input_ids, attention_mask=attention_mask).logits[:, len(prompt) - 1 :]
    return [_sum_logprobs(row, completion) for row, completion in zip(logits, completions, strict=True)]


def score_with_cache(model: Any, tokens: _Tokens) -> _Score:
    """Keep the context's keys and values in memory; batch the completions of each request: the work of an expert."""
    import torch

    prefix = model(torch.tensor([tokens.context]), use_cache=True).past_key_values
    padded, is_token = _padded(tokens.completions)

    def score(ending: list[int]) -> list[float]:
        cache = copy.deepcopy(prefix)
        first = model(torch.tensor([ending]), past_key_values=cache, use_cache=True).logits[:, -1:]
        cache.batch_repeat_interleave(len(padded))
        seen = torch.ones(len(padded), len(tokens.context) + len(ending), dtype=is_token.dtype)
        mask = torch.cat([seen, is_token], dim=1)
        rest = model(padded, past_key_values=cache, attention_mask=mask, use_cache=True).logits
        logits = torch.cat([first.expand(len(padded), -1, -1), rest], dim=1)
        return [_sum_logprobs(row, completion) for row, completion in zip(logits, tokens.completions, strict=True)]

    return score


def _sum_logprobs(logits: Any, completion: list[int]) -> float:
    """Sum the log-probabilities of a completion; `logits` [T, vocab_size] begin where its first token is predicted."""
    import torch

    rows = logits[: len(completion)].double().log_softmax(-1)
    return float(rows.gather(1, torch.tensor(completion)[:, None]).sum())


def _padded(rows: Sequence[list[int]]) -> tuple[Any, Any]:
    """Return token ids padded on the right, and the attention mask of that."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return ids, pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], batch_first=True)


def _batches(rows: list[list[int]], size: int) -> list[list[list[int]]]:
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]


def _tokens(tokenizer: Any, task: Task) -> _Tokens:
    """Tokenise the sampled prompts whole; what they all begin with is the context."""
    endings = task.endings[len(CONTENT_FREE) :]
    prompts = [list(ids) for ids in tokenizer([task.context + ending for ending in endings])["input_ids"]]
    rows = [*prompts, list(tokenizer(task.context)["input_ids"])]
    num_common = sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False)))
    context = rows[0][:num_common]
    completions = [list(ids) for ids in tokenizer(task.completions, add_special_tokens=False)["input_ids"]]
    return _Tokens(context, [prompt[len(context) :] for prompt in prompts], completions)


def _measure(
    name: str, prepare: Callable[[Any, _Tokens], _Score], model: Any, tokens: _Tokens, *, num_sampled: int, task: Task
) -> PlainResult:
    """Score the first `num_sampled` requests, and extrapolate what that cost; preparing is done once in any case."""
    meter = _Meter(model)
    points = [(time.perf_counter(), 0, 0)]

    def mark() -> None:
        points.append((time.perf_counter(), meter.num_tokens, meter.num_calls))

    score = prepare(meter, tokens)
    mark()
    scores = [score(ending) for ending in tokens.endings[:num_sampled]]
    mark()
    factor = len(task.endings) / num_sampled
    start, ready, end = points
    seconds, num_tokens, num_calls = (b - a + factor * (c - b) for a, b, c in zip(start, ready, end, strict=True))
    return PlainResult(
        name=name,
        num_sampled=num_sampled,
        sampled_seconds=end[0] - start[0],
        scoring_seconds=seconds,
        num_computed_tokens=round(num_tokens),
        num_model_calls=round(num_calls),
        scores=scores,
    )


def run_plain(*, model: str, num_requests: int | None, sample: int) -> list[PlainResult]:
    """Score a sample of the requests in both plain ways."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = load_task(num_requests)
    tokens = _tokens(AutoTokenizer.from_pretrained(model), task)
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    num_cached = min(sample, len(task.gold))
    num_full = -(-num_cached // _PADDED_SHARE)
    with torch.no_grad():
        return [
            _measure("full prompts", score_full_prompts, loaded, tokens, num_sampled=num_full, task=task),
            _measure("cached context", score_with_cache, loaded, tokens, num_sampled=num_cached, task=task),
        ]


if __name__ == "__main__":
    _model, _num_requests, _sample = sys.argv[1:]
    _results = run_plain(model=_model, num_requests=int(_num_requests), sample=int(_sample))
    sys.stdout.write(json.dumps([asdict(result) for result in _results]) + "\n")
