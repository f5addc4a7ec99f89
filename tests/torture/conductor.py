"""Starts workers on one directory, and kills, stops, interrupts and restarts them at random."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from backprompt_db.system.failpoints import VARIABLE
from tests.support.faults import ROOT

assert sys.platform != "win32"

HANG_SECONDS = 60.0
"""A worker that is not stopped makes progress within this time, and ends within it when it is told to."""

_START_SECONDS = 300.0
"""Importing torch takes long where everything else runs too."""

_WORKERS = ("writer0", "writer1", "writer2", "reader0", "reader1", "janitor0", "clerk0", "forker0", "tuner0")
_SPARED = {"clerk": 0.5, "forker": 0.5, "tuner": 0.95}
"""How often a worker is spared whose work takes longer than a moment."""

_MEAN_SECONDS_BETWEEN_ACTIONS = 0.2
_LONGEST_STOP_SECONDS = 1.5

_DEADLY_POINTS = {
    "store.put.before": 10,
    "store.put.inside": 200,
    "store.put.before-commit": 20,
    "store.put.after": 20,
    "store.delete.inside": 50,
    "store.compact.copied": 2,
    "store.compact.renamed": 2,
    "catalog.record.inside": 20,
    "catalog.evict.inside": 3,
    "collect.deleted": 3,
    "reindex.batch": 3,
}
"""Where a worker may be told to kill itself, and at the latest at which pass."""

_ENDS = {
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {-signal.SIGTERM, 128 + signal.SIGTERM},
    signal.SIGINT: {-signal.SIGINT, 1},
}
"""How a worker may end after a signal."""


def role_of(name: str) -> str:
    """Workers are called ROLE and a number."""
    return name.rstrip("0123456789")


@dataclass(slots=True)
class Child:
    """One incarnation of a worker."""

    name: str
    process: subprocess.Popen[bytes]
    journal: Path
    log: Path
    may_kill_itself: bool
    journal_nbytes: int = -1
    seen_at: float = field(default_factory=time.monotonic)
    """When it last made progress, was continued, or was told to end."""
    stopped_until: float | None = None
    told: signal.Signals | None = None

    @property
    def role(self) -> str:
        """What it does."""
        return role_of(self.name)

    def allowed_codes(self) -> set[int]:
        """The exit codes that are no surprise."""
        return (_ENDS[self.told] if self.told else set()) | ({-signal.SIGKILL} if self.may_kill_itself else set())


class Conductor:
    """Runs workers for some time; `counts` and `problems` say what happened."""

    def __init__(self, directory: Path, *, seed: int, is_limited: bool, names: Iterable[str] = _WORKERS) -> None:
        self.directory = directory
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self._seed = seed
        self._is_limited = is_limited
        self._dice = random.Random(f"{seed} conductor")
        self._incarnations: Counter[str] = Counter()
        (directory / "journals").mkdir(parents=True)
        (directory / "logs").mkdir()
        self._children = [self._start(name) for name in names]

    def run(self, seconds: float) -> None:
        """Let the workers work and suffer, then kill all of them."""
        try:
            self._wait_for_progress()
            end = time.monotonic() + seconds
            while time.monotonic() < end and not self.problems:
                time.sleep(min(self._dice.expovariate(1 / _MEAN_SECONDS_BETWEEN_ACTIONS), 1.0))
                self._act(self._dice.choice(self._children))
                self._look_after_all()
        finally:
            self._kill_all()

    def _wait_for_progress(self) -> None:
        while not all(child.journal.exists() and child.journal.stat().st_size for child in self._children):
            time.sleep(0.05)
            self._look_after_all()
            if self.problems:
                return

    def _may_suffer(self, child: Child) -> bool:
        is_alone = child.told is None and child.stopped_until is None and child.process.poll() is None
        if self._dice.random() < _SPARED.get(child.role, 0.0):
            return False
        # Most are spared until they have begun to work: importing takes them long.
        return is_alone and (child.journal_nbytes > 0 or self._dice.random() < 0.05)

    def _act(self, child: Child) -> None:
        if not self._may_suffer(child):
            return
        kinds = ["kill", "stop", signal.SIGTERM, signal.SIGINT]
        match self._dice.choices(kinds, weights=[5, 2, 1, 1])[0]:
            case "kill":
                self._tell(child, signal.SIGKILL)
                self.counts["kills"] += 1
            case "stop":
                child.process.send_signal(signal.SIGSTOP)
                child.stopped_until = time.monotonic() + self._dice.uniform(0, _LONGEST_STOP_SECONDS)
                self.counts["stops"] += 1
            case signal.Signals() as number:
                self._tell(child, number)
                self.counts["interrupts"] += 1

    def _tell(self, child: Child, number: signal.Signals) -> None:
        child.told, child.seen_at = number, time.monotonic()
        child.process.send_signal(number)

    def _look_after_all(self) -> None:
        for index, child in enumerate(self._children):
            if child.process.poll() is not None:
                self._check_end(child)
                self._children[index] = self._start(child.name)
            elif child.stopped_until is not None and time.monotonic() > child.stopped_until:
                child.process.send_signal(signal.SIGCONT)
                child.stopped_until, child.seen_at = None, time.monotonic()
            elif child.stopped_until is None:
                self._check_progress(child)

    def _check_end(self, child: Child) -> None:
        code = child.process.returncode
        if code not in child.allowed_codes():
            self.counts["deaths"] += code < 0
            self._problem(child, f"ended with {code} after {child.told and child.told.name}")
        elif child.told is None:
            self.counts["kills"] += 1

    def _check_progress(self, child: Child) -> None:
        now = time.monotonic()
        nbytes = child.journal.stat().st_size if child.journal.exists() else 0
        if nbytes != child.journal_nbytes and child.told is None:
            child.journal_nbytes, child.seen_at = nbytes, now
        elif now - child.seen_at > (HANG_SECONDS if child.journal_nbytes > 0 else _START_SECONDS):
            child.process.send_signal(signal.SIGUSR1)  # it writes down where it is
            time.sleep(1)
            self.counts["hangs"] += 1
            self._problem(child, f"hangs after {child.told and child.told.name}")
            self._tell(child, signal.SIGKILL)

    def _problem(self, child: Child, what: str) -> None:
        log = child.log.read_text(errors="replace")[-3000:]
        self.problems.append(f"{child.journal.name} {what}\n{log}")

    def _start(self, name: str) -> Child:
        self._incarnations[name] += 1
        number = self._incarnations[name]
        journal, log = (self.directory / kind / f"{name}.{number}" for kind in ("journals", "logs"))
        failpoint = self._failpoint() if number > 1 and self._dice.random() < 0.3 else ""
        arguments = [self.directory, role_of(name), name, number, self._seed]
        arguments.append("limited" if self._is_limited else "unlimited")
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "tests.torture.process", *map(str, arguments)],
                cwd=ROOT, stdout=file, stderr=file, env=os.environ | {VARIABLE: failpoint},
            )  # fmt: skip
        return Child(name, process, journal, log, may_kill_itself=bool(failpoint))

    def _failpoint(self) -> str:
        name, latest = self._dice.choice(list(_DEADLY_POINTS.items()))
        return f"{name}=kill@{self._dice.randint(1, latest)}"

    def _kill_all(self) -> None:
        for child in self._children:
            child.process.kill()
        for child in self._children:
            child.process.wait()
            if not child.told and child.process.returncode != -signal.SIGKILL:
                self._problem(child, f"ended with {child.process.returncode}")
