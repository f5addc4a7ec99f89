"""One table of target, measured, met; and the same as JSON, with the machine and the versions."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
_LIBRARIES = ("backprompt-db", "torch", "transformers", "lmdb", "safetensors", "xxhash")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure beside its target; one without a target is information."""

    name: str
    what: str
    """What was compared with what."""
    measured: float
    unit: str
    target: float | None = None
    is_lower_better: bool = False
    goal: float | None = None
    """A better figure than the target, that is aimed at and not demanded."""

    @property
    def is_met(self) -> bool | None:
        """Whether the figure is on the right side of the target; None without one."""
        if self.target is None:
            return None
        return self.measured <= self.target if self.is_lower_better else self.measured >= self.target


def print_table(measurements: Sequence[Measurement]) -> None:
    """Print the figures for people."""
    table = Table("benchmark", "measured", "target", "met", title=machine()["cpu"])
    for each in measurements:
        met = "" if each.is_met is None else "yes" if each.is_met else "[bold]no[/bold]"
        figure = f"{each.measured:,.0f}" if each.measured >= 1000 else f"{each.measured:.3g}"
        table.add_row(f"{each.name}\n[dim]{each.what}[/dim]", f"{figure} {each.unit}", _bound(each), met)
    Console().print(table)


def write_json(
    measurements: Mapping[str, Sequence[Measurement]], part_seconds: Mapping[str, float], *, name: str
) -> Path:
    """Write the figures of each part for programs, as `results/<name>.json`; return the file."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "measurements": [
            {"part": part, **asdict(each), "is_met": each.is_met}
            for part, some in measurements.items()
            for each in some
        ],
        "part_seconds": {part: round(seconds, 1) for part, seconds in part_seconds.items()},
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def versions() -> dict[str, str]:
    """Return the versions of the libraries that matter to the figures."""
    return {library: version(library) for library in _LIBRARIES}


def _bound(each: Measurement) -> str:
    if each.target is None:
        return ""
    goal = "" if each.goal is None else f"\n[dim]goal {each.goal:g}[/dim]"
    return f"{'at most' if each.is_lower_better else 'at least'} {each.target:g} {each.unit}{goal}"


def machine() -> dict[str, str]:
    """Return what the figures were taken on."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":")[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {"cpu": f"{cpu}, {os.cpu_count()} cores", "system": platform.platform(), "python": platform.python_version()}
