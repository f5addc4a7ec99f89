"""What happened so far: sums that are printed, and what must not have happened."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

_SHOWN = {
    "acknowledged": "writes acknowledged",
    "kills": "kills",
    "stops": "stops",
    "interrupts": "SIGTERM and SIGINT",
    "openings": "reopenings",
    "forks": "forks",
    "exact": "exact databases",
    "bfloat16": "bfloat16",
    "int8": "int8",
    "bystanders": "bystanders of stopped holders",
    "commands": "commands",
    "commands_refused": "commands refused",
    "changed_models": "changed models",
    "refused_models": "models refused",
    "damages": "damaged copies",
    "checked": "values checked",
    "num_hits": "hits",
    "num_misses": "misses",
    "num_evicted": "evicted",
    "missing": "missing in damaged copies",
    "refused": "damaged copies that were refused",
    "quarantined": "quarantined in damaged copies",
    "verifications": "verifications",
    "reindexings": "reindexings",
    "compactions": "compactions",
    "evictions": "evictions",
    "full": "writes refused at the limit",
    "wrong": "wrong values",
    "lost": "lost writes",
    "dangling": "dangling",
    "num_quarantined": "quarantined",
    "hangs": "hangs",
    "deaths": "deaths",
    "surprises": "other errors",
}
_MUST_BE_ZERO = ("wrong", "lost", "dangling", "num_quarantined", "hangs", "deaths", "surprises")


@dataclass(slots=True)
class Report:
    """Counts of all rounds, and problems."""

    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def add(self, counts: Mapping[str, int]) -> None:
        """Add the counts of a round; what must be zero and is not becomes a problem."""
        self.counts.update(counts)
        self.problems += [f"{_SHOWN[name]}: {counts[name]}" for name in _MUST_BE_ZERO if counts.get(name)]

    def fail(self, kind: str, problem: str) -> None:
        """Count something that must not happen, and say what is needed to see it again."""
        self.counts[kind] += 1
        self.problems.append(problem)

    @property
    def is_good(self) -> bool:
        """Whether nothing happened that must not."""
        return not self.problems

    def __str__(self) -> str:
        counts = [f"{label} {self.counts[name]:,}" for name, label in _SHOWN.items()]
        head = f"{time.monotonic() - self.began:.0f} s, seed {self.seed}: "
        return "\n".join([head + ", ".join(counts), *(f"PROBLEM {problem}" for problem in self.problems)])
