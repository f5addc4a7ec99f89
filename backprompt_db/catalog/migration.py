"""How a catalog is made, and how the schema of an older one is brought to the newest revision."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from backprompt_db.catalog.connection import OPERATION, CatalogFile, catalog_errors
from backprompt_db.catalog.schema_check import HEAD, revision_of
from backprompt_db.errors import CatalogError
from backprompt_db.system.locks import file_lock
from backprompt_db.system.platform import set_mode

if TYPE_CHECKING:
    from sqlalchemy import Connection


def is_current(connection: Connection) -> bool:
    """Return whether the schema is the newest one; raise what `revision_of` raises."""
    return revision_of(lambda statement: map(tuple, connection.exec_driver_sql(statement))) == HEAD


def is_current_at(path: Path, file: CatalogFile) -> bool:
    """Return whether there is a file at `path`, and its schema is the newest one; raise what `is_current` raises."""
    with catalog_errors(path):
        if not path.exists():
            return False
    with file.reading() as connection:
        return is_current(connection)


def upgrade(path: Path, *, mode: int) -> None:
    """Create the catalog at `path` with permissions `mode`, or bring its schema to the newest revision.

    Any number of processes and threads may call this at once: one of them does the work, the others find it done.
    """
    may_group_write = mode & 0o020
    lock = file_lock(path.with_name(f"{path.name}.lock"), mode=mode if may_group_write else mode & 0o700)
    # Alembic's `context` and `op` are global: threads must take turns even with different files.
    with OPERATION, catalog_errors(path):
        # Before the lock: taking it would create a missing directory, with the permissions that the umask leaves.
        _create(path, mode=mode)
        with lock, CatalogFile(path).writing() as connection:
            connection.execution_options(statement_seconds=math.inf)  # it may take long, and is known to end
            if not is_current(connection):
                _run_migrations(connection)


def _create(path: Path, *, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    try:
        set_mode(descriptor, mode)
    finally:
        # Closing drops every lock that the process has on the file; on a new file it has none.
        os.close(descriptor)


def _run_migrations(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_environment()).replace("%", "%%"))
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise CatalogError(
            f"the catalog's schema cannot be upgraded: {error}",
            hint="Delete the file: the catalog is derived, and a reindex rebuilds it from the store.",
        ) from error


def _environment() -> Path:
    """Return the directory of the Alembic environment: in an installed package, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"
