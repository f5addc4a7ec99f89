"""Between store and catalog: who is writing, and what was stored that the catalog has not been told of.

A collector goes by the catalog, so it must know all that is stored: else it would remove what something builds on that
it does not know of. Writers of all processes share a lock while they store a group and record it, which a collector
holds alone while it removes one. A file stands for each group meanwhile; one that is left says what a killed process
has stored and not recorded.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from backprompt_db.database.config import Limits
from backprompt_db.errors import StoreError, StoreLocked
from backprompt_db.prompt.ids import ID_NBYTES, Address
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key
from backprompt_db.store.files import Modes, make_directory
from backprompt_db.store.locks import exclusive_lock, shared_lock
from backprompt_db.system.platform import O_NOFOLLOW, set_mode

_TURNSTILE, _GATE = "turnstile.lock", "writing.lock"
_MARKS = "pending"
_WAIT_SECONDS = 30.0
_KEY_NBYTES = ID_NBYTES + 1
_MAX_MARK_NBYTES = 1 << 24

_numbers = itertools.count()


class WriteJournal:
    """The groups that all processes are writing into the database in `directory`; None for one in memory."""

    def __init__(self, directory: Path | None, limits: Limits) -> None:
        self._directory = directory
        self._limits = limits

    @property
    def is_shared(self) -> bool:
        """Whether there may be other processes."""
        return self._directory is not None

    @contextlib.contextmanager
    def writing(self, keys: Iterable[Key]) -> Iterator[None]:
        """Store parts, then record them, in the block; when they are not recorded, a mark stays that says which.

        Who holds the lock for longer than it may be waited for is not waited for: at worst something is removed that
        these parts build on, which costs a computation.
        """
        if self._directory is None:
            yield
            return
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(StoreLocked), self._turnstile(is_alone=False):
                stack.enter_context(self._gate(is_alone=False))
            mark = self._make_mark(keys)
            try:
                yield
            except StoreError:  # nothing was stored
                _remove(mark)
                raise
            _remove(mark)

    @contextlib.contextmanager
    def nobody_writing(self) -> Iterator[None]:
        """Let nobody begin to write in the block. Raises `StoreLocked` when somebody has been at it for too long."""
        if self._directory is None:
            yield
            return
        # Without the turnstile, writers that take turns would never leave the gate free.
        with self._turnstile(is_alone=True), self._gate(is_alone=True):
            yield

    def leftovers(self) -> list[Path]:
        """Return the marks; while nobody is writing, those of processes that were killed or had no catalog."""
        if self._directory is None:
            return []
        try:
            return sorted(each for each in (self._directory / _MARKS).iterdir() if each.is_file())
        except OSError:
            return []

    def _turnstile(self, *, is_alone: bool) -> contextlib.AbstractContextManager[None]:
        return self._lock(_TURNSTILE, is_alone=is_alone)

    def _gate(self, *, is_alone: bool) -> contextlib.AbstractContextManager[None]:
        return self._lock(_GATE, is_alone=is_alone)

    def _lock(self, name: str, *, is_alone: bool) -> contextlib.AbstractContextManager[None]:
        assert self._directory is not None  # noqa: S101 - the callers have looked
        lock = exclusive_lock if is_alone else shared_lock
        return lock(self._directory / name, mode=self._limits.modes.lock, timeout_seconds=_WAIT_SECONDS)

    def _make_mark(self, keys: Iterable[Key]) -> Path | None:
        """Write down what is about to be stored; None on a full disk: a mark is not worth failing for."""
        assert self._directory is not None  # noqa: S101 - the caller has looked
        mark = self._directory / _MARKS / f"{os.getpid()}-{os.urandom(4).hex()}-{next(_numbers)}"
        content = b"".join(key.address + key.part.value for key in keys)
        try:
            _write_new(mark, content, mode=self._limits.modes.file)
        except FileNotFoundError:
            with contextlib.suppress(OSError, StoreError):
                make_marks_directory(self._directory, self._limits.modes)
                _write_new(mark, content, mode=self._limits.modes.file)
                return mark
            return None
        except OSError:
            return None
        return mark


def make_marks_directory(directory: Path, modes: Modes) -> None:
    """Make the place for marks in a database, if it has none yet."""
    make_directory(directory / _MARKS, modes.directory)


def keys_of_mark(mark: Path) -> list[Key] | None:
    """Return what a mark says, nothing for one that is cut off or is none, or gone; None where it may not be read."""
    try:
        with mark.open("rb") as file:
            content = file.read(_MAX_MARK_NBYTES)
    except PermissionError:
        return None
    except OSError:
        return []
    codes = {part.value: part for part in Part}
    records = (content[begin : begin + _KEY_NBYTES] for begin in range(0, len(content), _KEY_NBYTES))
    return [
        Key(Address(record[:ID_NBYTES]), codes[record[ID_NBYTES:]]) for record in records if record[ID_NBYTES:] in codes
    ]


def _remove(mark: Path | None) -> None:
    if mark is not None:
        with contextlib.suppress(OSError):
            mark.unlink()


def _write_new(path: Path, content: bytes, *, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | O_NOFOLLOW
    descriptor = os.open(path, flags, mode)
    try:
        set_mode(descriptor, mode)
        os.write(descriptor, content)
    finally:
        os.close(descriptor)
