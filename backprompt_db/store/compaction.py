"""Compaction: a copy of the file without free pages takes its place, beside readers and writers.

The copy gets the transaction id of the old file. So `lock.mdb`, which holds the readers' slots, the last transaction id
and the writers' mutex, stays and serves the new file too. One rename replaces the file, and there is no state in
between. A new lock file would need a second rename: a process that is killed between the two would leave a file beside
the lock of another one. The mutex is held from before the copy until after the rename. Whoever waited for the mutex
looks again which file is there (`Environment`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from backprompt_db.errors import StoreFull
from backprompt_db.store.environment import Environment
from backprompt_db.store.files import DATA
from backprompt_db.store.lmdb_errors import store_errors
from backprompt_db.store.lmdb_meta import number_transactions
from backprompt_db.store.lmdb_pages import check_length, check_pages
from backprompt_db.system.failpoints import reach
from backprompt_db.system.platform import give_open, set_mode, sync, sync_directory
from backprompt_db.views.formatting import size

_PREFIX = ".compact-"


def compact(environment: Environment) -> None:
    """Replace the file by one that holds the same without free pages. Raises `StoreFull` without room for the copy."""
    directory = environment.directory
    nbytes = environment.usage().live_nbytes
    with environment.transaction(write=True) as transaction, store_errors(directory):
        remove_leftovers(directory)
        last_transaction_id = transaction.id - 1
        if not last_transaction_id:  # nothing was ever written
            return
        _check_room(directory, nbytes)
        check_pages(directory / DATA, however_many=True)  # LMDB is about to walk all of them
        scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=directory))
        try:
            environment.copy_to(scratch)
            copy = scratch / DATA
            number_transactions(copy, last_transaction_id)
            check_length(copy)
            _dress(copy, like=directory / DATA)
            reach("store.compact.copied")
            copy.replace(directory / DATA)
            sync_directory(directory)
            reach("store.compact.renamed")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed compaction has left. The caller holds the writers' mutex, so no other compaction runs."""
    for path in directory.glob(f"{_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def _check_room(directory: Path, nbytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise StoreFull(
            f"compacting {directory} needs room for a copy of {size(nbytes)}, and {size(free)} are free",
            hint="Free some space, or evict something first: `backprompt-db evict --to SIZE`.",
        )


def _dress(copy: Path, *, like: Path) -> None:
    """Give a file the owner and the permissions of another; not every user may give files away."""
    status = like.stat()
    descriptor = os.open(copy, os.O_RDWR)
    try:
        with suppress(PermissionError):
            give_open(descriptor, uid=status.st_uid)
        with suppress(PermissionError):
            give_open(descriptor, gid=status.st_gid)
        set_mode(descriptor, status.st_mode & 0o7777)
        sync(descriptor)
    finally:
        os.close(descriptor)
