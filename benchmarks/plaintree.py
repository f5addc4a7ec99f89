"""A tree of prompts with transformers alone: the context's cache is in memory, sizes of batches are tried out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import plain
from benchmarks.plain import Ids, Prefix
from benchmarks.timing import seconds

_REQUEST_BATCHES = (1, 4, 8)
_LABEL_BATCHES = (1, 4, 8, 25)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many requests, and how many labels, are run at a time; 1 stands for a cache that is cropped, not copied."""

    requests: int
    labels: int

    def __str__(self) -> str:
        return f"{_name('requests', self.requests)}, {_name('labels', self.labels)}"


class PlainTree:
    """Scores of labels, each after every one of some requests of equal length, after one context."""

    def __init__(self, model: Any, context: Prefix, *, num_more_tokens: int) -> None:
        self._model = model
        self._context = context
        self._num_tokens = context.cache.get_seq_length()
        self._capacity = self._num_tokens + num_more_tokens
        self._room = plain.in_place(context.cache, capacity=self._capacity)

    def score(self, requests: Sequence[Ids], labels: Sequence[Ids], sizes: Sizes) -> npt.NDArray[np.float64]:
        """Return the scores [num_requests, num_labels]."""
        order = sorted(range(len(labels)), key=lambda number: len(labels[number]))  # of one length, nothing is padded
        scores = np.empty((len(requests), len(labels)))
        for row, prefix in zip(scores, self._extended(requests, sizes.requests), strict=True):
            row[order] = self._score_labels(prefix, [labels[number] for number in order], sizes.labels)
        return scores

    def calibrate(self, requests: Sequence[Ids], labels: Sequence[Ids]) -> Sizes:
        """Return the sizes that are the fastest on the first requests."""

        def extend(size: int) -> float:
            return seconds(lambda: list(self._extended(requests[:size], size))) / size

        def score(size: int) -> float:
            return seconds(lambda: self.score(requests[:1], labels, Sizes(1, size)))

        return Sizes(fastest(extend, _REQUEST_BATCHES), fastest(score, _LABEL_BATCHES))

    def _extended(self, requests: Sequence[Ids], size: int) -> Iterator[Prefix]:
        """Yield the context with each request behind it; with size 1, in the same memory."""
        for group in plain.chunks(requests, size):
            cache = plain.repeated(self._context.cache, len(group))
            if size == 1:
                cache = plain.keep(self._room, self._num_tokens)
            inputs = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            logits = plain.run(self._model, torch.tensor(group), **inputs).logits
            for row in range(len(group)):
                yield Prefix(cache if size == 1 else plain.row_of(cache, row), logits[row, -1])

    def _score_labels(self, prefix: Prefix, labels: Sequence[Ids], size: int) -> list[float]:
        if size > 1:
            return score_batches(self._model, prefix, labels, size)
        is_ours = prefix.cache is self._room
        cache = prefix.cache if is_ours else plain.in_place(prefix.cache, capacity=self._capacity)
        return plain.score_in_place(self._model, Prefix(cache, prefix.logits), labels)


def score_batches(model: Any, prefix: Prefix, completions: Sequence[Ids], size: int) -> list[float]:
    """Score completions of a prefix, `size` in a batch."""
    batches = plain.chunks(completions, size)
    return [score for batch in batches for score in plain.score_batch(model, prefix, batch)]


def fastest(cost: Callable[[int], float], sizes: Sequence[int], *, num_runs: int = 2) -> int:
    """Return the size of the lowest cost, each taken repeatedly: the first call of a kind is slower."""
    return min(sizes, key=lambda size: min(cost(size) for _ in range(num_runs)))


def _name(what: str, size: int) -> str:
    return f"{what} one by one" if size == 1 else f"{what} in batches of {size}"
