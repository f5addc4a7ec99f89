"""What a database has open. It outlives a database that nobody holds any more until all that was put is written."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.database.counters import Tally
from backprompt_db.database.eviction import Evictor
from backprompt_db.database.writer import Storage, Writer
from backprompt_db.errors import (
    CatalogError,
)
from backprompt_db.prompt.ids import Address
from backprompt_db.store.contract import Store
from backprompt_db.store.layered import own_store

if TYPE_CHECKING:
    from backprompt_db.catalog.catalog import Catalog


logger = logging.getLogger(__name__)

_CATALOG = "catalog.sqlite"


class Resources:
    """A store, its writer, and the catalog once something needs it. Knows no `Database`, and so keeps none alive."""

    def __init__(
        self,
        store: Store,
        directory: Path | None,
        *,
        readonly: bool,
        fidelity: Fidelity,
        base: Path | None,
    ) -> None:
        self._store = store
        self.readonly = readonly
        self.uses: Counter[Address] = Counter()
        """Of representations, since they were last recorded."""
        self.tally = Tally(store)
        own = own_store(store)  # what lies below a layered one is not this database's to collect
        self.evictor = Evictor(own, lambda: self.catalog, directory=directory, tally=self.tally)
        self.storage = Storage(store, lambda: self.catalog, self.evictor, tally=self.tally)
        self.writer = Writer(self.storage, fidelity=fidelity, tally=self.tally)
        self._catalog_path = None if directory is None else directory / _CATALOG
        self._base_catalog_path = None if base is None else base / _CATALOG

    @cached_property
    def catalog(self) -> Catalog | None:
        """The catalog; None for a database in memory, and where it cannot be used, which is logged."""
        if self._catalog_path is None:
            return None
        from backprompt_db.catalog.catalog import Catalog

        try:
            return Catalog.open(self._catalog_path, readonly=self.readonly, mode=self.evictor.limits.modes.file)
        except CatalogError as error:
            logger.warning("working without the catalog: %s", error)
            return None

    @cached_property
    def base_catalog(self) -> Catalog | None:
        """The catalog of the database below, for reading; None where there is none that can be read."""
        if self._base_catalog_path is None:
            return None
        from backprompt_db.catalog.catalog import Catalog

        try:
            return Catalog.open(self._base_catalog_path, readonly=True)
        except CatalogError as error:
            logger.info("working without the catalog of the base: %s", error)
            return None

    def record_uses(self) -> None:
        """Enter the uses, and what was counted, in the catalog, best effort."""
        uses, self.uses = +self.uses, Counter()
        if self.readonly or not (uses or self.tally.has_news()) or self.catalog is None:
            return
        self.tally.record(self.catalog)
        try:
            self.catalog.touch(uses, at=time.time())
        except CatalogError as error:
            logger.warning("the catalog missed %d uses: %s", len(uses), error)

    def close(self) -> None:
        """Write what is queued, then close everything."""
        try:
            self.writer.close()
            self.record_uses()
        finally:
            for name in ("catalog", "base_catalog"):
                catalog = vars(self).get(name)  # one that nothing needed is not opened now
                if catalog is not None:
                    catalog.close()
            self._store.close()

    def close_soon(self) -> None:
        """Do what `close` does on a thread of its own, for which the interpreter's exit waits.

        For finalisers: they run at any moment in any thread, which may hold the very lock that closing waits for.
        """
        try:
            threading.Thread(target=self.close, name="backprompt-db closing").start()
        except RuntimeError:  # no more threads: the writer goes on until the interpreter's exit
            logger.warning("a database that nobody holds any more could not be closed yet: no thread can be started")
