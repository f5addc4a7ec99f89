"""How fast a model computes once it is warm: what passes took lately, without the slow ones."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable

_NUM_PASSES = 1_000


class Pace:
    """The passes that this process has run, the newest thousand."""

    def __init__(self) -> None:
        self._passes: deque[tuple[float, float]] = deque(maxlen=_NUM_PASSES)

    def add(self, seconds: float, num_tokens: int) -> None:
        """Take a pass over so many tokens into account."""
        if num_tokens:
            self._passes.append((seconds, num_tokens))

    def seconds_for(self, num_tokens: int, *, recorded: Iterable[tuple[float, int]]) -> float | None:
        """Return about how long computing so many tokens takes, by these passes and recorded ones; None without any."""
        passes = [*self._passes, *recorded]
        return num_tokens * weighted_median(passes) if passes else None


def weighted_median(passes: Iterable[tuple[float, float]]) -> float:
    """Return the median of seconds per unit, weighted by units: one slow pass, such as the first, hardly counts."""
    rates = sorted((seconds / units, units) for seconds, units in passes)
    half = sum(units for _, units in rates) / 2
    reached = itertools.accumulate(units for _, units in rates)
    return next(rate for (rate, _), units in zip(rates, reached, strict=True) if units >= half)
