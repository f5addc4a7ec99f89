"""Which tokens must be computed to know the best completions of a prompt: a search over the tree of their tokens.

Log-probabilities only fall as tokens are added, so what is known of a completion bounds its value from above. One
whose bound is below the values of enough others is left where it is (Meister et al., "Best-First Beam Search", 2020,
https://arxiv.org/abs/2007.03909).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from backprompt_db.compute.token_tree import TokenTree, Values

_MOST_AT_ONCE = 16
"""How many tokens to feed for others than the leaders before looking again: what is learned may rule the rest out."""


class _Known(NamedTuple):
    """What is known of completions [num_completions]."""

    depths: npt.NDArray[np.int64]
    """How many of their tokens have a known log-probability, from the first on."""
    logprobs: Values
    """The sum of these."""
    bounds: Values
    """What their values are at most."""
    is_whole: npt.NDArray[np.bool_]
    """Whether these are all of their tokens, so that the bound is the value."""


@dataclass(eq=False)
class Choice:
    """The search for the best completions of one prompt.

    The value of a completion is `bias + weight * logprob`, where `logprob` is `offset` and the sum over its tokens.
    """

    tree: TokenTree
    num_wanted: int
    bias: Values
    weight: Values
    """[num_completions], none of them below 0."""
    offset: Values
    logprobs: Values = field(init=False)
    """[num_nodes], NaN where the log-probability of a token is not known. Change it in `learn` only."""

    def __post_init__(self) -> None:
        self.logprobs = np.full(len(self.tree), np.nan)
        self.num_wanted = min(self.num_wanted, len(self.tree.paths))

    def learn(self, logprobs: Mapping[int, float]) -> None:
        """Take the log-probabilities of nodes that were not known."""
        for node, logprob in logprobs.items():
            if np.isnan(self.logprobs[node]):
                self.logprobs[node] = logprob
        vars(self).pop("_known", None)

    @property
    def best(self) -> list[int]:
        """The best completions as far as is known: the best first, those of equal value in the order given."""
        return list(map(int, self._leaders))

    def value(self, completion: int) -> float:
        """Return the value of a completion of which all is known."""
        return float(self._known.bounds[completion])

    def logprob(self, completion: int) -> float:
        """Return the log-probability of a completion of which all is known."""
        return float(self._known.logprobs[completion])

    @property
    def known(self) -> list[int]:
        """The completions of which all is known."""
        return list(map(int, np.flatnonzero(self._known.is_whole)))

    @property
    def open(self) -> list[int]:
        """The completions that may yet be among the best, and of which not all is known; the likeliest first."""
        return list(map(int, self._open))

    def next_nodes(self, held: Container[int], *, budget: float) -> list[int]:
        """Return the nodes to compute next, parents before children, without those that are `held`.

        After them, the log-probabilities of their children are to be learned. The leaders are followed to their ends:
        once enough values are known, most others are out. `budget` is how many tokens cost as much as looking again.
        """
        chosen: set[int] = set()

        def take(completion: int, num_tokens: int) -> None:
            chosen.update(node for node in self.tree.paths[completion, :num_tokens].tolist() if node not in held)

        known, ends = self._known, self.tree.lengths - 1
        for completion in self._leaders[~known.is_whole[self._leaders]]:
            take(completion, ends[completion])
        if np.count_nonzero(known.is_whole) >= self.num_wanted:
            for completion in self._open:
                if len(chosen) >= max(_MOST_AT_ONCE, budget):
                    break
                take(completion, known.depths[completion])
        for completion in self._open:
            if len(chosen) >= budget:
                break
            take(completion, ends[completion])
        return sorted(chosen)

    @cached_property
    def _known(self) -> _Known:
        paths = self.tree.paths
        rows = np.where(paths >= 0, self.logprobs[paths], np.nan)
        is_known = np.logical_and.accumulate(~np.isnan(rows), axis=1)
        depths = is_known.sum(axis=1)
        logprobs = self.offset + np.where(is_known, rows, 0.0).sum(axis=1)
        bounds = self.bias + self.weight * logprobs
        return _Known(depths, logprobs, bounds, depths == self.tree.lengths)

    @property
    def _leaders(self) -> npt.NDArray[np.int64]:
        return np.argsort(-self._known.bounds, kind="stable")[: self.num_wanted]

    @property
    def _open(self) -> npt.NDArray[np.int64]:
        bounds, is_whole = self._known.bounds, self._known.is_whole
        values = bounds[is_whole]
        is_settled = len(values) >= self.num_wanted
        threshold = np.partition(values, -self.num_wanted)[-self.num_wanted] if is_settled else -np.inf
        is_open = ~is_whole & (bounds >= threshold)
        order = np.argsort(-bounds, kind="stable")
        return order[is_open[order]]
