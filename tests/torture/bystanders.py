"""What others do while somebody holds a lock: `python -m tests.torture.bystanders DIRECTORY SECONDS WHAT...`.

Each does one thing in a process of its own, all at once, and prints a line of JSON about it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import IO

import backprompt_db as bp
from backprompt_db.errors import BackpromptError
from tests.support import cli
from tests.support.faults import prompt, wanted_of
from tests.torture.values import new_parts, wrong

assert sys.platform != "win32"

NUMBERS = range(6)
"""The prompts that a database has before."""

DONE, REFUSED, HANGS = "done", "refused", "hangs"


def fill(place: Path) -> None:
    """Make a database with some prompts."""
    with bp.open(place) as db:
        for number in NUMBERS:
            db.put(new_parts(prompt(number)))


def _read(place: Path) -> str:
    with bp.open(place, memory_nbytes=0) as db:
        for number in NUMBERS:
            keys = wrong(db.fetch(wanted_of(prompt(number))), db.fidelity)
            if keys:
                return f"wrong values: {keys}"
    return DONE


def _write(place: Path) -> str:
    with bp.open(place) as db:
        for number in range(3):
            db.put(new_parts(prompt(number, author="a bystander")))
        db.flush()
    return DONE


def _command(words: str, place: Path) -> str:
    result = cli.run(*words.split(), "--db", place)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return REFUSED if result.exit_code else DONE


_COMMANDS = (
    "ls", "tree", "stats", "config", "verify --structure", "doctor", "reindex", "compact", "evict --to 1MB",
    "label x --contains Request",
)  # fmt: skip
BYSTANDERS: dict[str, Callable[[Path], str]] = {
    "read": _read,
    "write": _write,
    **{words: partial(_command, words) for words in _COMMANDS},
}


def _do(name: str, place: Path, *, seconds: float, trace: IO[str]) -> None:
    """Do one thing and say how it ended; whoever takes too long says where it is, and ends."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=trace)
    try:
        outcome = BYSTANDERS[name](place)
    except BackpromptError:
        outcome = REFUSED
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
        outcome = repr(error)
        traceback.print_exc(file=trace)
    _say(name, outcome, trace)


def _say(name: str, outcome: str, trace: IO[str]) -> None:
    trace.seek(0)
    os.write(1, (json.dumps({"name": name, "outcome": outcome, "trace": trace.read()}) + "\n").encode())


def _start(name: str, place: Path, *, seconds: float, trace: IO[str]) -> int:
    pid = os.fork()
    if not pid:
        try:
            _do(name, place, seconds=seconds, trace=trace)
        finally:
            os._exit(0)
    return pid


def _rehearsal_seconds(names: Iterable[str]) -> float:
    """Do everything where nobody holds a lock, which imports what it needs; return how long this machine takes."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory) / "db"
        fill(place)
        for name in names:
            BYSTANDERS[name](place)
    return time.monotonic() - began


def main() -> None:
    """Start all at once and wait for all."""
    directory, limit, *names = sys.argv[1:]
    seconds = float(limit) + _rehearsal_seconds(names)
    with contextlib.ExitStack() as stack:
        traces = {name: stack.enter_context(tempfile.TemporaryFile("w+")) for name in names}
        children = {name: _start(name, Path(directory), seconds=seconds, trace=trace) for name, trace in traces.items()}
        for name, child in children.items():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code:
                _say(name, HANGS if code > 0 else signal.Signals(-code).name, traces[name])


if __name__ == "__main__":
    main()
