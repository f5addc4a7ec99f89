"""Which revision of the schema a catalog has, and how it is brought to the newest one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from backprompt_db.catalog.connection import OPERATION, CatalogFile, catalog_errors
from backprompt_db.errors import CatalogError, CatalogTooNew
from backprompt_db.system.locks import file_lock
from backprompt_db.system.platform import set_mode

if TYPE_CHECKING:
    from sqlalchemy import Connection

HEAD = "0005"
"""The newest revision in `migrations/versions`. Revisions are numbers of four digits; a newer one is greater."""

_REVISION = re.compile("[0-9]{4}")


def revision(connection: Connection) -> str | None:
    """Return the revision of the schema; `None` for an empty file.

    Raises `CatalogError` for an SQLite file that is not a catalog.
    """
    tables = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars().all()
    if "alembic_version" in tables:
        found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        if found is None or (isinstance(found, str) and _REVISION.fullmatch(found)):
            return found
        raise CatalogError(
            f"the catalog's schema has no revision {found!r}",
            hint="Run `backprompt-db reindex`: it rebuilds the catalog from the store.",
        )
    if tables:
        raise CatalogError(
            f"an SQLite file with the tables {', '.join(sorted(tables)[:5])} is not a catalog",
            hint="Give the path of a catalog, or of a file that does not exist yet.",
        )
    return None


def is_current(connection: Connection) -> bool:
    """Return whether the schema is the newest one; raise `CatalogTooNew` when it is newer than this code."""
    found = revision(connection)
    if found is not None and found > HEAD:
        raise CatalogTooNew(
            f"the catalog's schema has revision {found}, and this version knows revisions up to {HEAD}",
            hint="Upgrade backprompt-db; until then the store works without the catalog.",
        )
    return found == HEAD


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
