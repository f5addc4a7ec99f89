"""One table of target, measured, met; and the same as JSON, with the machine and the versions."""

from __future__ import annotations

import json
import os
import platform
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
    """One figure beside its target."""

    name: str
    what: str
    """What was compared with what."""
    measured: float
    unit: str
    target: float
    is_lower_better: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the figure is on the right side of the target."""
        return self.measured <= self.target if self.is_lower_better else self.measured >= self.target


def print_table(measurements: list[Measurement]) -> None:
    """Print the figures for people."""
    table = Table("benchmark", "measured", "target", "met", title=_machine()["cpu"])
    for each in measurements:
        bound = "at most" if each.is_lower_better else "at least"
        table.add_row(
            f"{each.name}\n[dim]{each.what}[/dim]",
            f"{each.measured:.3g} {each.unit}",
            f"{bound} {each.target:g} {each.unit}",
            "yes" if each.is_met else "[bold]no[/bold]",
        )
    Console().print(table)


def write_json(measurements: list[Measurement]) -> Path:
    """Write the figures for programs; return the file."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "latest.json"
    content = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": {library: version(library) for library in _LIBRARIES},
        "measurements": [{**asdict(each), "is_met": each.is_met} for each in measurements],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _machine() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":")[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {"cpu": f"{cpu}, {os.cpu_count()} cores", "system": platform.platform(), "python": platform.python_version()}
