"""The catalogs of a database: its own and that of the database below it, and what they remember of models.

No hit needs a catalog, and all that is in one can be found out again: what fails here is logged, and costs time.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from backprompt_db.catalog.plain_sql import timings
from backprompt_db.database.config import Limits
from backprompt_db.database.location import CATALOG
from backprompt_db.database.signatures import is_genuine, signed
from backprompt_db.errors import CatalogError
from backprompt_db.system.locks import AGAIN_SECONDS

if TYPE_CHECKING:  # a run of hits needs no SQLAlchemy
    from backprompt_db.catalog.catalog import Catalog
    from backprompt_db.catalog.records import (
        CutsRecord,
        EncodingRecord,
        GenerationRecord,
        Known,
        ModelRecord,
        Source,
        TokenizerRecord,
    )
    from backprompt_db.prompt.ids import Address, SegmentId, TokenizerId, WeightsId
    from backprompt_db.store.records import Digest

    _Recalled = TypeVar("_Recalled", ModelRecord, Source, CutsRecord, EncodingRecord)
    _Read = TypeVar("_Read")

logger = logging.getLogger(__name__)


class Catalogs:
    """The catalogs that a database may use, each of which is opened when something first needs it.

    Those that can be read come in the order in which they are asked: its own, then that of the database below.
    """

    def __init__(self, directory: Path | None, *, limits: Limits, readonly: bool, base: Path | None) -> None:
        self.readonly = readonly
        self._limits = limits
        self._directory = directory
        self._base = base
        self._own: Catalog | None = None
        self._look_at = 0.0

    @property
    def own(self) -> Catalog | None:
        """Its own; None for a database in memory, and where the catalog cannot be used, which is logged.

        One that another process holds is tried again later.
        """
        now = time.monotonic()
        if self._directory is not None and self._own is None and now >= self._look_at:
            try:
                self._own = _open(self._directory, readonly=self.readonly, mode=self._limits.modes.file)
            except CatalogError as error:
                logger.warning("working without the catalog: %s", error)
                self._look_at = now + AGAIN_SECONDS if isinstance(error.__cause__, TimeoutError) else math.inf
        return self._own

    @cached_property
    def base(self) -> Catalog | None:
        """The one of the database below, for reading; None where there is none that can be read."""
        try:
            return None if self._base is None else _open(self._base)
        except CatalogError as error:
            logger.info("working without the catalog of the base: %s", error)
            return None

    def __iter__(self) -> Iterator[Catalog]:
        return (catalog for catalog in (self.own, self.base) if catalog is not None)

    def is_continued(self, ids: Collection[SegmentId], *, besides: SegmentId) -> bool:
        """Whether a catalog lists another segment than `besides` that directly follows one of these."""
        return any(_read(catalog, lambda catalog: catalog.is_continued(ids, besides=besides)) for catalog in self)

    def timings(self, weights_id: WeightsId) -> list[tuple[float, int]]:
        """Return what the newest representations of a model took: seconds and tokens, by the first that knows any."""
        for directory in (self._directory, self._base):
            try:
                found = [] if directory is None else timings(directory / CATALOG, weights_id)
            except CatalogError as error:
                logger.info("what computations took is not known: %s", error)
                continue
            if found:
                return found
        return []

    def close(self) -> None:
        """Close those that were opened."""
        for catalog in (self._own, vars(self).get("base")):  # one that nothing needed is not opened now
            if catalog is not None:
                catalog.close()


def _open(directory: Path, *, readonly: bool = True, mode: int = 0o600) -> Catalog:
    from backprompt_db.catalog.catalog import Catalog

    return Catalog.open(directory / CATALOG, readonly=readonly, mode=mode)


class ModelMetadata:
    """What catalogs remember of models, their files, strings and prompts.

    Records are signed; those that are not, or were changed since, count as unknown. `seal` is the digest that signs.
    """

    def __init__(self, catalogs: Catalogs, *, seal: Digest) -> None:
        self._catalogs = catalogs
        self.seal = seal

    def recall(self, read: Callable[[Catalog], _Recalled | None]) -> _Recalled | None:
        """Return what `read` finds in a catalog; None where that is nothing, or cannot be read, or was changed."""
        for catalog in self._catalogs:
            found = _read(catalog, read)
            if found is not None and not _is_empty(found) and is_genuine(found, self.seal):
                return found
        return None

    def greedy_paths(self, addresses: Collection[Address]) -> dict[Address, tuple[int, ...]]:
        """Return the likeliest tokens after prompts that end with these representations, as far as they are known."""
        paths: dict[Address, tuple[int, ...]] = {}
        for catalog in reversed(list(self._catalogs)):
            found = _read(catalog, lambda catalog: catalog.greedy_paths(addresses))
            paths |= {path.address: path.token_ids for path in (found or {}).values() if is_genuine(path, self.seal)}
        return paths

    def cuts(self, keys: Collection[bytes]) -> dict[bytes, tuple[int, ...]]:
        """Return where strings are cut that have these keys, as far as that is known."""
        cuts: dict[bytes, tuple[int, ...]] = {}
        for catalog in reversed(list(self._catalogs)):
            found = _read(catalog, lambda catalog: catalog.cuts_of(keys))
            cuts |= {record.key: record.offsets for record in (found or {}).values() if is_genuine(record, self.seal)}
        return cuts

    def generations(self, keys: Collection[bytes]) -> dict[bytes, GenerationRecord]:
        """Return what was generated under these keys, as far as that is known."""
        records: dict[bytes, GenerationRecord] = {}
        for catalog in reversed(list(self._catalogs)):
            found = _read(catalog, lambda catalog: catalog.generations(keys))
            records |= {key: record for key, record in (found or {}).items() if is_genuine(record, self.seal)}
        return records

    def save(self, *records: Known) -> None:
        """Save records, all in one transaction."""
        try:
            if records and self._catalogs.own is not None and not self._catalogs.readonly:
                self._catalogs.own.save(*(signed(record, self.seal) for record in records))
        except CatalogError as error:
            logger.warning("the catalog missed a record: %s", error)

    def describe(self, tokenizer_id: TokenizerId, description: Callable[[], TokenizerRecord]) -> None:
        """Save a tokenizer's description, unless there is one. Calling `description` takes a while."""
        catalog = self._catalogs.own
        if catalog is not None and not self._catalogs.readonly:
            is_described = _read(catalog, lambda catalog: catalog.has_definition(tokenizer_id))
            if is_described is False:
                self.save(description())


def _is_empty(found: ModelRecord | Source | CutsRecord | EncodingRecord) -> bool:
    """Whether only the existence of a model is recorded: the catalog below may know more."""
    return getattr(found, "verdict", None) == "unchecked"


def _read(catalog: Catalog, read: Callable[[Catalog], _Read]) -> _Read | None:
    try:
        return read(catalog)
    except CatalogError as error:
        logger.warning("the catalog cannot be read: %s", error)
        return None
