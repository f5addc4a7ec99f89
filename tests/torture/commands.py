"""Commands of the command line, one after the other at random, while everything else goes on."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from typer.testing import Result

from tests.support import cli
from tests.torture.worker import Worker

_REFUSALS = "process", "nothing is selected", "no representation has"
"""What a refusal says that is no surprise here."""

_INTERRUPTED = 130
_CATALOG_DISAGREES = 8
_LONGEST_PAUSE_SECONDS = 0.3

Command = tuple[str, ...]


def command(worker: Worker) -> None:
    """Run commands, and check how each ends."""
    commands = COMMANDS | COMMANDS_THAT_LOSE if worker.is_limited else COMMANDS
    while True:
        name, options = worker.dice.choice(list(commands.items()))
        _run(worker, (name.partition(":")[0], *options(worker.place.parent, worker.dice)))
        worker.journal.beat()
        time.sleep(worker.dice.random() * _LONGEST_PAUSE_SECONDS)


def _run(worker: Worker, arguments: Command) -> None:
    result = cli.run(*arguments, "--db", worker.place)
    if result.exit_code in (_INTERRUPTED, 128 + signal.SIGTERM):
        sys.exit(1 if result.exit_code == _INTERRUPTED else result.exit_code)
    worker.journal.counts["commands"] += 1
    if _is_refusal(result):
        worker.journal.counts["commands_refused"] += 1
    elif not _is_allowed(arguments[0], result):
        worker.journal.problem(
            *arguments, "ended with", result.exit_code, repr(result.exception), result.output[-2000:]
        )


def _is_refusal(result: Result) -> bool:
    return result.exit_code == 2 and any(word in result.output for word in _REFUSALS)


def _is_allowed(name: str, result: Result) -> bool:
    # The catalog lags behind the store while others write.
    return result.exit_code == 0 or (name == "verify" and result.exit_code == _CATALOG_DISAGREES)


def _select(_: Path, dice: Random) -> Command:
    return "--contains", f"Request {dice.randrange(10)}"


COMMANDS: dict[str, Callable[[Path, Random], Command]] = {
    "ls": lambda _, dice: ("--limit", str(dice.randint(1, 200))),
    "ls:grep": lambda _, dice: ("--grep", f"section {dice.randrange(7)}", "--json"),
    "tree": lambda _, dice: ("--depth", str(dice.randint(1, 3))),
    "tree:svg": lambda place, _: ("--svg", str(place / "tree.svg")),
    "graph": lambda place, _: ("--out", str(place / "graph.html"), "--limit", "50"),
    "show": lambda _, dice: (f"{dice.randrange(16):x}",),
    "stats": lambda *_: ("--json",),
    "stats:openmetrics": lambda *_: ("--openmetrics",),
    "config": lambda *_: (),
    "verify": lambda _, dice: ("--sample", f"{dice.randint(1, 30)}%"),
    "verify:structure": lambda *_: ("--structure",),
    "doctor": lambda *_: (),
    "doctor:fix": lambda *_: ("--fix",),
    "reindex": lambda *_: (),
    "compact": lambda *_: (),
    "label": lambda place, dice: (f"label {dice.randrange(3)}", *_select(place, dice)),
    "export": lambda place, _: (str(place / "bundle"), "--force"),
    "evict:dry-run": lambda *_: ("--to", "1MB", "--dry-run"),
}
COMMANDS_THAT_LOSE: dict[str, Callable[[Path, Random], Command]] = {
    "evict": lambda _, dice: ("--to", f"{dice.randint(1, 8)}MB"),
    "purge": lambda place, dice: (*_select(place, dice), "--yes"),
}
