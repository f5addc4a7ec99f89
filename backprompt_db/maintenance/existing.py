"""Opening what is in a database directory, and never making a directory that is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backprompt_db.errors import CatalogError, UnsafeLocation
from backprompt_db.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from backprompt_db.catalog import Catalog
    from backprompt_db.database import Database
    from backprompt_db.store.lmdb import LmdbStore

STORE = "store"
CATALOG = "catalog.sqlite"


def manifest_of(directory: Path) -> Manifest:
    """Return the manifest of the database in `directory`; raises `UnsafeLocation` where there is none."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise UnsafeLocation(
            f"there is no database in {directory}",
            hint="Give another directory with --db, or run a prompt there: that makes one.",
        )
    return manifest


def open_existing(directory: Path) -> Database:
    """Open the database in `directory`; raises `UnsafeLocation` where there is none."""
    from backprompt_db.opening import open_database

    manifest_of(directory)
    return open_database(directory)


def open_store(directory: Path) -> LmdbStore:
    """Open the store of the database in `directory` for reading; damaged parts are counted and stay where they are."""
    from backprompt_db.secret import digest_of
    from backprompt_db.store.lmdb import LmdbStore

    manifest = manifest_of(directory)
    return LmdbStore(directory / STORE, readonly=True, digest=digest_of(manifest, directory))


def open_catalog(directory: Path) -> Catalog:
    """Open the catalog of the database in `directory` for reading.

    Raises `CatalogError` for one that is missing, damaged or of an older schema; `reindex` mends each of these.
    """
    from backprompt_db.catalog import Catalog

    manifest_of(directory)
    path = directory / CATALOG
    if not path.exists():
        raise CatalogError(
            f"the catalog {path} is missing",
            hint="Run `backprompt-db reindex`: it rebuilds the catalog from the store.",
        )
    return Catalog.open(path, readonly=True)
