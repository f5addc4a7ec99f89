"""Curves over sizes, how steeply they grow, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import RESULTS, machine, versions

FILE = RESULTS / "plots.json"
_NUM_FITTED = 3


@dataclass(frozen=True, slots=True)
class Curve:
    """One way of doing something: what it takes at each size."""

    name: str
    sizes: Sequence[int]
    values: Sequence[float]
    """Medians."""
    is_bound: bool = False
    """Whether it is what no way can fall below, and not a way to do the same."""

    @property
    def exponent(self) -> float:
        """The slope of a line through the logarithms of the largest sizes: 2 where twice as many take four times.

        The smallest are left out, because there what does not depend on size hides what does.
        """
        sizes, values = (np.log(each[-_NUM_FITTED:]) for each in (self.sizes, self.values))
        return float(np.polyfit(sizes, values, 1)[0])


@dataclass(frozen=True, slots=True)
class Figure:
    """Curves that are drawn together."""

    name: str
    """The name of its file."""
    title: str
    what: str
    """How it was measured."""
    size_label: str
    value_label: str
    curves: Sequence[Curve]


def write(figures: Sequence[Figure], path: Path = FILE) -> None:
    """Keep figures, each curve with its exponent, with the machine and the versions."""
    content = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "figures": [
            asdict(figure) | {"curves": [_with_exponent(each) for each in figure.curves]} for figure in figures
        ],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read(path: Path = FILE) -> list[Figure]:
    """Return the figures that were kept."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return [Figure(**figure | {"curves": [_curve(each) for each in figure["curves"]]}) for figure in content["figures"]]


def _with_exponent(curve: Curve) -> dict[str, Any]:
    return asdict(curve) | {"exponent": round(curve.exponent, 3)}


def _curve(fields: Mapping[str, Any]) -> Curve:
    return Curve(**{name: value for name, value in fields.items() if name != "exponent"})
