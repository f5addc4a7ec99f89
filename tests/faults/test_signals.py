"""Processes that are stopped, killed, interrupted or told to end in the middle of something, and those beside them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

import backprompt_db as bp
from backprompt_db.database.creating import create_database
from backprompt_db.database.database import Database
from backprompt_db.prompt.segments import Segment
from backprompt_db.store.files import Sharing
from tests.support.faults import (
    IN_OTHER_SHOES,
    NUMS_TOKENS,
    TIMEOUT_SECONDS,
    address_of,
    assert_reads_back,
    assert_survived,
    child,
    keys_of,
    new_parts,
    next_line,
    num_tokens_at,
    prompt,
    public_directory,
    put_prompts,
    segments,
    wait_until_stopped,
    wanted_of,
    wrong,
)

assert sys.platform != "win32"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A database with a prompt, closed."""
    with bp.open(tmp_path / "db") as db:
        put_prompts(db, [0])
    return tmp_path / "db"


def large_segments() -> Iterator[Segment]:
    """Segments whose keys and values are several chunks in the store."""
    for number in count():
        (segment,) = segments(f"Large {number}")
        if num_tokens_at(address_of(segment)) == max(NUMS_TOKENS):
            yield segment


def end(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    """Wait for a process; return the exit code, the words that it printed, and what it logged."""
    out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    return process.returncode, out.split(), err


READ_AND_STOP = """
from tests.faults.test_signals import large_segments
db = bp.open(place)
(key,) = keys_of([next(large_segments())], [Part.KV])
pieces = []

def take(piece):
    pieces.append(bytes(piece))
    if len(pieces) == 1:
        os.kill(os.getpid(), signal.SIGSTOP)

print(db.store.scan(key, take), flush=True)
arrays = contents(key)
print(b''.join(pieces).endswith(bytes(arrays['values'].data)), flush=True)
"""


def churn(db: Database, segment: Segment, *, num_turns: int) -> None:
    """Write over the pages of what is deleted, again and again."""
    for turn in range(num_turns):
        others = segments(f"Turn {turn} of {address_of(segment).hex()}")
        db.put(new_parts([segment, *others]))
        db.flush()
        found = db.fetch(wanted_of([segment, *others]))
        assert len(found) == 6
        assert wrong(found) == []
        assert db.store.delete(keys_of([segment, *others])) == 6


def test_a_stopped_reader_keeps_its_view_while_others_write_over_what_they_deleted(place: Path) -> None:
    read, other = (segment for segment, _ in zip(large_segments(), range(2), strict=False))
    with bp.open(place, memory_nbytes=0) as db, child(READ_AND_STOP, place) as reader:
        db.put(new_parts([read]))
        db.flush()
        wait_until_stopped(reader)
        assert db.store.delete(keys_of([read])) == 3
        churn(db, other, num_turns=10)
        reader.send_signal(signal.SIGCONT)
        assert end(reader) == (0, ["True", "True"], "")
        assert_reads_back(db, [0])


def test_the_pages_of_a_killed_reader_are_used_again(place: Path) -> None:
    read, other = (segment for segment, _ in zip(large_segments(), range(2), strict=False))
    with bp.open(place, memory_nbytes=0) as db, child(READ_AND_STOP, place) as reader:
        db.put(new_parts([read]))
        db.flush()
        wait_until_stopped(reader)
        reader.kill()
        reader.wait(TIMEOUT_SECONDS)
        assert db.store.delete(keys_of([read])) == 3
    with bp.open(place) as db:
        churn(db, other, num_turns=20)
        assert db.store.usage().file_nbytes < 10_000_000  # and 25 MB were written
    assert_survived(place, [0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGCONT])
def test_while_a_writer_is_stopped_others_read_and_then_write(place: Path, number: signal.Signals) -> None:
    script = "with bp.open(place) as db: put_prompts(db, [1])"
    with bp.open(place, memory_nbytes=0) as db, child(script, place, failpoint="store.put.inside=stop@2") as stopped:
        wait_until_stopped(stopped)
        assert_reads_back(db, [0])
        waiting = threading.Thread(target=put_prompts, args=(db, [2]))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()  # for its turn
        assert wrong(db.fetch(wanted_of(prompt(0)))) == []
        stopped.send_signal(number)
        waiting.join(TIMEOUT_SECONDS)
        assert not waiting.is_alive()
        assert stopped.wait(TIMEOUT_SECONDS) == (0 if number == signal.SIGCONT else -number)
    assert_survived(place, [0, 1, 2] if number == signal.SIGCONT else [0, 2])


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_a_writer_of_another_user_that_is_killed_holds_nobody_up() -> None:
    with public_directory() as directory:
        place = directory / "db"
        create_database(place, sharing=Sharing.GROUP, group="65534")
        with bp.open(place) as db:
            put_prompts(db, [0])
            assert db.catalog is not None
        script = (
            "import backprompt_db.catalog.catalog, backprompt_db.database.opening\nimport sqlalchemy.dialects.sqlite\n"
            + IN_OTHER_SHOES
            + "db = bp.open(place)\n"
            "put_prompts(db, [1]); print('stored', os.getuid(), flush=True); put_prompts(db, [2])"
        )
        with child(script, place, failpoint="store.put.inside=kill@14") as victim:
            assert end(victim) == (-signal.SIGKILL, ["stored", "65534"], "")
        assert_survived(place, [0, 1])


COMMIT = """
db = bp.open(place)
put_prompts(db, [0])
db.put(new_parts(prompt(1)))
print('put', flush=True)
db.flush()
"""
SLOWLY = "store.put.before-commit=sleep:0.6"


def interrupted(script: str, place: Path, *numbers: signal.Signals) -> tuple[int, list[str], str]:
    """Send signals to a process while it commits, one after the other."""
    with child(script, place, failpoint=SLOWLY) as process:
        assert next_line(process) == "put"
        for number in numbers:
            time.sleep(0.15)
            process.send_signal(number)
        return end(process)


def test_a_keyboard_interrupt_during_a_commit_ends_the_process_and_loses_nothing(tmp_path: Path) -> None:
    code, _, log = interrupted(COMMIT, tmp_path / "db", signal.SIGINT)
    assert code == -signal.SIGINT
    assert log.rstrip().endswith("KeyboardInterrupt")
    assert_survived(tmp_path / "db", [0, 1])


def test_several_keyboard_interrupts_end_the_process_soon_and_leave_nothing_half(tmp_path: Path) -> None:
    code, _, log = interrupted(COMMIT, tmp_path / "db", signal.SIGINT, signal.SIGINT)
    assert code != 0
    assert "KeyboardInterrupt" in log
    assert_survived(tmp_path / "db", [0])


def test_a_program_that_survives_a_keyboard_interrupt_goes_on_with_its_database(tmp_path: Path) -> None:
    script = COMMIT.replace("db.flush()", "try:\n    db.flush()\nexcept KeyboardInterrupt:\n    put_prompts(db, [2])")
    code, _, log = interrupted(script + "\nprint(db.counters.num_stored)", tmp_path / "db", signal.SIGINT)
    assert (code, log) == (0, "")
    assert_survived(tmp_path / "db", [0, 1, 2])


def test_a_keyboard_interrupt_inside_a_transaction_takes_it_back(tmp_path: Path) -> None:
    script = (
        "from backprompt_db.store.contract import Blob\n"
        "db = bp.open(place)\nput_prompts(db, [0])\nblob = Blob(keys_of(garbage())[0], bytes(3_000_000))\n"
        "print('put', flush=True)\n"
        "try:\n    db.store.put([blob])\nexcept KeyboardInterrupt:\n    print(db.store.has(blob.key))\n"
        "print(db.store.put([blob]) == [blob.key], db.store.delete([blob.key]))"
    )
    assert interrupted(script, tmp_path / "db", signal.SIGINT) == (0, ["False", "True", "1"], "")
    assert_survived(tmp_path / "db", [0])


@pytest.mark.parametrize(
    ("handler", "code", "numbers"),
    [("", -signal.SIGTERM, [0]), ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))", 143, [0, 1])],
)
def test_what_ends_a_process_during_a_commit_loses_nothing_that_was_acknowledged(
    tmp_path: Path, handler: str, code: int, numbers: list[int]
) -> None:
    """A program that lets SIGTERM end its interpreter, and not the process at once, loses nothing at all."""
    assert interrupted(handler + COMMIT, tmp_path / "db", signal.SIGTERM)[0] == code
    assert_survived(tmp_path / "db", numbers)


FULL_QUEUE = """
import backprompt_db.database.writer as writer
writer.MAX_QUEUED_NBYTES = 500_000
db = bp.open(place)
for number in range(12):
    db.put(new_parts(prompt(number)))
"""


@pytest.mark.parametrize("ending", ["", "del db", "import atexit; atexit.register(db.close)"])
def test_an_interpreter_that_exits_with_a_full_queue_writes_all_of_it(tmp_path: Path, ending: str) -> None:
    with child(FULL_QUEUE + ending, tmp_path / "db", failpoint="store.put.before=sleep:0.05") as process:
        assert end(process)[0] == 0
    with bp.open(tmp_path / "db") as db:
        assert_reads_back(db, range(12))


def test_a_thread_that_waits_for_room_in_the_queue_is_waited_for_at_exit(tmp_path: Path) -> None:
    script = FULL_QUEUE.replace(
        "for number in range(12):\n    db.put(", "def put_all():\n  for number in range(12):\n    db.put("
    )
    script += "threading.Thread(target=put_all).start()"
    with child(script, tmp_path / "db", failpoint="store.put.before=sleep:0.05") as process:
        assert end(process) == (0, [], "")
    with bp.open(tmp_path / "db") as db:
        assert_reads_back(db, range(12))
