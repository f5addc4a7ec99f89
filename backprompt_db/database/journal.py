"""The write journal, between store and catalog: which groups of parts are being stored and are not recorded yet.

The evictor goes by the catalog, so the catalog must list all that is stored: else the evictor would remove parts on
which unlisted ones build. Writers of all processes share a lock while they store a group and record it; the evictor
holds it alone while it removes one. Meanwhile the journal has an entry for each group, a file with the keys of its
parts. An entry that is left says what a killed process has stored and not recorded.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from backprompt_db.database.config import Limits
from backprompt_db.database.location import JOURNAL, TURNSTILE_LOCK, WRITING_LOCK
from backprompt_db.errors import StoreError, StoreLocked
from backprompt_db.prompt.ids import ID_NBYTES, Address
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key
from backprompt_db.store.files import Modes, locked, make_directory
from backprompt_db.system.files import read_small
from backprompt_db.system.platform import O_NOFOLLOW, set_mode

_KEY_NBYTES = ID_NBYTES + 1
_MAX_ENTRY_NBYTES = 1 << 24

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
        """Store parts, then record them, in the block; the entry stays when they were stored and not recorded.

        When somebody holds the lock for too long, the block runs without it: at worst something is removed that these
        parts build on, which costs a computation.
        """
        if self._directory is None:
            yield
            return
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(StoreLocked), self._lock(TURNSTILE_LOCK, is_alone=False):
                stack.enter_context(self._lock(WRITING_LOCK, is_alone=False))
            entry = self._make_entry(keys)
            try:
                yield
            except StoreError:  # nothing was stored
                _remove(entry)
                raise
            _remove(entry)

    @contextlib.contextmanager
    def nobody_writing(self) -> Iterator[None]:
        """Let nobody begin to write in the block. Raises `StoreLocked` when somebody has been at it for too long."""
        if self._directory is None:
            yield
            return
        # Without the turnstile, writers that take turns would never leave the other lock free.
        with self._lock(TURNSTILE_LOCK, is_alone=True), self._lock(WRITING_LOCK, is_alone=True):
            yield

    def entries(self) -> list[Path]:
        """Return the entries; while nobody writes, they are those of processes that were killed or had no catalog."""
        if self._directory is None:
            return []
        try:
            return sorted(each for each in (self._directory / JOURNAL).iterdir() if each.is_file())
        except OSError:
            return []

    def _lock(self, name: str, *, is_alone: bool) -> contextlib.AbstractContextManager[None]:
        assert self._directory is not None  # noqa: S101 - the callers have looked
        return locked(self._directory / name, is_alone=is_alone, mode=self._limits.modes.writers)

    def _make_entry(self, keys: Iterable[Key]) -> Path | None:
        """Write down what is about to be stored; None on a full disk: an entry is not worth failing for."""
        assert self._directory is not None  # noqa: S101 - the caller has looked
        entry = self._directory / JOURNAL / f"{os.getpid()}-{os.urandom(4).hex()}-{next(_numbers)}"
        content = b"".join(key.address + key.part.value for key in keys)
        try:
            _write_new(entry, content, mode=self._limits.modes.file)
        except FileNotFoundError:
            with contextlib.suppress(OSError, StoreError):
                make_journal(self._directory, self._limits.modes)
                _write_new(entry, content, mode=self._limits.modes.file)
                return entry
            return None
        except OSError:
            return None
        return entry


def make_journal(directory: Path, modes: Modes) -> None:
    """Make the directory of a database's journal, if it has none yet."""
    make_directory(directory / JOURNAL, modes.directory)


def keys_of_entry(entry: Path) -> list[Key] | None:
    """Return the keys in an entry: none of one that is malformed or gone, those before the end of one that is cut off.

    None for one that this user may not read.
    """
    try:
        content = read_small(entry, max_nbytes=_MAX_ENTRY_NBYTES)
    except PermissionError:
        return None
    except OSError:
        return []
    codes = {part.value: part for part in Part}
    records = (content[begin : begin + _KEY_NBYTES] for begin in range(0, len(content), _KEY_NBYTES))
    return [
        Key(Address(record[:ID_NBYTES]), codes[record[ID_NBYTES:]]) for record in records if record[ID_NBYTES:] in codes
    ]


def _remove(entry: Path | None) -> None:
    if entry is not None:
        with contextlib.suppress(OSError):
            entry.unlink()


def _write_new(path: Path, content: bytes, *, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | O_NOFOLLOW
    descriptor = os.open(path, flags, mode)
    try:
        set_mode(descriptor, mode)
        os.write(descriptor, content)
    finally:
        os.close(descriptor)
