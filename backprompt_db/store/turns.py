"""Turns: of all who want to write into a store one does, and nobody waits for a turn without end.

LMDB's own mutex cannot be waited for with a limit, so it is asked for by the one who has the turn, who finds it free.
There is a second reason: when a process is killed while it waits for that mutex, the kernel compares thread numbers and
ignores which container they are from. It may take the killed thread for the holder, and let the next one in while the
holder still writes.

A turn is a lock on a file that only those can open who may write: who can open a file can hold its lock for ever.
Earlier versions have locked the directory instead, which those who read can do too. It is locked as well, so that
writers of earlier versions are kept out and waited for, but not where a process holds it that may only read.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from backprompt_db.store.files import DATA
from backprompt_db.system.holders import Holder, holders
from backprompt_db.system.locks import give_lock, make_lock_file, take_lock, try_lock, wait_for
from backprompt_db.system.platform import O_DIRECTORY

TURN_LOCK = "turn.lock"


class Writers(NamedTuple):
    """Who may write into a store, as its file says."""

    uid: int
    mode: int

    @property
    def has_group(self) -> bool:
        """Whether there are others than the owner and root."""
        return bool(self.mode & 0o022)

    @property
    def lock_mode(self) -> int:
        """The permissions of a lock that they take."""
        return 0o660 if self.has_group else 0o600

    def has(self, holder: Holder) -> bool:
        """Whether a process may be one of them."""
        return self.has_group or holder.uid in (0, self.uid)


def prepare_turns(directory: Path) -> None:
    """Make the file for turns in a store that has none yet, while there is room on the disk."""
    with contextlib.suppress(OSError):  # whoever takes a turn will say what is wrong
        make_lock_file(directory / TURN_LOCK, mode=_writers(directory).lock_mode)


def take_turn(directory: Path) -> list[int]:
    """Wait for the turn to write into the store in `directory` and return what `give_turn` takes.

    Raises `TimeoutError` when others keep it for too long.
    """
    writers = _writers(directory)
    turn = [take_lock(directory / TURN_LOCK, mode=writers.lock_mode)]
    try:
        _keep_earlier_versions_out(directory, writers, turn)
    except BaseException:
        give_turn(turn)
        raise
    return turn


def give_turn(turn: list[int]) -> None:
    """Release what `take_turn` returned."""
    while turn:  # each is forgotten before it is given back: nothing is given back twice
        give_lock(turn.pop())


def _writers(directory: Path) -> Writers:
    status = (directory / DATA).stat()
    return Writers(status.st_uid, status.st_mode)


def _keep_earlier_versions_out(directory: Path, writers: Writers, turn: list[int]) -> None:
    try:
        descriptor = os.open(directory, os.O_RDONLY | O_DIRECTORY)
    except OSError:  # then nobody has it
        return
    turn.append(descriptor)
    wait_for(lambda: try_lock(descriptor, is_alone=True) or _is_held_by_readers(directory, writers), directory)


def _is_held_by_readers(directory: Path, writers: Writers) -> bool:
    """Whether all who hold the lock of a directory may only read; False where the system does not tell who does."""
    found = holders(directory)
    return bool(found) and not any(writers.has(holder) for holder in found)
