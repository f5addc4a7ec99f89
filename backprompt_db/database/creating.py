"""Making an empty database: its directory, its store and, last of all, its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.database.config import default_config, write_config
from backprompt_db.database.journal import make_journal
from backprompt_db.database.location import MANIFEST_LOCK, STORE, require_local
from backprompt_db.database.manifest import (
    KEYED,
    Manifest,
    digest_of,
    find_secret,
    read_manifest,
    secret_id,
    write_manifest,
)
from backprompt_db.errors import UnsafeLocation
from backprompt_db.store.files import Sharing, make_directory
from backprompt_db.store.lmdb import LmdbStore
from backprompt_db.store.lmdb_errors import lock_error
from backprompt_db.system.failpoints import reach
from backprompt_db.system.locks import file_lock
from backprompt_db.system.platform import give, group_number

_NO_GROUP = 2**32 - 1
"""The first number that no group can have: it asks the kernel to change nothing."""


def create_database(
    directory: Path,
    *,
    sharing: Sharing = Sharing.PRIVATE,
    group: str | None = None,
    fidelity: Fidelity = Fidelity.EXACT,
    limits: Mapping[str, Any] = MappingProxyType({}),
) -> Manifest:
    """Make an empty database and return its manifest; of several processes one does, the others take what it made.

    `group` is a group's name or number, for the ways of sharing that have one; without it, the group that the directory
    has. `limits` are fields of `Config` that differ from the default: a limit of 50 GB, or of a quarter of the free
    space if that is less. With a secret in the environment, digests are keyed with it.

    Raises `UnsafeLocation` where no database can be, or may be made by this user, `FormatError` for limits that are
    none, and `StoreLocked` when another process has been making it for too long.
    """
    require_local(directory)
    gid = None if group is None else group_id(group)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _give(directory, sharing, gid)
        with file_lock(directory / MANIFEST_LOCK, mode=sharing.modes.writers):
            return read_manifest(directory) or _make(directory, sharing, fidelity, limits)
    except TimeoutError as error:
        raise lock_error(error) from None
    except OSError as error:
        raise UnsafeLocation(
            f"no database can be made in {directory} ({error.strerror})", hint="Give a directory that you may write to."
        ) from error


def group_id(name: str) -> int:
    """Return the number of a group, given by name or number. Raises `UnsafeLocation` for an unknown one."""
    try:
        return _checked(int(name)) if name.isdecimal() else group_number(name)
    except KeyError:
        raise UnsafeLocation(f"there is no group {name!r}", hint="`getent group` lists the groups.") from None


def _checked(number: int) -> int:
    if number >= _NO_GROUP:
        raise KeyError(number)
    return number


def _give(directory: Path, sharing: Sharing, gid: int | None) -> None:
    """Give the directory to those who shall share it."""
    try:
        if gid is not None:
            give(directory, gid=gid, through_link=True)
        make_directory(directory, sharing.modes.directory)
    except PermissionError as error:
        given = f"the mode {sharing.modes.directory:04o}" + ("" if gid is None else f" and the group {gid}")
        raise UnsafeLocation(
            f"{directory} cannot be given {given}",
            hint="Only its owner may do that, for a group of which they are a member; or give a new directory.",
        ) from error


def _make(directory: Path, sharing: Sharing, fidelity: Fidelity, limits: Mapping[str, Any]) -> Manifest:
    """Make everything in the directory, the manifest last: without it, creation starts over."""
    config = replace(default_config(directory, sharing=sharing), **limits)
    secret = find_secret(directory)
    manifest = Manifest(fidelity=fidelity)
    if secret is not None:
        manifest = Manifest(fidelity=fidelity, digest=KEYED, secret_id=secret_id(secret))
    LmdbStore.create(directory / STORE, digest=digest_of(manifest, directory), modes=sharing.modes).close()
    reach("create.store")
    make_journal(directory, sharing.modes)
    write_config(directory, config)
    reach("create.manifest")
    write_manifest(directory, manifest, mode=sharing.modes.file)
    return manifest
