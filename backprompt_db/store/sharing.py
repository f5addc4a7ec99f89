"""Who may use a database: permissions that are set file by file, whatever the umask."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Modes(NamedTuple):
    """Permission bits of what a database consists of."""

    directory: int
    file: int
    lock: int
    """Of files that even readers must write to: they take locks there."""


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
    Sharing.PRIVATE: Modes(directory=0o700, file=0o600, lock=0o600),
    Sharing.GROUP: Modes(directory=0o2770, file=0o660, lock=0o660),
    Sharing.READERS: Modes(directory=0o2750, file=0o640, lock=0o660),
}

PRIVATE = Sharing.PRIVATE.modes
