"""The command line of the torture."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.torture.report import Report

if sys.platform != "win32":
    from tests.torture.rounds import torture_round
assert sys.platform != "win32"

_ROUND_SECONDS = 50.0


def torture(directory: Path, *, minutes: float, seed: int) -> Report:
    """Torture databases in `directory` round after round until the time is over or something is wrong."""
    report = Report(seed)
    dice = random.Random(seed)
    end = time.monotonic() + 60 * minutes
    number = 0
    while report.is_good and (number == 0 or time.monotonic() < end):
        number += 1
        seconds = min(_ROUND_SECONDS, 60 * minutes * 0.8)
        place = directory / f"round {number}"
        torture_round(place, report, seconds=seconds, dice=dice)
        print(report, flush=True)  # noqa: T201
        if report.is_good:
            shutil.rmtree(place)
    return report


def main() -> int:
    """Run for some minutes; exit code 1 when anything is wrong, and then the files stay."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description="Torture a database.")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long, about")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32), help="of the conductor")
    parser.add_argument("--dir", type=Path, default=None, help="where; a temporary directory unless given")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="backprompt-torture-", dir=options.dir))
    report = torture(directory, minutes=options.minutes, seed=options.seed)
    if not report.is_good:
        print(f"seed {options.seed}; the files are in {directory}", file=sys.stderr)  # noqa: T201
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
