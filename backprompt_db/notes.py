"""What catalogs remember of models, their files, strings and prompts. Best effort: it can all be found out again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, TypeVar

from backprompt_db.errors import CatalogError

if TYPE_CHECKING:
    from backprompt_db.catalog import Catalog, CutsRecord, ModelRecord, Source, TokenizerRecord
    from backprompt_db.catalog.records import Known
    from backprompt_db.files import OpenFiles
    from backprompt_db.keys import Address, TokenizerId
    from backprompt_db.sealing import Sealed
    from backprompt_db.store.digests import Digest

    _Recalled = TypeVar("_Recalled", ModelRecord, Source, CutsRecord)
    _Read = TypeVar("_Read")

logger = logging.getLogger(__name__)


class Notes:
    """Notes in the catalog of a database, read also from that of the database below it.

    With a `seal`, the keyed digest of a database with a secret, notes are signed, and those that are not are none.
    """

    def __init__(self, files: OpenFiles, *, seal: Digest | None) -> None:
        self._files = files
        self._seal = seal

    def recall(self, read: Callable[[Catalog], _Recalled | None]) -> _Recalled | None:
        """Return what `read` finds in a catalog; None where that is nothing, or cannot be read, or is forged."""
        for catalog in (self._files.catalog, self._files.base_catalog):
            found = None if catalog is None else _read(catalog, read)
            if found is not None and not _is_empty(found) and self._is_genuine(found):
                return found
        return None

    def greedy_paths(self, addresses: Collection[Address]) -> dict[Address, tuple[int, ...]]:
        """Return the likeliest tokens after prompts that end with these representations, as far as they are known."""
        paths: dict[Address, tuple[int, ...]] = {}
        for catalog in (self._files.base_catalog, self._files.catalog):
            found = None if catalog is None else _read(catalog, lambda catalog: catalog.greedy_paths(addresses))
            paths |= {path.address: path.token_ids for path in (found or {}).values() if self._is_genuine(path)}
        return paths

    def save(self, *records: Known) -> None:
        """Save notes, all in one transaction."""
        try:
            if self._files.catalog is not None and not self._files.readonly:
                self._files.catalog.save(*map(self._sealed, records))
        except CatalogError as error:
            logger.warning("the catalog missed a record: %s", error)

    def describe(self, tokenizer_id: TokenizerId, description: Callable[[], TokenizerRecord]) -> None:
        """Save what is to be said of a tokenizer, unless it was said before. Calling `description` takes a while."""
        catalog = self._files.catalog
        if catalog is not None and not self._files.readonly:
            is_described = _read(catalog, lambda catalog: catalog.has_definition(tokenizer_id))
            if is_described is False:
                self.save(description())

    def _is_genuine(self, found: Sealed) -> bool:
        if self._seal is None:
            return True
        from backprompt_db.sealing import is_genuine

        return is_genuine(found, self._seal)

    def _sealed(self, record: Known) -> Known:
        if self._seal is None:
            return record
        from backprompt_db.sealing import sealed

        return sealed(record, self._seal)


def _is_empty(found: ModelRecord | Source | CutsRecord) -> bool:
    """Whether nothing is known of a model but that there are representations: the catalog below may know more."""
    return getattr(found, "verdict", None) == "unchecked"


def _read(catalog: Catalog, read: Callable[[Catalog], _Read]) -> _Read | None:
    try:
        return read(catalog)
    except CatalogError as error:
        logger.warning("the catalog cannot be read: %s", error)
        return None
