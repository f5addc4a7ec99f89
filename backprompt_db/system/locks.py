"""Locks between processes. The kernel holds them, so they are gone with their process, however it died.

A process that is stopped keeps its locks. So nobody waits for a lock without end: after a second it is logged who holds
it, after `PATIENCE_SECONDS` the wait fails, and what fails is not waited for again until somebody else has had the
lock, or some time has gone by.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from backprompt_db.system.holders import holders
from backprompt_db.system.platform import (
    HAS_BYTE_LOCKS,
    O_NOFOLLOW,
    O_NONBLOCK,
    is_byte_locked,
    lock_file,
    set_mode,
    try_lock_byte,
    unlock_bytes,
    unlock_file,
)

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 3.0
"""How long anybody waits for a lock of any kind that one process keeps."""

_NUM_HOLDERS = 3
"""How many that come one after the other are waited for so long."""

NOTICE_SECONDS = 1.0
"""After how long it is logged that somebody waits."""

AGAIN_SECONDS = 30.0
"""For how long what was waited for in vain is hardly waited for again."""

_MOMENT_SECONDS = 0.05
"""How long it is waited for meanwhile."""

_FIRST_WAIT_SECONDS = 0.001
_LONGEST_WAIT_SECONDS = 0.005
"""It is short because the kernel keeps no place for a process that asks again and again: others would come first."""

_BUSY = frozenset({errno.EACCES, errno.EAGAIN})


@contextmanager
def file_lock(
    path: Path, *, is_alone: bool = True, mode: int = 0o600, timeout_seconds: float | None = None
) -> Iterator[None]:
    """Hold a lock on a whole file in the block, as `take_lock` takes it."""
    descriptor = _open_lock_file(path, mode=mode)
    try:
        _lock(descriptor, path, is_alone=is_alone, timeout_seconds=timeout_seconds)
        yield
    finally:
        give_lock(descriptor)


def take_lock(path: Path, *, mode: int) -> int:
    """Lock a whole file, alone, and return what `give_lock` takes.

    The file is made with the permissions `mode` if there is none; one that may only be read will do. Raises
    `TimeoutError` when others keep the lock for too long, and the `OSError` of a file that cannot be opened.
    """
    descriptor = _open_lock_file(path, mode=mode)
    try:
        _lock(descriptor, path, is_alone=True)
    except BaseException:
        give_lock(descriptor)
        raise
    return descriptor


def give_lock(descriptor: int) -> None:
    """Release what `take_lock` returned."""
    unlock_file(descriptor)
    os.close(descriptor)


def _lock(descriptor: int, path: Path, *, is_alone: bool, timeout_seconds: float | None = None) -> None:
    wait_for(
        lambda: try_lock(descriptor, is_alone=is_alone),
        path,
        timeout_seconds=timeout_seconds,
        progress=lambda: os.fstat(descriptor).st_mtime_ns,
    )
    if is_alone:
        with contextlib.suppress(OSError):  # the time tells those who wait that somebody else had the lock
            os.utime(descriptor)


def try_lock(descriptor: int, *, is_alone: bool) -> bool:
    """Lock an open file or directory unless others hold it; return whether it is locked now."""
    try:
        lock_file(descriptor, shared=not is_alone, wait=False)
    except BlockingIOError:
        return False
    return True


def wait_for(
    attempt: Callable[[], bool],
    path: Path,
    *,
    timeout_seconds: float | None = None,
    progress: Callable[[], int] = lambda: 0,
) -> None:
    """Attempt again and again to get a lock on `path`, or around it. Raises `TimeoutError`, which says who holds it.

    While `progress` changes, those who hold the lock take turns, and it is waited for longer.
    """
    if attempt():
        forgive(path)
        return
    before, began = progress(), time.monotonic()
    patience = patience_for(path, progress=before) if timeout_seconds is None else timeout_seconds
    deadline, end, notice_at = began + patience, began + _NUM_HOLDERS * patience, began + NOTICE_SECONDS
    pause = _FIRST_WAIT_SECONDS
    while not attempt():
        now = time.monotonic()
        if now >= min(deadline, end):
            seen = progress()
            if seen == before or now >= end:
                refuse(path, progress=seen)
                raise TimeoutError(f"another process holds {path}{told_holders(path)}")
            before, deadline = seen, now + patience
        if now >= notice_at:
            notice_at = math.inf
            notice(path)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_WAIT_SECONDS)
    forgive(path)


def notice(path: Path) -> None:
    """Log that somebody waits for a lock, and for whom."""
    logger.warning("waiting for %s, which another process holds%s", path, told_holders(path))


def told_holders(path: Path) -> str:
    """Return what to say of those who hold a lock: nothing where nobody is known."""
    others = ", ".join(str(holder) for holder in holders(path))
    return f": {others}" if others else ""


class _Refusal(NamedTuple):
    """A wait that was in vain."""

    progress: int
    until: float


_refusals: dict[Path, _Refusal] = {}
"""What this process has waited for in vain: not again for each of a thousand groups of parts."""


def refuse(path: Path, *, progress: int = 0) -> None:
    """Remember that a lock was waited for in vain."""
    if not _is_refused(path, progress=progress):
        _refusals[path] = _Refusal(progress, time.monotonic() + AGAIN_SECONDS)


def forgive(path: Path) -> None:
    """Forget that a lock was waited for in vain."""
    _refusals.pop(path, None)


def patience_for(path: Path, *, progress: int = 0) -> float:
    """Return how long to wait for a lock: a moment, where it was just waited for in vain and nobody else had it."""
    is_refused = _is_refused(path, progress=progress)
    return min(_MOMENT_SECONDS, PATIENCE_SECONDS) if is_refused else PATIENCE_SECONDS


def _is_refused(path: Path, *, progress: int) -> bool:
    refusal = _refusals.get(path)
    return refusal is not None and refusal.progress == progress and time.monotonic() < refusal.until


def make_lock_file(path: Path, *, mode: int) -> None:
    """Make the file of a lock, with exactly the permissions `mode`, unless there is one."""
    os.close(_open_lock_file(path, mode=mode))


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


def is_locked(path: str | Path, offset: int, *, is_alone: bool = False) -> bool:
    """Whether another process holds a lock on a byte of a file, or holds it alone; False where there is no file.

    Do not ask about a file on which this process has locks: it is opened and closed here, which would give them up.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        return is_byte_locked(descriptor, offset, is_alone=is_alone)
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
