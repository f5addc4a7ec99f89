"""Times of several ways to do the same, taken in turn, so that a drift of the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from benchmarks.workload import REPETITIONS

Run = Callable[[int], Any]
"""Does the work once; it is given the number of the repetition, from which it makes a prompt that is new."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each way, one after the other; those at one index were taken side by side."""

    samples: Mapping[str, Sequence[float]]
    results: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """What each way returned, in the same order."""

    @classmethod
    def collect(cls, rows: Sequence[Mapping[str, float]]) -> Times:
        """Return the times of several rounds, each with the seconds of every way."""
        return cls({name: [row[name] for row in rows] for name in rows[0]})

    def median(self, name: str) -> float:
        """Return the median seconds of one way."""
        return statistics.median(self.samples[name])

    def ms(self, name: str) -> str:
        """Return the median of one way in milliseconds, for people."""
        return f"{self.median(name) * 1e3:,.0f} ms"

    def ratio(self, above: str, below: str) -> float:
        """Return the median of the ratios that were taken side by side."""
        pairs = zip(self.samples[above], self.samples[below], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def fastest(self, names: Sequence[str]) -> str:
        """Return which of the ways has the smallest median."""
        return min(names, key=self.median)


def timed(run: Callable[[], _Result]) -> tuple[float, _Result]:
    """Return the seconds of one call, and what it returned."""
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def seconds(run: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    return timed(run)[0]


def median_seconds(run: Run) -> float:
    """Return the median time of `run(repetition)`, after one call that is not counted."""
    return alternate({"it": run}).median("it")


def alternate(
    ways: Mapping[str, Run],
    *,
    repetitions: int = REPETITIONS,
    warm_up: bool = True,
    settle: Callable[[], Any] = lambda: None,
) -> Times:
    """Time every way in turn, `repetitions` times, after one round, numbered -1, that is not counted.

    `warm_up` may be false where a round takes long and the model has run before. `settle` is called before each way,
    outside its time: nothing that one way left to be done shall slow the next.
    """
    samples: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, list[Any]] = {name: [] for name in ways}
    for repetition in range(-1 if warm_up else 0, repetitions):
        for name, run in ways.items():
            settle()
            sample, result = timed(partial(run, repetition))
            if repetition >= 0:
                samples[name].append(sample)
                results[name].append(result)
    return Times(samples, results)
