"""The best of several completions: what `lm.best` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backprompt_db.prompt.text import Text


@dataclass(frozen=True, slots=True)
class Best:
    """One of the best completions of a prompt. `str(best)` is its string.

    Attributes:
        index: its place among the completions that were given.
        completion: the completion as it was given.
        value: what the completions were ordered by: `bias + weight * logprob`, the log-probability alone if no bias and
            no normalisation was asked for.
        logprob: its natural log-probability given the prompt, summed over its tokens, as `lm.score` returns it.
        num_tokens: how many tokens it adds to those of the prompt.
    """

    index: int
    completion: Text | str
    value: float
    logprob: float
    num_tokens: int

    def __str__(self) -> str:
        return str(self.completion)
