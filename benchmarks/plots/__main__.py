"""Measure the curves and draw them: all, or `python -m benchmarks.plots lengths`; `--draw` draws the last ones."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.plots import curves
from benchmarks.plots.branches import numbers_of_branches
from benchmarks.plots.drawing import draw
from benchmarks.plots.lengths import prefix_lengths
from benchmarks.plots.memory import memory_and_disk
from benchmarks.workload import in_fresh_process

FIGURES: dict[str, Callable[[Path], curves.Figure]] = {
    "lengths": prefix_lengths,
    "memory": memory_and_disk,
    "branches": numbers_of_branches,
}
IN_PROCESSES_OF_THEIR_OWN = frozenset({"memory"})
"""These start a fresh process for each point themselves."""


def main() -> None:
    """Print the exponents, write the figures and `results/plots.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description="Measure the curves and draw them.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"any of: {', '.join(FIGURES)}; all if none is named")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw what was measured last")
    told = parser.parse_args()
    if unknown := set(told.names) - set(FIGURES):
        parser.error(f"there is no figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    if not told.draw:
        curves.write(_with_new([_measure(name) for name in told.names or FIGURES]))
    for figure in curves.read():
        print(draw(figure))
        for curve in figure.curves:
            print(f"  {curve.name}: {curve.values[0]:,.4g} to {curve.values[-1]:,.4g}, exponent {curve.exponent:.2f}")


def _with_new(measured: list[curves.Figure]) -> list[curves.Figure]:
    """Return what was measured now, in the place of what was measured of it before."""
    kept = {figure.name: figure for figure in curves.read()} if curves.FILE.exists() else {}
    return list((kept | {figure.name: figure for figure in measured}).values())


def _measure(name: str) -> curves.Figure:
    with tempfile.TemporaryDirectory(prefix="backprompt-plots-") as directory:
        if name in IN_PROCESSES_OF_THEIR_OWN:
            return FIGURES[name](Path(directory))
        return in_fresh_process(FIGURES[name], Path(directory))


if __name__ == "__main__":
    main()
