"""Run every benchmark: `python -m benchmarks`.

Each part runs in a process of its own, so that what one leaves in memory does not help the next.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from benchmarks.exactness import exactness
from benchmarks.reads import full_hits, store_prefix, stored_prefix
from benchmarks.report import Measurement, print_table, write_json
from benchmarks.startup import startup
from benchmarks.trees import completions
from benchmarks.workload import save_gpt2

_Result = TypeVar("_Result")


def main() -> int:
    """Print the table, write the JSON; exit code 1 when a target was missed."""
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="backprompt-bench-") as name:
        directory = Path(name)
        _in_fresh_process(save_gpt2, directory / "model")
        _in_fresh_process(store_prefix, directory)
        for benchmark in (stored_prefix, completions, full_hits, startup, exactness):
            measurements += _in_fresh_process(benchmark, directory)
    print_table(measurements)
    print(f"written to {write_json(measurements)}")
    return 0 if all(measurement.is_met for measurement in measurements) else 1


def _in_fresh_process(function: Callable[[Path], _Result], directory: Path) -> _Result:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, directory).result()


if __name__ == "__main__":
    sys.exit(main())
