"""Errors of LMDB and of the operating system, as errors of this library that say what to do."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from backprompt_db.errors import (
    StoreClosed,
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreLocked,
    StoreReadOnly,
    UnsafeLocation,
)
from backprompt_db.system.platform import max_file_nbytes

RESTORE = "Restore it from a backup, or delete the database directory: it will be computed again."
_FREE_SPACE = "Free some space; computation goes on without storing."
_CLOSE_FILES = "Close some files or raise the limit (ulimit -n)."

_BY_CLASS: dict[type[Exception], tuple[type[StoreError], str]] = {
    lmdb.MapFullError: (StoreFull, "Evict something, or open the database with a larger address space."),
    lmdb.TxnFullError: (StoreFull, "Store fewer parts at once."),
    lmdb.CorruptedError: (StoreCorrupt, RESTORE),
    lmdb.PageNotFoundError: (StoreCorrupt, RESTORE),
    lmdb.InvalidError: (StoreCorrupt, RESTORE),
    lmdb.VersionMismatchError: (StoreCorrupt, "The file was written by another generation of LMDB. " + RESTORE),
    lmdb.PanicError: (StoreCorrupt, "Close every process that has the database open, then open it again."),
    lmdb.ReadersFullError: (StoreLocked, "Close processes that have the database open; 2,048 may read at once."),
    lmdb.LockError: (StoreLocked, "Another process holds the lock file; try again."),
    lmdb.ReadonlyError: (StoreReadOnly, "Open the database as a user who may write to it."),
}

_BY_ERRNO: dict[int, tuple[type[StoreError], str]] = {
    errno.ENOENT: (StoreCorrupt, "Close the database and open it again: its files were deleted."),
    errno.ENOSPC: (StoreFull, _FREE_SPACE),
    errno.EDQUOT: (StoreFull, _FREE_SPACE),
    errno.EFBIG: (StoreFull, "Raise the limit on the size of a file (ulimit -f)."),
    errno.EMFILE: (StoreError, _CLOSE_FILES),
    errno.ENFILE: (StoreError, _CLOSE_FILES),
    errno.EACCES: (StoreReadOnly, "Ask the owner of the directory for write permission."),
    errno.EPERM: (StoreReadOnly, "Ask the owner of the directory for write permission."),
    errno.EROFS: (StoreReadOnly, "The filesystem is mounted read-only; use a directory elsewhere."),
    errno.ELOOP: (UnsafeLocation, "Delete the symbolic link, or give another directory."),
    errno.EAGAIN: (StoreLocked, "Another process holds the store; try again."),
    errno.EBUSY: (StoreLocked, "Another process holds the store; try again."),
}

_NEARLY_FULL_NBYTES = 1 << 20


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turn every exception of LMDB and of file operations in the block into the `StoreError` that says what to do."""
    try:
        yield
    except TimeoutError as error:
        raise lock_error(error) from None
    except (lmdb.Error, OSError) as error:
        raise as_store_error(error, path) from error
    except SystemError as error:  # the binding wraps an error of LMDB when a cursor deletes in a damaged file
        if not isinstance(error.__cause__, lmdb.Error):
            raise
        raise as_store_error(error.__cause__, path) from error


def lock_error(error: TimeoutError) -> StoreLocked:
    """Return the error for a lock that was waited for in vain."""
    return StoreLocked(str(error), hint="Try again when it is done, or end it if it hangs.")


def as_store_error(error: Exception, path: Path) -> StoreError:
    """Classify by class, then by errno: a full disk reaches LMDB's callers as EIO or a short write."""
    code = error.errno if isinstance(error, OSError) else getattr(error, "code", 0)
    kind: type[StoreError]
    if "closed/deleted" in str(error):
        kind, hint = StoreClosed, "Open the database again."
    elif "already open in this process" in str(error):
        kind, hint = StoreLocked, "Close every handle of the store that was there before, then open it again."
    elif type(error) in _BY_CLASS:
        kind, hint = _BY_CLASS[type(error)]
    elif code == errno.EIO and _is_nearly_full(path):
        kind, hint = StoreFull, _FREE_SPACE
    elif code == errno.EIO and _is_at_size_limit(path):
        kind, hint = _BY_ERRNO[errno.EFBIG]
    else:
        kind, hint = _BY_ERRNO.get(code or 0, (StoreError, "Run `backprompt-db verify` on the directory."))
    return kind(f"{path}: {error}", hint=hint)


def _is_at_size_limit(path: Path) -> bool:
    limit = max_file_nbytes()
    try:
        return limit is not None and (path / "data.mdb").stat().st_size > limit - _NEARLY_FULL_NBYTES
    except OSError:
        return False


def _is_nearly_full(path: Path) -> bool:
    try:
        return shutil.disk_usage(path if path.is_dir() else path.parent).free < _NEARLY_FULL_NBYTES
    except OSError:
        return False
