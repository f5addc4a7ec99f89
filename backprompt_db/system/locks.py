"""Locks between processes. The kernel holds them, so they are gone with their process, however it died."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backprompt_db.system.platform import (
    HAS_BYTE_LOCKS,
    O_DIRECTORY,
    O_NOFOLLOW,
    O_NONBLOCK,
    is_byte_locked,
    lock_file,
    set_mode,
    try_lock_byte,
    unlock_bytes,
    unlock_file,
)

_FIRST_WAIT_SECONDS = 0.001
_LONGEST_WAIT_SECONDS = 0.005
"""It is short because the kernel keeps no place for a process that asks again and again: others would come first."""

_BUSY = frozenset({errno.EACCES, errno.EAGAIN})


@contextmanager
def file_lock(
    path: Path, *, is_alone: bool = True, mode: int = 0o600, timeout_seconds: float | None = None
) -> Iterator[None]:
    """Hold a lock on a whole file: alone, or together with others who want it so.

    The file is made with the permissions `mode` if there is none; one that may only be read will do. Raises
    `TimeoutError` when the lock cannot be had within `timeout_seconds`, without which it is waited for, and the
    `OSError` of a file that cannot be opened.
    """
    descriptor = _open_lock_file(path, mode=mode)
    try:
        if timeout_seconds is None:
            lock_file(descriptor, shared=not is_alone)
        else:
            _wait(descriptor, path, shared=not is_alone, timeout_seconds=timeout_seconds)
        yield
    finally:
        unlock_file(descriptor)
        os.close(descriptor)


def _wait(descriptor: int, path: Path, *, shared: bool, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    pause = _FIRST_WAIT_SECONDS
    while True:
        try:
            lock_file(descriptor, shared=shared, wait=False)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"another process holds {path}") from None
        else:
            return
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_WAIT_SECONDS)


def _open_lock_file(path: Path, *, mode: int) -> int:
    """Return a descriptor of a lock file, made with exactly the permissions `mode`; never through a symbolic link."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | O_NOFOLLOW, mode)
    except FileExistsError:
        return _open_existing(path)
    except OSError:  # the directory may not be written to, but perhaps the file is there
        with contextlib.suppress(FileNotFoundError):
            return _open_existing(path)
        raise
    set_mode(descriptor, mode)
    return descriptor


def _open_existing(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | O_NOFOLLOW | O_NONBLOCK)
    except PermissionError:
        return os.open(path, os.O_RDONLY | O_NOFOLLOW | O_NONBLOCK)


def take_turn(directory: str | Path) -> int | None:
    """Wait for the exclusive lock of a directory and return it; None, without a lock, for one that cannot be opened."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | O_DIRECTORY)
    except OSError:
        return None
    try:
        lock_file(descriptor, shared=False)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def give_turn(descriptor: int | None) -> None:
    """Release what `take_turn` returned."""
    if descriptor is not None:
        unlock_file(descriptor)
        os.close(descriptor)


def is_locked(path: str | Path, offset: int) -> bool:
    """Whether another process holds a lock on a byte of a file; False where there is no file.

    Do not ask about a file on which this process has locks: it is opened and closed here, which would give them up.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        return is_byte_locked(descriptor, offset)
    finally:
        os.close(descriptor)


class ByteLocks:
    """Locks on single bytes of a file, at any of 2^63 offsets; the file may be empty.

    They belong to this object and not to the process (`F_OFD_SETLK`), so threads exclude each other with one object
    each. Raises `NotImplementedError` where the system has no such locks, and the `OSError` of a file that cannot be
    opened.
    """

    def __init__(self, path: Path, *, mode: int = 0o600) -> None:
        if not HAS_BYTE_LOCKS:
            raise NotImplementedError("this system has no open file description locks")
        self._descriptor: int | None = _open_lock_file(path, mode=mode)

    def try_lock(self, offset: int) -> bool:
        """Lock a byte unless somebody else holds it; return whether it is locked now."""
        try:
            if self._descriptor is not None:
                try_lock_byte(self._descriptor, offset)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            raise
        return True

    def unlock(self, offset: int) -> None:
        """Unlock a byte."""
        if self._descriptor is not None:
            unlock_bytes(self._descriptor, offset, 1)

    def close(self) -> None:
        """Unlock all bytes, also for children that were forked meanwhile. Closing twice is allowed."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            unlock_bytes(descriptor, 0, 0)
            os.close(descriptor)
