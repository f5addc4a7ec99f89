"""How long a command line takes, and what importing the package brings along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.report import Measurement
from benchmarks.timing import median_seconds


def startup(directory: Path) -> list[Measurement]:
    """`backprompt-db stats` as a whole process, and torch's absence after the import."""
    check = "import sys, backprompt_db; sys.exit('torch' in sys.modules)"
    imports_torch = subprocess.run([sys.executable, "-c", check], check=False).returncode
    command = [sys.executable, "-m", "backprompt_db", "stats", "--db", str(directory / "db")]
    seconds = median_seconds(lambda _: subprocess.run(command, check=True, capture_output=True))
    return [
        Measurement("import", "torch imported with the package", imports_torch, "times", 0, is_lower_better=True),
        Measurement("stats", "`backprompt-db stats`, whole process", seconds, "s", 0.5, is_lower_better=True),
    ]
