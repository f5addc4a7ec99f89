"""Who holds a lock: which processes, and what they do just now. Only the kernel of Linux tells, and not of all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from backprompt_db.system.platform import place_in_lock_table

_PROCESSES = Path("/proc")
_LOCKS = _PROCESSES / "locks"
"""The table of all locks on files that the kernel of Linux writes."""

_STOPPED = ("T", "t")
"""The states of a process that a signal or a debugger has stopped."""


class Holder(NamedTuple):
    """A process that holds a lock."""

    pid: int
    name: str
    """What it calls itself, which may be anything."""
    uid: int
    """The user that it acts as."""
    is_stopped: bool

    def __str__(self) -> str:
        return f"{self.pid} ({self.name!a}{', which is stopped' if self.is_stopped else ''})"


def holders(path: Path) -> list[Holder]:
    """Return which processes hold locks on a file or directory, of any kind, as far as the system tells."""
    try:
        place = place_in_lock_table(path.stat())
        table = _LOCKS.read_bytes().split(b"\n")
    except OSError:
        return []
    found = {pid: _process(pid) for pid in sorted(set(_pids(table, place)))}
    return [holder for holder in found.values() if holder is not None]


def _pids(table: list[bytes], place: bytes) -> Iterator[int]:
    for line in table:  # as in "1: FLOCK  ADVISORY  WRITE 708 fe:00:397 0 EOF"; those who wait have an arrow
        fields = line.split()
        if len(fields) > 5 and fields[5] == place and fields[4].isdigit():  # -1 where it is not told
            yield int(fields[4])


def is_held_by_stopped(path: Path, offset: int) -> bool:
    """Whether a process that is stopped holds a lock on a byte of a file, as far as this user may look.

    The table tells nothing about who holds locks that belong to a descriptor; each process tells about its own.
    """
    try:
        place = place_in_lock_table(path.stat())
        pids = [int(each.name) for each in _PROCESSES.iterdir() if each.name.isdigit()]
    except OSError:
        return False
    stopped = (holder.pid for holder in map(_process, pids) if holder is not None and holder.is_stopped)
    return any(_has_locked(pid, place, offset) for pid in stopped)


def _has_locked(pid: int, place: bytes, offset: int) -> bool:
    end = b" %b %d %d" % (place, offset, offset)
    try:
        descriptors = [each.read_bytes() for each in (_PROCESSES / str(pid) / "fdinfo").iterdir()]
    except OSError:
        return False
    return any(line.startswith(b"lock:") and line.endswith(end) for each in descriptors for line in each.split(b"\n"))


def _process(pid: int) -> Holder | None:
    """Return what the kernel tells of a process; None of one that is gone, or in a container that is not seen."""
    try:
        lines = (_PROCESSES / str(pid) / "status").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return None
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    try:
        uid = int(fields["Uid"].split()[1])  # the real one, the effective one and others
        return Holder(pid, fields["Name"], uid, fields["State"].startswith(_STOPPED))
    except (KeyError, IndexError, ValueError):
        return None
