"""Making the files of a store, with explicit permissions and never through a symbolic link."""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from pathlib import Path

from backprompt_db.errors import UnsafeLocation
from backprompt_db.store.faults import store_errors
from backprompt_db.store.sharing import Modes

_WHOLE_NBYTES = 2 * mmap.PAGESIZE
"""The two meta pages that LMDB writes first."""


def create_files(directory: Path, modes: Modes) -> None:
    """Make the directory and two empty files in it, with the permissions `modes` whatever the umask.

    What an interrupted creation left is taken over. Raises `UnsafeLocation` for symbolic links.
    """
    with store_errors(directory):
        make_directory(directory, modes.directory)
        for name, mode in (("data.mdb", modes.file), ("lock.mdb", modes.lock)):
            descriptor = os.open(directory / name, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
            os.fchmod(descriptor, mode)
            if os.fstat(descriptor).st_size < _WHOLE_NBYTES:  # of the data: the disk was full, and LMDB takes no half
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
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:  # which only its owner may change
            os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)
