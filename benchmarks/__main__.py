"""Run the benchmarks: `python -m benchmarks`, or some of them: `python -m benchmarks reads trees`.

The longest, `churn` and `scale`, only run when they are named.

Each part runs in a process of its own, so that what one leaves in memory does not help the next. The figures of a whole
run are written to `results/latest.json`, those of some parts to `results/reads-trees.json`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.batches import unrelated_prompts
from benchmarks.best import endpoints, names
from benchmarks.churn import churn
from benchmarks.exactness import exactness
from benchmarks.fidelity import lossy_databases
from benchmarks.generation import after_long_prefix, after_stored_prefix
from benchmarks.growth import lengths_and_depths, many_leaves
from benchmarks.identity import identity
from benchmarks.keeping import keeping
from benchmarks.limits import limits
from benchmarks.memory import memory
from benchmarks.reads import fresh_processes, kv_on_disk, one_process, store_prefix
from benchmarks.report import Measurement, print_table, write_json
from benchmarks.scale import scale
from benchmarks.scores import stored_scores
from benchmarks.seams import seams
from benchmarks.single_flight import single_flight
from benchmarks.startup import startup
from benchmarks.trees import completions, continued_leaf, three_levels
from benchmarks.workload import in_fresh_process, save_gpt2
from benchmarks.writes import cold_runs, throughput

PARTS: dict[str, tuple[Callable[[Path], list[Measurement]], ...]] = {
    "reads": (fresh_processes, one_process, kv_on_disk),
    "scores": (stored_scores,),
    "trees": (completions, three_levels, continued_leaf),
    "batches": (unrelated_prompts,),
    "growth": (many_leaves, lengths_and_depths),
    "identity": (identity,),
    "writes": (cold_runs, throughput),
    "fidelity": (lossy_databases,),
    "generation": (after_stored_prefix, after_long_prefix),
    "flights": (single_flight,),
    "scale": (scale,),
    "startup": (startup,),
    "exactness": (exactness,),
    "seams": (seams,),
    "keeping": (keeping,),
    "best": (endpoints, names),
    "limits": (limits,),
    "memory": (memory,),
    "churn": (churn,),
}
"""Each function gets a directory with `model`, `db`, which holds a prefix, and `scratch`, which is removed after it."""

LONG_PARTS = frozenset({"churn", "scale"})
"""Run only when they are named: each takes a quarter of an hour or longer."""


def main() -> int:
    """Print the table, write the JSON; exit code 1 when a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run all benchmarks, or some parts.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"any of: {', '.join(PARTS)}")
    names = parser.parse_args().parts
    if unknown := set(names) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    measurements: dict[str, list[Measurement]] = {}
    part_seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="backprompt-bench-") as name:
        directory = Path(name)
        in_fresh_process(save_gpt2, directory / "model")
        in_fresh_process(store_prefix, directory)
        for part in names or [part for part in PARTS if part not in LONG_PARTS]:
            began = time.perf_counter()
            measurements[part] = [each for run in PARTS[part] for each in _run(run, directory)]
            part_seconds[part] = time.perf_counter() - began
            print(f"{part}: {part_seconds[part]:.0f} s", file=sys.stderr, flush=True)
    every = [each for some in measurements.values() for each in some]
    print_table(every)
    print(f"written to {write_json(measurements, part_seconds, name='-'.join(names) or 'latest')}")
    return 1 if any(each.is_met is False for each in every) else 0


def _run(benchmark: Callable[[Path], list[Measurement]], directory: Path) -> list[Measurement]:
    try:
        return in_fresh_process(benchmark, directory)
    finally:
        shutil.rmtree(directory / "scratch", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
