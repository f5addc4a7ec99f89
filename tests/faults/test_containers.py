"""Processes in several containers on one database: each container numbers its processes and threads by itself."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import backprompt_db as bp
from backprompt_db.operations.verify import verify
from tests.support.faults import PREAMBLE, ROOT, TIMEOUT_SECONDS, assert_reads_back, child, next_line, put_prompts

APART = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.fixture(autouse=True)
def _may_be_apart() -> None:
    if subprocess.run([*APART, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not make a PID namespace")


@contextlib.contextmanager
def contained(script: str, place: Path, *, pid: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A process with a PID of our choice in a PID namespace of its own, which does not outlive the block."""
    command = [sys.executable, "-W", "error", "-c", PREAMBLE + script, str(place)]
    if pid != 1:
        shell = f"echo {pid - 1} > /proc/sys/kernel/ns_last_pid && {shlex.join(command)}; exit $?"
        command = ["sh", "-c", shell]
    pipe = subprocess.PIPE
    with subprocess.Popen([*APART, *command], stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


USE = """
db = bp.open(place, memory_nbytes=0)
put_prompts(db, [0])
print('open', os.getpid(), flush=True)
sys.stdin.readline()
put_prompts(db, [1])
assert_reads_back(db, [0, 1])
db.close()
print('fine', flush=True)
"""

TRY = """
for mode in 'ar':
    try:
        bp.open(place, mode=mode)
    except bp.BackpromptError as error:
        print(os.getpid(), type(error).__name__, error, flush=True)
sys.stdin.readline()
with bp.open(place, memory_nbytes=0) as db:
    assert_reads_back(db, [0, 1])
    put_prompts(db, [2])
print('fine', flush=True)
"""


def test_the_same_pid_in_two_containers_is_told_to_the_second_and_harms_neither(tmp_path: Path) -> None:
    place = tmp_path / "db"
    with contained(USE, place) as first:
        assert next_line(first) == "open 1"
        with contained(TRY, place) as second:
            for _ in "ar":
                told = next_line(second)
                assert told.startswith("1 StoreLocked ")
                assert "in another container by a process with the same PID, 1. " in told
                assert "--pid=host" in told
            go_on(first)
            assert next_line(first) == "fine"
            assert first.wait(TIMEOUT_SECONDS) == 0
            go_on(second)
            assert next_line(second) == "fine", "the PID is free again"
    with bp.open(place) as db:
        assert_reads_back(db, [0, 1, 2])
        assert verify(db).is_clean


def test_other_pids_in_two_containers_share_the_database(tmp_path: Path) -> None:
    place = tmp_path / "db"
    with contained(USE, place) as first, contained(USE, place, pid=77) as second:
        assert (next_line(first), next_line(second)) == ("open 1", "open 77")
        for process in (first, second):
            go_on(process)
        assert (next_line(first), next_line(second)) == ("fine", "fine")


WRITE = """
from backprompt_db.store.environment import shared_environment
environment = shared_environment(Path(place) / 'store', readonly=False)
def write():
    print('comes', threading.get_native_id(), flush=True)
    with environment.transaction(write=True):
        print('in', time.monotonic(), flush=True)
        sys.stdin.readline()
        left = time.monotonic()
    print('out', left, flush=True)
"""
IN_THREAD = WRITE + "thread = threading.Thread(target=write); thread.start(); thread.join()"
A_WHILE_SECONDS = 0.5
"""Long enough for a process to come to where it has to wait."""


def test_a_writer_killed_while_it_waits_lets_nobody_in_beside_the_one_who_writes(tmp_path: Path) -> None:
    """Also if its thread has the number that the writing one has in another container."""
    place = tmp_path / "db"
    bp.open(place).close()
    with contained(IN_THREAD, place) as writing:
        number = next_line(writing).split()[1]
        assert next_line(writing).startswith("in ")
        with contained(WRITE + "write()", place, pid=int(number)) as waiting:
            assert next_line(waiting) == f"comes {number}"
            time.sleep(A_WHILE_SECONDS)
        with child(WRITE + "write()", place) as third:
            assert next_line(third).startswith("comes ")
            time.sleep(A_WHILE_SECONDS)
            go_on(writing)
            out, into = next_line(writing), next_line(third)
            go_on(third)
            assert next_line(third).startswith("out ")
    assert (out.split()[0], into.split()[0]) == ("out", "in")
    assert float(out.split()[1]) <= float(into.split()[1])
    with bp.open(place) as db:
        put_prompts(db, [0])
        assert verify(db).is_clean
