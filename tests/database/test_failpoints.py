"""Failpoints: what the environment asks for happens at the point that it names, and nowhere else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import backprompt_db
from backprompt_db.system.failpoints import NAMES, VARIABLE

assert sys.platform != "win32"

SCRIPT = (
    "from backprompt_db.system.failpoints import reach\n"
    "for number in range(3): reach('store.put.inside'); print(number)"
)


def run(setting: str, script: str = SCRIPT) -> tuple[int, str, str]:
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=os.environ | {VARIABLE: setting}, capture_output=True, text=True, check=False, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def test_a_point_that_nobody_named_does_nothing() -> None:
    assert run("") == (0, "0\n1\n2\n", "")
    assert run("store.put.after=kill") == (0, "0\n1\n2\n", "")


@pytest.mark.parametrize(
    ("action", "code", "error"),
    [("kill", -signal.SIGKILL, ""), ("raise", 1, "RuntimeError: failpoint"), ("full", 1, "No space left on device")],
)
def test_a_point_fails_in_the_way_that_was_asked_for(action: str, code: int, error: str) -> None:
    found, _, log = run(f"store.put.inside={action}")
    assert found == code
    assert error in log


def test_a_point_fails_at_the_pass_that_was_asked_for() -> None:
    script = SCRIPT.replace("print(number)", "print(number, flush=True)")
    assert run("catalog.record.inside=raise,store.put.inside=kill@3", script)[:2] == (-signal.SIGKILL, "0\n1\n")


def test_a_point_can_wait() -> None:
    script = "import time\nbegan = time.monotonic()\n" + SCRIPT + "\nassert time.monotonic() - began > 0.2"
    assert run("store.put.inside=sleep:0.2@2", script)[0] == 0


def test_unknown_points_and_actions_are_refused() -> None:
    assert "is no failpoint" in run("store.nothing=kill")[2]
    assert "unknown action" in run("store.put.inside=explode")[2]


def test_the_points_in_the_code_are_those_that_have_names() -> None:
    package = Path(backprompt_db.__file__).parent
    paths = [*package.rglob("*.py"), *(package.parent / "migrations").rglob("*.py")]
    sources = [path.read_text() for path in paths]
    called = {name for source in sources for name in re.findall(r'reach\("([^"]+)"\)', source)}
    assert called == NAMES
