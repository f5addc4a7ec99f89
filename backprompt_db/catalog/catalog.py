"""The catalog: what the stores hold, as rows that can be listed, searched and summed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from sqlalchemy import exists, select

from backprompt_db.catalog import migration, search
from backprompt_db.catalog.changes import Changes
from backprompt_db.catalog.columns import misfits
from backprompt_db.catalog.events import Events
from backprompt_db.catalog.eviction_order import EvictionOrder
from backprompt_db.catalog.graph import Graph
from backprompt_db.catalog.models import Models
from backprompt_db.catalog.queries import Queries
from backprompt_db.catalog.remembered import Remembered
from backprompt_db.catalog.schema import Base
from backprompt_db.errors import CatalogError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType


class Catalog(Changes, EvictionOrder, Events, Graph, Models, Queries, Remembered):
    """Metadata about what the stores hold, in one SQLite file. Each base class is one subject, in its own module.

    The file is derived: it can be deleted and rebuilt from the store. One object may be used by several threads, and
    by the children of a fork. Every method is one transaction or, where it iterates, one for each page; it raises
    `CatalogError` when the file cannot be read or written.
    """

    @classmethod
    def open(cls, path: Path, *, readonly: bool = False, mode: int = 0o600) -> Self:
        """Open the catalog at `path`, creating it with permissions `mode` or upgrading its schema where needed.

        With `readonly` nothing is ever written, and a catalog that is missing or has an older schema is a
        `CatalogError`. Raises `CatalogTooNew` for a schema that is newer than this code, and `CatalogError` for a
        file that is not a catalog.
        """
        catalog = cls(path, readonly=readonly)
        if not migration.is_current_at(path, catalog):
            if readonly:
                raise CatalogError(
                    f"the catalog {path} is missing or has an older schema, and is opened for reading only",
                    hint="Open it once for writing; that creates or upgrades it.",
                )
            migration.upgrade(path, mode=mode)
        return catalog

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def misfit_tables(self) -> list[str]:
        """Return the names of the tables in which a value does not belong in its column."""
        with self.reading() as connection:
            found = [(table, select(exists().where(misfits(table)))) for table in Base.metadata.sorted_tables]
            return [table.name for table, has_any in found if connection.execute(has_any).scalar_one()]

    def vacuum(self) -> None:
        """Rewrite the file without free pages; nothing of what was deleted remains in it."""
        with self.writing() as connection:
            search.clear_stale(connection)
        super().vacuum()

    def has_index(self) -> bool:
        """Whether somebody has made an index of the texts."""
        with self.reading() as connection:
            return search.has_index(connection)

    def index_texts(self) -> Iterator[int]:
        """Make an index of all texts, or bring it up to date, some at a time; yield how many were left before each.

        Searches find the same without it. Others may write in between, and stopping early loses nothing.
        """
        with self.writing() as connection:
            search.create_index(connection)
            num_left = search.num_unindexed(connection)
        yield num_left
        while num_left > 0:
            with self.writing() as connection:
                num_left -= search.index_some(connection) or num_left
            yield num_left
