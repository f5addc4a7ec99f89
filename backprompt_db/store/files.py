"""The files of a database: how they are made, with exact permissions and never through a link."""

from __future__ import annotations

import contextlib
import enum
import json
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from backprompt_db.errors import UnsafeLocation
from backprompt_db.store.lmdb_errors import store_errors
from backprompt_db.system.locks import file_lock
from backprompt_db.system.platform import O_DIRECTORY, O_NOFOLLOW, reserve, set_mode

_T = TypeVar("_T")

DATA, READER_TABLE = "data.mdb", "lock.mdb"
"""LMDB's two files: everything that is stored, and its table of readers."""


class Modes(NamedTuple):
    """Permission bits of what a database consists of."""

    directory: int
    file: int
    lock: int
    """For LMDB's lock file, to which even readers must be able to write."""
    writers: int
    """For the other locks: those who may only read cannot open them, so they cannot hold up those who write."""


class Sharing(enum.StrEnum):
    """Who may use a database."""

    PRIVATE = "private"
    """Its owner alone."""
    GROUP = "group"
    """Every member of a group reads and writes. New files get the group of their directory (setgid)."""
    READERS = "readers"
    """The owner writes, members of a group read."""

    @property
    def modes(self) -> Modes:
        """The permission bits of its files."""
        return _MODES[self]


_MODES = {
    Sharing.PRIVATE: Modes(directory=0o700, file=0o600, lock=0o600, writers=0o600),
    Sharing.GROUP: Modes(directory=0o2770, file=0o660, lock=0o660, writers=0o660),
    Sharing.READERS: Modes(directory=0o2750, file=0o640, lock=0o660, writers=0o600),
}

PRIVATE = Sharing.PRIVATE.modes


_WHOLE_NBYTES = 2 * mmap.PAGESIZE
"""The size of the two meta pages that LMDB writes first."""


def create_files(directory: Path, modes: Modes) -> None:
    """Make the directory and two empty files in it, with the permissions `modes` whatever the umask.

    Files that an interrupted creation has left are used. Raises `UnsafeLocation` for symbolic links.
    """
    with store_errors(directory):
        make_directory(directory, modes.directory)
        for name, mode in ((DATA, modes.file), (READER_TABLE, modes.lock)):
            descriptor = os.open(directory / name, os.O_CREAT | os.O_RDWR | O_NOFOLLOW, mode)
            set_mode(descriptor, mode)
            if os.fstat(descriptor).st_size < _WHOLE_NBYTES:  # the disk was full, and LMDB refuses half of its pages
                os.ftruncate(descriptor, 0)
            os.close(descriptor)


def make_directory(directory: Path, mode: int) -> None:
    """Make a directory with exactly these permissions, or give them to the one that is there.

    Raises `UnsafeLocation` for a symbolic link.
    """
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    if directory.is_symlink():
        raise UnsafeLocation(f"{directory} is a symbolic link", hint="Delete it, or give another directory.")
    descriptor = os.open(directory, os.O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:  # only its owner may change it
            set_mode(descriptor, mode)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, is_alone: bool = True, mode: int, timeout_seconds: float | None = None) -> Iterator[None]:
    """Hold a lock as `file_lock` does, whose errors become the `StoreError`s that fit."""
    with ExitStack() as stack:
        with store_errors(path):
            stack.enter_context(file_lock(path, is_alone=is_alone, mode=mode, timeout_seconds=timeout_seconds))
        yield


def make_reader_table(directory: Path, *, nbytes: int) -> None:
    """Make a store's table of readers if it has none, with room for `nbytes` and permissions like those of the data.

    LMDB would apply the umask. And it maps holes: a process that writes into one on a full disk is killed.
    """
    lock = directory / READER_TABLE
    is_for_group = (directory / DATA).stat().st_mode & 0o040
    mode = 0o660 if is_for_group else 0o600
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_RDWR | O_NOFOLLOW, mode)
        set_mode(descriptor, mode)
        os.close(descriptor)
    if not lock.stat().st_size:
        descriptor = os.open(lock, os.O_RDWR | O_NOFOLLOW)
        try:
            reserve(descriptor, nbytes)
        finally:
            os.close(descriptor)


Identity = tuple[int, int]
"""Device and inode of a file."""


def identity_of(path: Path) -> Identity | None:
    """Return device and inode of a file; None where it cannot be looked at."""
    try:
        status = os.stat(path)  # noqa: PTH116 - half the time of Path.stat, before each transaction
    except OSError:
        return None
    return status.st_dev, status.st_ino


def from_json(content: bytes, kind: type[_T]) -> _T:
    """Return what a JSON file says, in whichever encoding of Unicode. Raises `ValueError` for what is no such value."""
    found = json.loads(content)
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a string in it has a lone surrogate") from None
    return msgspec.convert(found, kind)
