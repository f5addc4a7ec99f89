"""What differs between operating systems. Everything else asks this module, and never which system it runs on.

| | Linux | macOS | Windows |
|---|---|---|---|
| databases in a directory | yes | yes | no: `require_directories` raises |
| databases in memory | yes | yes | yes |
| locks between processes, owners and modes of files, hooks at a fork | yes | yes | no |
| locks on single bytes, so that one process waits for what another one computes | yes | where Python knows them | no |
| the types of filesystems | from the kernel's table of mounts | from psutil's list of mounts | unknown |
| room for LMDB's lock file is reserved, the writer's thread steps back | yes | no | no |

On Linux and macOS a missing ability costs what it was for, and nothing else. On Windows, every function that a database
in a directory needs raises the `UnsafeLocation` of `require_directories`.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from backprompt_db.errors import UnsafeLocation

HAS_DIRECTORIES = sys.platform != "win32"
"""Whether a database can be in a directory."""


def require_directories(directory: Path) -> None:
    """Raise `UnsafeLocation` on a system on which no database can be in a directory."""
    if not HAS_DIRECTORIES:
        raise _no_directories(str(directory))


def _no_directories(what: str) -> UnsafeLocation:
    return UnsafeLocation(
        f"{what} needs locks and permissions that this system ({sys.platform}) does not have",
        hint='Use Linux or macOS, or the Windows Subsystem for Linux; `bp.open(":memory:")` works here too.',
    )


if sys.platform == "win32":
    O_DIRECTORY = O_NOFOLLOW = O_NONBLOCK = 0

    def _refuse(*_: object, **__: object) -> Any:
        raise _no_directories("a database in a directory")

    def register_at_fork(**_: Callable[[], object]) -> None:
        """Do nothing: no process is ever forked here."""

    def end_process() -> None:
        """End this process at once, without any cleaning up."""
        os.kill(os.getpid(), signal.SIGTERM)

    stop_process = lock_file = unlock_file = try_lock_byte = unlock_bytes = _refuse
    set_mode = change_mode = give = give_open = _refuse
    user_id = group_ids = user_name = group_name = group_number = group_members = _refuse

    is_byte_locked: Callable[..., bool] = _refuse
    place_in_lock_table: Callable[[os.stat_result], bytes] = _refuse
    is_mounted_readonly: Callable[[Path], bool] = _refuse

    HAS_BYTE_LOCKS = False

    read_at: Callable[[int, int, int], bytes] = _refuse

    def sync(descriptor: int) -> None:
        """Wait until what was written to an open file will outlast a power failure."""
        os.fsync(descriptor)

    def sync_directory(directory: Path) -> None:
        """Do nothing: names need no waiting for here."""

    def max_file_nbytes() -> int | None:
        """Return None: there is no limit on the size of a file."""
        return None
else:
    import fcntl
    import grp
    import pwd
    import resource
    import struct

    O_DIRECTORY, O_NOFOLLOW, O_NONBLOCK = os.O_DIRECTORY, os.O_NOFOLLOW, os.O_NONBLOCK
    """Flags of `os.open`. Python's own descriptors are never inherited, so that it needs no `O_CLOEXEC`."""

    def register_at_fork(**hooks: Callable[[], object]) -> None:
        """Have functions called at each fork, as `os.register_at_fork` does."""
        os.register_at_fork(**hooks)

    def end_process() -> None:
        """End this process at once, without any cleaning up."""
        os.kill(os.getpid(), signal.SIGKILL)

    def stop_process() -> None:
        """Stop this process, as a debugger does."""
        os.kill(os.getpid(), signal.SIGSTOP)

    def lock_file(descriptor: int, *, shared: bool, wait: bool = True) -> None:
        """Lock an open file or directory. Raises `BlockingIOError` for one that is locked when it shall not `wait`."""
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)

    def unlock_file(descriptor: int) -> None:
        """Unlock it, also in children that were forked meanwhile: they have the descriptor too."""
        fcntl.flock(descriptor, fcntl.LOCK_UN)

    HAS_BYTE_LOCKS = hasattr(fcntl, "F_OFD_SETLK")
    """Whether there are locks on single bytes of a file that belong to a descriptor and not to the process."""

    _IS_START_FIRST: bool = sys.platform == "darwin"
    _FLOCK = struct.Struct("qqihh" if _IS_START_FIRST else "hhqqi4x")
    """`struct flock`: start, length, pid, type, whence on macOS; type, whence, start, length, pid on Linux."""

    def _flock(kind: int, offset: int, nbytes: int) -> bytes:
        fields = (offset, nbytes, 0, kind, os.SEEK_SET)
        return _FLOCK.pack(*(fields if _IS_START_FIRST else (*fields[3:], *fields[:3])))

    def try_lock_byte(descriptor: int, offset: int) -> None:
        """Lock one byte for writing. Raises an `OSError` with EAGAIN or EACCES when somebody else holds it."""
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, offset, 1))

    def unlock_bytes(descriptor: int, offset: int, nbytes: int) -> None:
        """Unlock bytes; 0 of them are all from the offset on."""
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, offset, nbytes))

    def is_byte_locked(descriptor: int, offset: int, *, is_alone: bool = False) -> bool:
        """Whether another process has locked a byte, for reading or writing; only for writing if `is_alone`."""
        ask = fcntl.F_OFD_GETLK if HAS_BYTE_LOCKS else fcntl.F_GETLK
        wish = fcntl.F_RDLCK if is_alone else fcntl.F_WRLCK
        found = _FLOCK.unpack(fcntl.fcntl(descriptor, ask, _flock(wish, offset, 1)))
        kind: int = found[3 if _IS_START_FIRST else 0]
        return kind != fcntl.F_UNLCK

    def place_in_lock_table(status: os.stat_result) -> bytes:
        """Return how the kernel of Linux names a file in its table of locks."""
        return b"%02x:%02x:%d" % (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)

    read_at = os.pread
    """Return so many bytes of an open file from a position on, fewer at its end, whoever else reads it."""

    def set_mode(descriptor: int, mode: int) -> None:
        """Give an open file or directory its permission bits, whatever the umask."""
        os.fchmod(descriptor, mode)

    def change_mode(path: Path, mode: int) -> None:
        """Give a path its permission bits, and never what a symbolic link leads to.

        The file is not opened as others are: closing it would give up the locks that this process has on it.
        """
        if sys.platform == "linux":
            descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW)
            try:
                Path(f"/proc/self/fd/{descriptor}").chmod(mode)
            finally:
                os.close(descriptor)
        else:
            path.chmod(mode, follow_symlinks=False)

    def give(path: Path, *, uid: int = -1, gid: int = -1, through_link: bool = False) -> None:
        """Give a path to an owner and a group; -1 leaves who has it. Symbolic links are followed on demand only."""
        os.chown(path, uid, gid, follow_symlinks=through_link)

    def give_open(descriptor: int, *, uid: int = -1, gid: int = -1) -> None:
        """Give an open file to an owner and a group; -1 leaves who has it."""
        os.fchown(descriptor, uid, gid)

    def sync(descriptor: int) -> None:
        """Wait until what was written to an open file, or the names in a directory, will outlast a power failure."""
        if sys.platform == "darwin":  # where fsync does not wait for the disk's own cache
            with suppress(OSError):  # some filesystems cannot
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
                return
        os.fsync(descriptor)

    def sync_directory(directory: Path) -> None:
        """Wait until the names in a directory are on the disk: which files there are, and what was renamed."""
        descriptor = os.open(directory, os.O_RDONLY | O_DIRECTORY)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)

    def user_id() -> int:
        """Return the number of the user that this process acts as; 0 is root."""
        return os.geteuid()

    def group_ids() -> frozenset[int]:
        """Return the numbers of the groups that this process acts as a member of. macOS may not list all of them."""
        return frozenset([os.getegid(), *os.getgroups()])

    def user_name(uid: int) -> str:
        """Return the name of a user, or the number of one without a name."""
        try:
            return pwd.getpwuid(uid).pw_name
        except KeyError:
            return str(uid)

    def group_name(gid: int) -> str:
        """Return the name of a group, or the number of one without a name."""
        try:
            return grp.getgrgid(gid).gr_name
        except KeyError:
            return str(gid)

    def group_number(name: str) -> int:
        """Return the number of a group. Raises `KeyError` for an unknown name."""
        return grp.getgrnam(name).gr_gid

    def group_members(gid: int) -> list[str]:
        """Return the names of a group's members that the system lists, those whose own group it is included."""
        own = [user.pw_name for user in pwd.getpwall() if user.pw_gid == gid]
        try:
            others = grp.getgrgid(gid).gr_mem
        except KeyError:
            others = []
        return sorted({*own, *others})

    def is_mounted_readonly(path: Path) -> bool:
        """Whether a path is on a filesystem that nobody can write to, whatever the modes."""
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)

    def max_file_nbytes() -> int | None:
        """Return how large a file of this process may become (`ulimit -f`); None without a limit."""
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        return None if limit == resource.RLIM_INFINITY else limit


def reserve(descriptor: int, nbytes: int) -> None:
    """Give the beginning of a file its room on the disk, where the system can. Raises `OSError` without room."""
    if sys.platform == "linux":
        os.posix_fallocate(descriptor, 0, nbytes)


def step_back(niceness: int) -> None:
    """Let this thread wait for others with a higher priority, where priorities belong to threads."""
    if sys.platform == "linux":
        with suppress(OSError):  # sandboxes may forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def room_nbytes(status: os.stat_result) -> int:
    """Return how much room a file takes on the disk: less than its size where it has holes."""
    num_blocks: int | None = getattr(status, "st_blocks", None)
    return status.st_size if num_blocks is None else num_blocks * 512


MOUNTS = Path("/proc/self/mountinfo")
"""The table of what is mounted where, which the kernel of Linux writes."""

UNKNOWN = "unknown"
"""The type of a filesystem that no table tells."""

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


def filesystem_of(path: Path) -> str:
    """Return the type of the filesystem that a path is on, or would be on, as the system calls it, or `UNKNOWN`.

    The table is read each time: what is mounted may change while a process runs.
    """
    place = os.path.realpath(path)
    if sys.platform == "darwin":
        kind = _listed_filesystem(place)
    else:
        kind = _mounted_filesystem(os.fsencode(place))
    return kind or UNKNOWN


def _listed_filesystem(place: str) -> str | None:
    """Return the type of what was mounted last on the nearest directory above a path, by psutil's list."""
    import psutil

    try:
        listed = psutil.disk_partitions(all=True)
    except (OSError, psutil.Error):
        return None
    above = [each for each in listed if Path(place).is_relative_to(each.mountpoint)]
    nearest = max((len(each.mountpoint) for each in above), default=0)
    return next((each.fstype for each in reversed(above) if len(each.mountpoint) == nearest), None)


def _mounted_filesystem(place: bytes) -> str | None:
    """Return the type of what a path is on, by the kernel's table.

    Walked as the kernel does, from mount to mount: a longer place may lie hidden below what was mounted later.
    """
    found, mounts = None, _mounts_on_the_way(place)
    while (inner := _first_inside(found, mounts)) is not None:
        mounts.remove(inner)
        found = inner
    return None if found is None else found.kind.decode(errors="backslashreplace")


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
