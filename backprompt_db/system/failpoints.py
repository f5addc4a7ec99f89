"""Named points in the program where a test can make it die, stop, fail, or wait.

`BACKPROMPT_DB_FAILPOINT="store.put.inside=kill,catalog.record.inside=sleep:0.5@3"` kills the process when it passes the
first point, and makes it sleep for half a second when it passes the second point for the third time. Without the
variable, a point costs one look into an empty dict.

| action | what happens |
|---|---|
| `kill` | the process kills itself, as `kill -9` does |
| `stop` | the process stops itself, as a debugger does |
| `raise` | `RuntimeError` |
| `full` | `OSError`: no space left on the device |
| `sleep:SECONDS` | the thread waits |
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass

from backprompt_db.system.platform import end_process, stop_process

VARIABLE = "BACKPROMPT_DB_FAILPOINT"

NAMES = frozenset(
    {
        "create.store",
        "create.manifest",
        "store.put.before",
        "store.put.inside",
        "store.put.before-commit",
        "store.put.after",
        "store.delete.inside",
        "store.compact.copied",
        "store.compact.renamed",
        "catalog.record.inside",
        "catalog.evict.inside",
        "collect.deleted",
        "migration.first",
        "reindex.batch",
    }
)
"""All points. The store has committed before `store.put.after`; `collect.deleted` lies between store and catalog."""


@dataclass(slots=True)
class _Failure:
    action: str
    number: int | None
    """At which pass the point fails, counted from 1; None for every pass."""
    num_passes: int = 0


def _parse(setting: str) -> dict[str, _Failure]:
    failures = {}
    for each in filter(None, setting.split(",")):
        name, _, what = each.partition("=")
        action, _, number = what.partition("@")
        if name not in NAMES:
            raise ValueError(f"{VARIABLE} names {name!r}, which is no failpoint: {', '.join(sorted(NAMES))}")
        failures[name] = _Failure(action, int(number) if number else None)
    return failures


_failures = _parse(os.environ.get(VARIABLE, ""))


def reach(name: str) -> None:
    """Do what the environment variable says for this point. Outside tests, it says nothing."""
    failure = _failures.get(name)
    if failure is None:
        return
    failure.num_passes += 1
    if failure.number in (None, failure.num_passes):
        _fail(name, failure.action)


def _fail(name: str, action: str) -> None:
    match action.partition(":"):
        case "kill", _, _:
            end_process()
        case "stop", _, _:
            stop_process()
        case "raise", _, _:
            raise RuntimeError(f"failpoint {name}")
        case "full", _, _:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        case "sleep", _, seconds:
            time.sleep(float(seconds))
        case _:
            raise ValueError(f"{VARIABLE} gives {name} the unknown action {action!r}")
