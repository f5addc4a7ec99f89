"""Files that anybody may have put there: read only if they are regular and of a sane size, without waiting."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from backprompt_db.system.platform import O_NOFOLLOW, O_NONBLOCK

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
