"""The one way to read what anybody may have put there, without waiting, and the one way to write a file, as a whole."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from backprompt_db.system.platform import O_NOFOLLOW, O_NONBLOCK, set_mode, sync, sync_directory

MAX_SMALL_NBYTES = 1 << 20
"""No settings are larger than this. A sparse file of any size costs nobody anything, but to read it."""


def open_regular(path: Path, *, through_link: bool = False) -> BinaryIO:
    """Open a regular file for reading. Raises `OSError` for anything else: nobody may ever write into a pipe."""
    descriptor = os.open(path, os.O_RDONLY | O_NONBLOCK | (0 if through_link else O_NOFOLLOW))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def read_small(path: Path, *, max_nbytes: int = MAX_SMALL_NBYTES, through_link: bool = False) -> bytes:
    """Return the content of a regular file. Raises `OSError` for anything else, and for more than `max_nbytes`."""
    with open_regular(path, through_link=through_link) as file:
        content = file.read(max_nbytes + 1)
    if len(content) > max_nbytes:
        raise OSError(errno.EFBIG, f"it has more than {max_nbytes} bytes", str(path))
    return content


_OWN_MODE = 0o600
"""The mode that every temporary file has."""


@contextmanager
def replacing(path: Path, *, mode: int = _OWN_MODE) -> Iterator[BinaryIO]:
    """Give a new file to write in the block, which gets its name when all is on the disk, or never.

    It has just the permissions `mode`, and takes the place of the file or the link that has the name. Raises `OSError`,
    also where the name is that of a directory, a pipe or a device.
    """
    _require_replaceable(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            if mode != _OWN_MODE:
                set_mode(descriptor, mode)
            file.flush()
            sync(descriptor)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def replace_file(path: Path, content: str, *, mode: int = _OWN_MODE) -> None:
    """Write a text, in UTF-8, as `replacing` does."""
    with replacing(path, mode=mode) as file:
        file.write(content.encode())


def _require_replaceable(path: Path) -> None:
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise FileExistsError(errno.EEXIST, "it is there and is not a file", str(path))
