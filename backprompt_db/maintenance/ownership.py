"""Examinations of who owns the files of a database, and who may do what with them."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from backprompt_db.maintenance.findings import Finding, Status, Subject, fine
from backprompt_db.store.sharing import Modes, Sharing

_NUM_SHOWN = 3
_NAMES = ("manifest.json", "config.json", "CACHEDIR.TAG", "catalog.sqlite", "data.mdb")


class _Fault(NamedTuple):
    """A file that is not as it should be."""

    path: Path
    status: os.stat_result
    uid: int
    gid: int
    mode: int
    """What should be."""

    def __str__(self) -> str:
        is_, shall = self.status, (self.uid, self.gid, self.mode)
        return (
            f"{self.path} is {_described(is_.st_uid, is_.st_gid, stat.S_IMODE(is_.st_mode))} "
            f"instead of {_described(*shall)}"
        )


def directory(subject: Subject) -> Finding:
    """Whether strangers can put files into the directory."""
    mode = stat.S_IMODE(subject.directory.stat().st_mode)
    if not mode & stat.S_IWOTH:
        return fine(f"{subject.directory} has the mode {mode:04o}.")
    is_sticky = bool(mode & stat.S_ISVTX)
    return Finding(
        Status.WARNING if is_sticky else Status.PROBLEM,
        f"Everybody may put files into {subject.directory} ({mode:04o})"
        + ("." if is_sticky else ", and delete or replace those of others."),
        f"Run `chmod o-w {subject.directory}`.",
        mend=lambda: _chmod(subject.directory, mode & ~stat.S_IWOTH),
    )


def permissions(subject: Subject) -> Finding:
    """Whether every file has the owner, the group and the mode that the way of sharing asks for."""
    sharing = sharing_of(subject)
    faults = list(_faults(subject.directory, sharing))
    if not faults:
        return fine(f"All files are as {sharing.value} sharing needs them.")
    shown = [str(fault) for fault in faults[:_NUM_SHOWN]]
    more = [f"{len(faults) - _NUM_SHOWN} more"] if len(faults) > _NUM_SHOWN else []
    return Finding(
        Status.PROBLEM,
        f"{'; '.join(shown + more)}.",
        "Run `backprompt-db doctor --fix` as their owner, or as root: it sets owner, group and mode.",
        mend=lambda: _mend(faults),
    )


def sharing_of(subject: Subject) -> Sharing:
    """Return how the database is shared."""
    return Sharing(getattr(subject.manifest, "sharing", Sharing.PRIVATE))


def _faults(directory: Path, sharing: Sharing) -> Iterator[_Fault]:
    root = directory.stat()
    for path in _ours(directory):
        with contextlib.suppress(FileNotFoundError):  # a journal that is gone by now
            status = path.lstat()
            fault = _Fault(
                path,
                status,
                uid=status.st_uid if sharing is Sharing.GROUP else root.st_uid,
                gid=status.st_gid if sharing is Sharing.PRIVATE else root.st_gid,
                mode=_mode(path, status, sharing.modes),
            )
            if (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) != fault[2:]:
                yield fault


def _ours(directory: Path) -> Iterator[Path]:
    """Yield the directories and files that the library makes. Symbolic links are none of them."""
    for folder in (directory, directory / "store"):
        yield folder
        for path in sorted(folder.iterdir()):
            is_known = path.suffix == ".lock" or path.name.startswith((*_NAMES, "lock.mdb"))
            if is_known and path.is_file() and not path.is_symlink():
                yield path


def _mode(path: Path, status: os.stat_result, modes: Modes) -> int:
    if stat.S_ISDIR(status.st_mode):
        return modes.directory
    return modes.lock if path.suffix == ".lock" or path.name == "lock.mdb" else modes.file


def _mend(faults: Iterable[_Fault]) -> None:
    for path, status, uid, gid, mode in faults:
        if (status.st_uid, status.st_gid) != (uid, gid):
            os.chown(path, uid, gid, follow_symlinks=False)
        _chmod(path, mode)  # after: a new owner costs the setgid bit


def _chmod(path: Path, mode: int) -> None:
    # Not by opening it as other files: closing that would give up the locks that this process has on it.
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        Path(f"/proc/self/fd/{descriptor}").chmod(mode)
    finally:
        os.close(descriptor)


def _described(uid: int, gid: int, mode: int) -> str:
    return f"{_user(uid)}:{_group(gid)} {mode:04o}"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
