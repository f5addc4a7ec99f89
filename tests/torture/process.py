"""One process of the torture: `python -m tests.torture.process DIRECTORY ROLE NAME INCARNATION SEED LIMITED`."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
from pathlib import Path

from backprompt_db.errors import BackpromptError
from tests.torture.worker import Worker

if sys.platform != "win32":
    from tests.torture.commands import command
    from tests.torture.forks import fork
    from tests.torture.roles import read, tidy, write
assert sys.platform != "win32"


def _tune(worker: Worker) -> None:
    from tests.torture.tuning import tune  # which imports torch, and takes long

    tune(worker)


ROLES = {"writer": write, "reader": read, "janitor": tidy, "clerk": command, "forker": fork, "tuner": _tune}


def main() -> None:
    """Work until something ends this process."""
    directory, role, name, incarnation, seed, limit = sys.argv[1:]
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    worker = Worker(Path(directory), name, incarnation=int(incarnation), seed=int(seed), is_limited=limit == "limited")
    if worker.dice.random() < 0.5:  # one of two ways to end at SIGTERM
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        ROLES[role](worker)
    except BackpromptError as error:
        worker.journal.problem(type(error).__name__, error)
        raise
    finally:
        with contextlib.suppress(BackpromptError):
            worker.journal.beat()


if __name__ == "__main__":
    main()
