"""Processes that are stopped for good while they hold a lock: all others go on, or are refused, before long."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.faults import ROOT, child, wait_until_stopped
from tests.torture.report import Report

if sys.platform != "win32":
    from tests.torture.bystanders import BYSTANDERS, DONE, HANGS, REFUSED, fill
assert sys.platform != "win32"

LIMIT_SECONDS = 20.0
"""Nothing waits longer than ten seconds for a lock; some need two. What it takes without waiting comes on top."""

_WRITE = "db = bp.open(place); put_prompts(db, [100])"
_EVICT = "db = bp.open(place); db.evictor.evict(to_nbytes=0)"
_COMPACT = "db = bp.open(place); db.store.compact()"
_REINDEX = """
with bp.open(place) as db:
    db.catalog.forget(keys_of(prompt(0)))
    reindex(db)
"""
_FLOCK = """
import fcntl
fcntl.flock(os.open(Path(place) / {name!r}, os.O_RDONLY), fcntl.LOCK_EX)
os.kill(os.getpid(), signal.SIGSTOP)
"""
_SQLITE = """
import sqlite3
connection = sqlite3.connect(Path(place) / "catalog.sqlite", isolation_level=None)
connection.execute("BEGIN {kind}")
os.kill(os.getpid(), signal.SIGSTOP)
"""


class Holder(NamedTuple):
    """What a process does until it is stopped."""

    script: str
    failpoint: str = ""
    is_first: bool = False
    """Whether there is no database before."""


_AT_POINTS = {
    _WRITE: ["store.put.inside", "store.put.before-commit", "store.put.after", "catalog.record.inside"],
    _EVICT: ["store.delete.inside", "collect.deleted", "catalog.evict.inside"],
    _COMPACT: ["store.compact.copied", "store.compact.renamed"],
    _REINDEX: ["reindex.batch"],
}
_AT_LOCKS = [
    ".", "store", "manifest.lock", "writing.lock", "turnstile.lock", "collect.lock", "reindex.lock",
    "catalog.sqlite.lock", "store/turn.lock", "store/lock.mdb", "store/data.mdb",
]  # fmt: skip

HOLDERS = {
    **{point: Holder(script, f"{point}=stop") for script, points in _AT_POINTS.items() for point in points},
    **{
        point: Holder("bp.open(place)", f"{point}=stop", is_first=True) for point in ("create.store", "create.manifest")
    },
    **{f"a lock on {name}": Holder(_FLOCK.format(name=name)) for name in _AT_LOCKS},
    **{f"SQLite, {kind}": Holder(_SQLITE.format(kind=kind)) for kind in ("IMMEDIATE", "EXCLUSIVE")},
}


def stop_a_holder(
    directory: Path, name: str, report: Report, *, seconds: float = LIMIT_SECONDS, names: Sequence[str] = ()
) -> None:
    """Stop a holder, let others work, kill the holder, and let others work again; problems are in the report.

    Others do everything, or what is named.
    """
    holder, place = HOLDERS[name], directory / "db"
    if not holder.is_first:
        fill(place)
        _touch_locks(place, name)
    with child(holder.script, place, failpoint=holder.failpoint) as process:
        wait_until_stopped(process)
        report.add({"stops": 1})
        when = f"{directory}: while a process is stopped for good at {name}"
        _check(report, when, place, names or list(BYSTANDERS), seconds=seconds, may_refuse=True)
    report.add({"kills": 1})
    when = f"{directory}: after a holder was killed at {name}"
    _check(report, when, place, ["read", "write"], seconds=LIMIT_SECONDS, may_refuse=False)
    if report.is_good:
        shutil.rmtree(directory)


def stop_some_holders(directory: Path, report: Report, *, number: int, dice: random.Random) -> None:
    """Stop so many holders, one after the other, each with a database of its own."""
    for name in dice.sample(list(HOLDERS), number):
        stop_a_holder(directory / name.replace("/", " "), name, report)


def _touch_locks(place: Path, name: str) -> None:
    """Make the file that is to be locked, which may not have been needed yet."""
    path = place / name.removeprefix("a lock on ")
    if path.suffix == ".lock":
        path.touch(0o600)


def _check(report: Report, when: str, place: Path, names: Sequence[str], *, seconds: float, may_refuse: bool) -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.torture.bystanders", str(place), str(seconds), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        found = json.loads(line)
        report.add({"bystanders": 1})
        outcome = found["outcome"]
        if outcome == DONE or (outcome == REFUSED and may_refuse):
            continue
        kind = "hangs" if outcome == HANGS else "deaths" if outcome.startswith("SIG") else "surprises"
        report.fail(kind, f"{when}, {found['name']!r} ends with {outcome!r}\n{found['trace']}")
