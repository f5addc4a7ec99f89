"""Where a database can be: on a disk of this machine, because locks and memory maps end at its edge."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from backprompt_db.errors import UnsafeLocation

MOUNTS = Path("/proc/self/mountinfo")
"""The kernel's table of what is mounted where."""

UNKNOWN = "unknown"
"""The type of a filesystem that the table does not tell, or where there is no table."""

_NETWORKS = frozenset(
    {
        "9p", "afs", "beegfs", "ceph", "cifs", "coda", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4",
        "ocfs2", "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs", "fuse.beegfs", "fuse.ceph-fuse", "fuse.cephfs",
        "fuse.davfs", "fuse.gcsfuse", "fuse.glusterfs", "fuse.juicefs", "fuse.mountpoint-s3", "fuse.rclone",
        "fuse.s3fs", "fuse.seaweedfs", "fuse.smbnetfs", "fuse.sshfs",
    }
)  # fmt: skip
_SPECIAL = re.compile(rb"[ \t\n\\]")
_SLASH = ord("/")
_PLACE = 4
"""The number of the field that says where something is mounted."""


class _Mount(NamedTuple):
    """A line of the table."""

    id: bytes
    parent_id: bytes
    place: bytes
    kind: bytes


def require_local(directory: Path) -> None:
    """Raise `UnsafeLocation` for a directory on a network filesystem, whether or not it exists yet."""
    kind = filesystem_of(directory)
    if kind in _NETWORKS:
        raise UnsafeLocation(
            f"{directory} is on a network filesystem ({kind}): locks and memory maps do not work between machines",
            hint="Keep the database on a local disk: `backprompt-db export`, `import` and `merge` carry it between "
            "machines, and `bp.open(private, base=...)` puts a local one in front of a team's.",
        )


def filesystem_of(path: Path) -> str:
    """Return the type of the filesystem that a path is on, or would be on, as the kernel calls it.

    The table is read each time: what is mounted may change while a process runs.
    """
    place = os.fsencode(os.path.realpath(path))
    # Walked as the kernel does, from mount to mount: a longer place may lie hidden below what was mounted later.
    found, mounts = None, _mounts_on_the_way(place)
    while (inner := _first_inside(found, mounts)) is not None:
        mounts.remove(inner)
        found = inner
    return UNKNOWN if found is None else found.kind.decode(errors="backslashreplace")


def _mounts_on_the_way(place: bytes) -> list[_Mount]:
    """Return what is mounted on the directories that a path goes through."""
    ways = {b"/", _escaped(place)}
    ways.update(_escaped(place[:end]) for end in range(1, len(place)) if place[end] == _SLASH)
    try:
        lines = MOUNTS.read_bytes().split(b"\n")
    except OSError:
        return []
    fields = [line.split(b" ", _PLACE + 1) for line in lines]
    return [_mount(found) for found in fields if len(found) > _PLACE + 1 and found[_PLACE] in ways]


def _mount(fields: Sequence[bytes]) -> _Mount:
    # Between the place and the type stand options, and any number of fields of which a lone dash is the end.
    _, _, kind = fields[_PLACE + 1].partition(b" - ")
    return _Mount(fields[0], fields[1], fields[_PLACE], kind.partition(b" ")[0])


def _first_inside(outer: _Mount | None, mounts: Iterable[_Mount]) -> _Mount | None:
    """Return which mount the path enters next: of those that are mounted on `outer`, the one that it meets first."""
    if outer is not None:
        inside = [mount for mount in mounts if mount.parent_id == outer.id]
    else:  # the outermost one is mounted on what this process cannot see
        ids = {mount.id for mount in mounts if mount.id != mount.parent_id}
        inside = [mount for mount in mounts if mount.parent_id not in ids]
    return min(inside, key=lambda mount: len(mount.place), default=None)


def _escaped(name: bytes) -> bytes:
    """Return a name as the table writes it."""
    return _SPECIAL.sub(lambda found: b"\\%03o" % ord(found[0]), name)
