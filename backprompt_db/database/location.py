"""The files of a database: their names, who may use them, and on which filesystems they can be."""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from backprompt_db.errors import StoreReadOnly, UnsafeLocation
from backprompt_db.store.files import DATA, READER_TABLE, Modes, Sharing
from backprompt_db.system.platform import (
    filesystem_of,
    group_ids,
    group_name,
    is_mounted_readonly,
    require_directories,
    user_id,
    user_name,
)

MANIFEST = "manifest.json"
"""What the database is. It is written last: a directory without it is none."""
CONFIG = "config.json"
"""What may be changed about it."""
CACHE_TAG = "CACHEDIR.TAG"
"""Tells backup programs that everything here can be computed again."""
CATALOG = "catalog.sqlite"
STORE = "store"
"""The directory of the store."""
JOURNAL = "pending"
"""The directory of the write journal."""

MANIFEST_LOCK = "manifest.lock"
"""Held alone while a database is made."""
FLIGHTS_LOCK = "flights.lock"
"""A byte for each representation that a process computes (`SingleFlight`)."""
WRITING_LOCK, TURNSTILE_LOCK = "writing.lock", "turnstile.lock"
"""Shared while a group of parts is written; held alone while one is removed (`WriteJournal`)."""
EVICTION_LOCK = "collect.lock"
"""Held alone while room is made (`Evictor`)."""
REINDEX_LOCK = "reindex.lock"

_FOLDERS = frozenset({STORE, JOURNAL})
_NAMES = (MANIFEST, CONFIG, CACHE_TAG, CATALOG, DATA, READER_TABLE)
"""How the names of the files begin that the library makes; its other locks end with `.lock`."""

_NEEDED_TO_READ = frozenset({MANIFEST, CONFIG, STORE, DATA})
_OWN_FILES = frozenset({DATA, READER_TABLE, CATALOG})
"""The files that are changed in place."""
_OTHERS = 0o077
"""The permission bits of those who are not the owner."""
_MOMENT_SECONDS = 0.01
"""How long a file that another process makes may be without its mode, and longer."""

_PROMISES = {
    Sharing.PRIVATE: "the database is private, and its owner reads and writes all of it",
    Sharing.GROUP: "the members of the group {group} share the database, and read and write all of it",
    Sharing.READERS: "the owner of the database writes it, and the members of the group {group} read it",
}


class Fault(NamedTuple):
    """A file that is not as it should be."""

    path: Path
    status: os.stat_result
    uid: int
    gid: int
    mode: int
    """What should be."""

    def __str__(self) -> str:
        is_ = self.status
        return (
            f"{self.path} is {_owners(is_.st_uid, is_.st_gid)} {stat.S_IMODE(is_.st_mode):04o} "
            f"instead of {_owners(self.uid, self.gid)} {self.mode:04o}"
        )

    @property
    def remedy(self) -> str:
        """The commands that mend it, and who may run them."""
        is_, name = self.status, shlex.quote(str(self.path))
        is_given, is_moved = is_.st_uid != self.uid, is_.st_gid != self.gid
        commands = []
        if is_given:
            commands.append(f"chown {_owners(self.uid, self.gid)} {name}")
        elif is_moved:
            commands.append(f"chgrp {group_name(self.gid)} {name}")
        if is_given or stat.S_IMODE(is_.st_mode) != self.mode:  # a new owner costs the setgid bit
            commands.append(f"chmod {self.mode:o} {name}")
        who = "root" if is_given or not is_.st_uid else f"{user_name(is_.st_uid)} or root"
        return f"`{' && '.join(commands)}` as {who}"


class _File(NamedTuple):
    """A directory or a file with one of our names, or a symbolic link in its place."""

    path: str
    name: str
    status: os.stat_result

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)

    @property
    def is_ours(self) -> bool:
        """Whether it is what the library makes under this name. The name of the directory itself is empty."""
        return self.is_folder if self.name in ("", *_FOLDERS) else stat.S_ISREG(self.status.st_mode)


def faults(directory: Path, sharing: Sharing) -> Iterator[Fault]:
    """Yield which directories and files have another owner, group or mode than the way of sharing asks for."""
    return _faults(_files(directory), sharing)


def wide_files(directory: Path, sharing: Sharing) -> list[Fault]:
    """Return what more people may use than the way of sharing says, as far as this user may look."""
    found = _faults(_visible_files(directory), sharing)
    return [fault for fault in found if stat.S_IMODE(fault.status.st_mode) & ~fault.mode & _OTHERS]


def access_problem(directory: Path, sharing: Sharing, *, readonly: bool) -> StoreReadOnly | UnsafeLocation | None:
    """Return what makes a database unsafe to open, or keeps this user from what its way of sharing promises; or None.

    `UnsafeLocation` for a directory in which everybody may replace files, and for a symbolic link, a pipe or a device
    in the place of a file; unless `readonly`, also for a database of somebody else who does not share it and lets
    this user write. `StoreReadOnly` for a file that this user cannot use and should be able to, with what mends
    it; with `readonly`, only what is needed to read counts. Nothing is promised to those who are neither owner nor
    member. Unless `readonly`, `StoreReadOnly` also for files that belong to another directory as well.
    """
    files = _visible_files(directory)
    danger = next(filter(None, map(_danger, files)), None)
    if danger is not None or not files:
        return danger
    trap = None if readonly else _trap(files, sharing)
    if trap is not None:
        return trap
    if _obstacle(files, sharing, readonly=readonly) is None:
        return None if readonly else _tie(files)
    time.sleep(_MOMENT_SECONDS)
    return _obstacle(_visible_files(directory), sharing, readonly=readonly)


def _tie(files: list[_File]) -> StoreReadOnly | None:
    """Return what says that another directory has the same file, so that writing here changes it there; or None.

    Once either is compacted, both have other data and the same lock file, and what one writes the other overwrites.
    """
    own = (file for file in files if file.name in _OWN_FILES and stat.S_ISREG(file.status.st_mode))
    tied = next((file for file in own if file.status.st_nlink > 1), None)
    if tied is None:
        return None
    return StoreReadOnly(
        f"{tied.path} is a hard link to a file that another directory has too, and writing to either damages the other",
        hint="Copy the directory with `cp -a`, which makes files of its own, use the copy, and delete this one.",
    )


def _danger(file: _File) -> UnsafeLocation | None:
    """Return what would let strangers have us write where they like, or wait; or None."""
    mode = stat.S_IMODE(file.status.st_mode)
    if stat.S_ISLNK(file.status.st_mode):
        return UnsafeLocation(
            f"{file.path} is a symbolic link, and the library never makes one",
            hint="Find out who made it and why, and delete it; the directory of a database itself may be a link.",
        )
    if not (file.is_folder or stat.S_ISREG(file.status.st_mode)):
        return UnsafeLocation(
            f"{file.path} is neither a file nor a directory, and who opens it may wait for ever",
            hint="Find out who made it and why, and delete it.",
        )
    if file.is_folder and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return UnsafeLocation(
            f"everybody may replace what is in {file.path} (mode {mode:04o})",
            hint=f"Run `chmod o-w {shlex.quote(file.path)}` as {user_name(file.status.st_uid)} or root.",
        )
    return None


def _trap(files: list[_File], sharing: Sharing) -> UnsafeLocation | None:
    """Return what would have this user's prompts written into the database of somebody who does not share it; or None.

    Whoever waits for prompts of others makes a database of which the files let everybody write.
    """
    directory, _, root = files[0]
    if _is_owner(root) or _is_member(root, sharing):
        return None
    if not any(file.name == DATA and os.access(file.path, os.W_OK) for file in files):
        return None
    return UnsafeLocation(
        f"{directory} belongs to {user_name(root.st_uid)} and is not shared with {user_name(user_id())}, and yet its "
        "files let you write",
        hint='Give another directory, or open it with mode="r"; its owner shares it with `backprompt-db config '
        "--shared group:NAME`.",
    )


def _is_owner(root: os.stat_result) -> bool:
    return user_id() in (0, root.st_uid)


def _is_member(root: os.stat_result, sharing: Sharing) -> bool:
    return sharing is not Sharing.PRIVATE and root.st_gid in group_ids()


def _obstacle(files: list[_File], sharing: Sharing, *, readonly: bool) -> StoreReadOnly | None:
    """Return the first file that is not as it should be and that this user cannot use for that reason."""
    directory, _, root = files[0]
    is_owner = _is_owner(root)
    if not is_owner and not _is_member(root, sharing):
        return None
    is_writer = not readonly and (is_owner or sharing is Sharing.GROUP)
    for fault in _faults(files, sharing):
        name = fault.path.name
        is_needed = not readonly or name in _NEEDED_TO_READ or fault.status is root
        if is_needed and not _is_usable(fault, write=is_writer or (name == READER_TABLE and not readonly)):
            return _unusable(fault, directory, _PROMISES[sharing].format(group=group_name(root.st_gid)))
    return None


def _faults(files: Iterable[_File], sharing: Sharing) -> Iterator[Fault]:
    root = None
    for file in files:
        status = file.status
        root = root or status
        uid = status.st_uid if sharing is Sharing.GROUP else root.st_uid
        gid = status.st_gid if sharing is Sharing.PRIVATE else root.st_gid
        mode = _mode(file, sharing.modes)
        if file.is_ours and (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) != (uid, gid, mode):
            yield Fault(Path(file.path), status, uid, gid, mode)


def _is_usable(fault: Fault, *, write: bool) -> bool:
    path = fault.path
    needed = os.R_OK | (os.X_OK if stat.S_ISDIR(fault.status.st_mode) else 0)
    if os.access(path, needed | (os.W_OK if write else 0)):
        return True
    # Nobody can write on a read-only filesystem, whatever the mode; and a journal may be gone.
    is_readonly = write and is_mounted_readonly(path) and os.access(path, needed)
    return is_readonly or not os.path.lexists(path)


def _unusable(fault: Fault, directory: str, promise: str) -> StoreReadOnly:
    is_, doctor = fault.status, f"`backprompt-db doctor --fix --db {shlex.quote(directory)}`"
    return StoreReadOnly(
        f"{fault.path} belongs to {_owners(is_.st_uid, is_.st_gid)} with mode {stat.S_IMODE(is_.st_mode):04o}, "
        f"and you are {user_name(user_id())}: {promise}",
        hint=f"Run {fault.remedy}; {doctor} mends all such files.",
    )


def _files(directory: Path) -> Iterator[_File]:
    """Yield the directory, then what has one of our names in it and in its store. Links are not followed."""
    yield _File(str(directory), "", directory.stat())
    yield from _known(directory)
    if not (directory / STORE).is_symlink():
        yield from _known(directory / STORE)


def _known(folder: Path) -> Iterator[_File]:
    with os.scandir(folder) as entries:
        known = [entry for entry in entries if _is_known(entry.name)]
    for entry in sorted(known, key=lambda entry: entry.name):
        with contextlib.suppress(FileNotFoundError):  # a journal that is gone by now
            yield _File(entry.path, entry.name, entry.stat(follow_symlinks=False))


def _is_known(name: str) -> bool:
    return name in _FOLDERS or name.startswith(_NAMES) or name.endswith(".lock")


def _visible_files(directory: Path) -> list[_File]:
    """Return as many of these files as this user may look at."""
    files: list[_File] = []
    with contextlib.suppress(OSError):
        files.extend(_files(directory))  # and keeps what came before an error
    return files


def _mode(file: _File, modes: Modes) -> int:
    if file.is_folder:
        return modes.directory
    if file.name == READER_TABLE:
        return modes.lock
    return modes.writers if file.name.endswith(".lock") else modes.file


def _owners(uid: int, gid: int) -> str:
    return f"{user_name(uid)}:{group_name(gid)}"


_NETWORKS = frozenset(
    {
        "9p", "afpfs", "afs", "beegfs", "ceph", "cifs", "coda", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs",
        "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs", "webdav", "fuse.beegfs",
        "fuse.ceph-fuse", "fuse.cephfs", "fuse.davfs", "fuse.gcsfuse", "fuse.glusterfs", "fuse.juicefs",
        "fuse.mountpoint-s3", "fuse.rclone", "fuse.s3fs", "fuse.seaweedfs", "fuse.smbnetfs", "fuse.sshfs",
    }
)  # fmt: skip


def require_local(directory: Path) -> None:
    """Raise `UnsafeLocation` for a directory on a network filesystem, whether or not it exists yet.

    Where the system does not say which filesystem it is, the directory is taken for local. On a system on which no
    database can be in a directory, every directory is refused.
    """
    require_directories(directory)
    kind = filesystem_of(directory)
    if kind in _NETWORKS:
        raise UnsafeLocation(
            f"{directory} is on a network filesystem ({kind}): locks and memory maps do not work between machines",
            hint="Keep the database on a local disk: `backprompt-db export`, `import` and `merge` carry it between "
            "machines, and `bp.open(private, base=...)` puts a local one in front of a team's.",
        )
