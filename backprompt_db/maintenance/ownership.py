"""Examinations of who owns the files of a database, and who may do what with them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from backprompt_db.access import Fault, faults
from backprompt_db.config import sharing_of
from backprompt_db.creation import group_id
from backprompt_db.errors import StoreReadOnly
from backprompt_db.maintenance.findings import Finding, Status, Subject, fine
from backprompt_db.store.sharing import Sharing

_NUM_SHOWN = 3


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
    sharing = sharing_of(subject.directory)
    found = list(faults(subject.directory, sharing))
    if not found:
        return fine(f"All files are as {sharing.value} sharing needs them.")
    shown = [str(fault) for fault in found[:_NUM_SHOWN]]
    more = [f"{len(found) - _NUM_SHOWN} more"] if len(found) > _NUM_SHOWN else []
    return Finding(
        Status.PROBLEM,
        f"{'; '.join(shown + more)}.",
        "Run `backprompt-db doctor --fix` as their owner, or as root: it sets owner, group and mode.",
        mend=lambda: _mend(found),
    )


def share(directory: Path, sharing: Sharing, *, group: str | None) -> None:
    """Give a database and all its files the permissions of a way of sharing, and the directory's group, or `group`.

    Raises `StoreReadOnly` where this user may not.
    """
    try:
        if group is not None:
            os.chown(directory, -1, group_id(group))
        _mend(faults(directory, sharing))
    except PermissionError as error:
        raise StoreReadOnly(
            f"{error.filename or directory} cannot be given other permissions",
            hint="Only its owner may, and only for a group of which they are a member; or root.",
        ) from error


def _mend(found: Iterable[Fault]) -> None:
    for path, status, uid, gid, mode in found:
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
