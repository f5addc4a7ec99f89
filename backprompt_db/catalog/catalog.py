"""The catalog: what the stores hold, as rows that can be listed, searched and summed."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Self

from sqlalchemy import select

from backprompt_db.catalog import changes, migration, queries
from backprompt_db.catalog.connection import Connections, catalog_errors
from backprompt_db.catalog.records import CutsRecord, ModelRecord, Row, Source, StoredPart, TokenizerRecord, Totals
from backprompt_db.catalog.tables import Base, Cuts, Model, SourceFiles, Tokenizer
from backprompt_db.errors import CatalogError
from backprompt_db.keys import Address, SegmentId, WeightsId
from backprompt_db.representation import Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

_KEYS_PER_PAGE = 5_000


class Catalog:
    """Metadata about what the stores hold, in one SQLite file.

    The file is derived: it can be deleted and rebuilt from the store. One object may be used by several threads, and
    by the children of a fork. Every method raises `CatalogError` when the file cannot be read or written.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    @classmethod
    def open(cls, path: Path, *, readonly: bool = False, mode: int = 0o600) -> Self:
        """Open the catalog at `path`, creating it with permissions `mode` or upgrading its schema where needed.

        With `readonly` nothing is ever written, and a catalog that is missing or has an older schema is a
        `CatalogError`. Raises `CatalogTooNew` for a schema that is newer than this code, and `CatalogError` for a
        file that is not a catalog.
        """
        connections = Connections(path, readonly=readonly)
        if not _is_current(path, connections):
            if readonly:
                raise CatalogError(
                    f"the catalog {path} is missing or has an older schema, and is opened for reading only",
                    hint="Open it once for writing; that creates or upgrades it.",
                )
            migration.upgrade(path, mode=mode)
        return cls(connections)

    def close(self) -> None:
        """Refuse all further calls. Nothing is lost: every method commits before it returns."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def record(self, parts: Sequence[StoredPart], *, at: float) -> None:
        """Enter parts that are in the store by now, all or none; entering one again changes only its size.

        `at` (POSIX seconds) is when they were created, unless their representation has a row already. Its hits, pin
        and label are kept, and its compute seconds are those of its slowest part.
        """
        if parts:
            with self._connections.writing() as connection:
                changes.record(connection, parts, at=at)

    def touch(self, hits: Mapping[Address, int], *, at: float) -> None:
        """Add to the number of hits of representations that were used at `at`; unknown addresses are ignored."""
        if hits:
            with self._connections.writing() as connection:
                changes.touch(connection, hits, at=at)

    def forget(self, keys: Iterable[tuple[Address, Part]]) -> None:
        """Enter that parts have left the store; unknown ones are ignored.

        A representation without parts goes, and so do the segments that have neither a representation nor a child.
        """
        if gone := list(keys):
            with self._connections.writing() as connection:
                changes.forget(connection, gone)

    def pin(self, addresses: Iterable[Address], *, is_pinned: bool = True) -> None:
        """Set whether representations are pinned; unknown addresses are ignored."""
        with self._connections.writing() as connection:
            changes.annotate(connection, addresses, is_pinned=is_pinned)

    def label(self, addresses: Iterable[Address], label: str | None) -> None:
        """Set or, with `None`, remove the label of representations; unknown addresses are ignored."""
        with self._connections.writing() as connection:
            changes.annotate(connection, addresses, label=label)

    def save(self, record: ModelRecord | TokenizerRecord | Source | CutsRecord) -> None:
        """Save what is known of a model, a tokenizer, a model's files or a long string, over what was known before."""
        with self._connections.writing() as connection:
            changes.replace(connection, _TABLES[type(record)], asdict(record))

    def model(self, weights_id: WeightsId) -> ModelRecord | None:
        """Return one model, `None` if it is unknown.

        A model that was never saved, but has representations, is `"unchecked"` and has the name `""`.
        """
        with self._connections.reading() as connection:
            found = connection.execute(_MODELS.where(Model.weights_id == weights_id)).mappings().one_or_none()
        return None if found is None else ModelRecord(**found)

    def models(self) -> list[ModelRecord]:
        """Return all models, by name."""
        with self._connections.reading() as connection:
            found = connection.execute(_MODELS.order_by(Model.name, Model.weights_id)).mappings().all()
        return [ModelRecord(**values) for values in found]

    def tokenizers(self) -> list[TokenizerRecord]:
        """Return all tokenizers, by name; one that was never saved has the name `""`."""
        with self._connections.reading() as connection:
            found = connection.execute(_TOKENIZERS).mappings().all()
        return [TokenizerRecord(**values) for values in found]

    def source(self, key: bytes) -> Source | None:
        """Return the ids of unchanged files, `None` if they are unknown."""
        with self._connections.reading() as connection:
            statement = select(*SourceFiles.__table__.columns).where(SourceFiles.key == key)
            found = connection.execute(statement).mappings().one_or_none()
        return None if found is None else Source(**found)

    def cuts(self, key: bytes) -> tuple[int, ...] | None:
        """Return at which offsets a long string is cut, `None` if that is unknown."""
        with self._connections.reading() as connection:
            found = connection.execute(select(Cuts.offsets).where(Cuts.key == key)).scalar_one_or_none()
        return None if found is None else tuple(found)

    def totals(self) -> Totals:
        """Return the sums over all representations."""
        with self._connections.reading() as connection:
            return queries.totals(connection)

    def rows(self, *, limit: int | None = None, newest_first: bool = True) -> list[Row]:
        """Return representations in the order in which they were recorded, the last one first unless told otherwise."""
        with self._connections.reading() as connection:
            return queries.rows(connection, limit=limit, newest_first=newest_first)

    def find(self, prefix: str) -> list[Row]:
        """Return the newest 50 representations whose address or segment id begins with the hex digits `prefix`.

        Raises `PromptError` when `prefix` is not 1 to 64 hex digits.
        """
        low, high = queries.id_range(prefix)
        with self._connections.reading() as connection:
            return queries.find(connection, low, high)

    def parents(self, segment_id: SegmentId) -> tuple[SegmentId, ...]:
        """Return the ids of a segment's direct parents, ascending; they may be unknown to the catalog themselves."""
        with self._connections.reading() as connection:
            return queries.parents(connection, segment_id)

    def children(self, segment_id: SegmentId) -> tuple[SegmentId, ...]:
        """Return the ids of the segments that directly follow a segment or open a namespace, ascending."""
        with self._connections.reading() as connection:
            return queries.children(connection, segment_id)

    def keys(self) -> Iterator[tuple[Address, Part]]:
        """Iterate over every part that the catalog believes to be in the store, by address.

        No lock is held between two of them: parts that are recorded or forgotten meanwhile may appear or not.
        """
        page = [(Address(b""), list[Part]())]
        while page:
            with self._connections.reading() as connection:
                page = queries.page_of_keys(connection, after=page[-1][0], num_rows=_KEYS_PER_PAGE)
            yield from ((address, part) for address, parts in page for part in parts)


_TABLES: dict[type, type[Base]] = {
    ModelRecord: Model,
    TokenizerRecord: Tokenizer,
    Source: SourceFiles,
    CutsRecord: Cuts,
}
_MODELS = select(*Model.__table__.columns)
_TOKENIZERS = select(*Tokenizer.__table__.columns).order_by(Tokenizer.name, Tokenizer.tokenizer_id)


def _is_current(path: Path, connections: Connections) -> bool:
    with catalog_errors(path):
        if not path.exists():
            return False
    with connections.reading() as connection:
        return migration.is_current(connection)
