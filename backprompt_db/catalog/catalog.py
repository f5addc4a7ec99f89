"""The catalog: what the stores hold, as rows that can be listed, searched and summed."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Self

from backprompt_db.catalog import changes, events, graph, migration, models, pages, queries, search
from backprompt_db.catalog.connection import Connections
from backprompt_db.catalog.eviction_order import Choice, choose_victims, removable
from backprompt_db.catalog.records import (
    CutsRecord,
    Event,
    GreedyPath,
    GroupTotals,
    Known,
    ModelRecord,
    Order,
    Row,
    Selection,
    Source,
    StoredPart,
    TokenizerRecord,
    Totals,
    Victim,
)
from backprompt_db.catalog.schema import Sums
from backprompt_db.catalog.selection import conditions, conditions_but_searches, searched_segments
from backprompt_db.errors import CatalogError
from backprompt_db.prompt.ids import Address, SegmentId, TokenizerId, WeightsId
from backprompt_db.prompt.representation import Part
from backprompt_db.system.failpoints import reach

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from backprompt_db.prompt.segments import Segment


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
        if not migration.is_current_at(path, connections):
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

    def evict(self, keys: Iterable[tuple[Address, Part]], *, at: float) -> None:
        """Enter that parts were evicted from the store: what `forget` does, and when it was."""
        if gone := list(keys):
            with self._connections.writing() as connection:
                changes.forget(connection, gone)
                reach("catalog.evict.inside")
                events.remember_evictions(connection, {address for address, _ in gone}, at=at)

    def erase(self, keys: Iterable[tuple[Address, Part]]) -> None:
        """Forget parts that have left the store, and that there was anything under their addresses."""
        if gone := list(keys):
            addresses = {address for address, _ in gone}
            with self._connections.writing() as connection:
                models.forget_greedy_paths(connection, addresses)  # while what they follow is known
                changes.forget(connection, gone)
                search.clear(connection)
                events.forget_evictions(connection, addresses)

    def evicted_at(self, address: Address) -> float | None:
        """Return when something of a representation was evicted the last time, `None` if that is not known."""
        return self.evictions([address]).get(address)

    def evictions(self, addresses: Iterable[Address]) -> dict[Address, float]:
        """Return what `evicted_at` returns, of those of many representations of which it is known."""
        with self._connections.reading() as connection:
            return events.evictions(connection, addresses)

    def victims(
        self,
        nbytes: int,
        *,
        at: float,
        grace_seconds: float,
        ttl_seconds: float | None = None,
        selection: Selection | None = None,
        limit: int = 10_000,
    ) -> list[Victim]:
        """Return what may go: all that is expired, then the least valuable parts until their sizes sum to `nbytes`.

        With `nbytes=0` only what is expired: what was not used for longer than `ttl_seconds`. A part's value is the
        seconds that computing it took, per byte, and falls with the time since it was used. Parts that were used within
        `grace_seconds` come last, pinned ones never, and keys and values only when no following segment has any: those
        before them become victims of a later call. `selection` restricts the choice; it raises what `select` raises.
        """
        choice = Choice(at=at, grace_seconds=grace_seconds, ttl_seconds=ttl_seconds, limit=limit)
        with self._connections.reading() as connection:
            return choose_victims(connection, nbytes, choice, among=conditions(connection, selection or Selection()))

    def removable(self, keys: Iterable[tuple[Address, Part]]) -> set[tuple[Address, Part]]:
        """Return which of some parts may go at this moment, whenever they were chosen.

        Those that are recorded, of a representation that is not pinned, and if they are keys and values, with none of
        a following segment recorded.
        """
        with self._connections.reading() as connection:
            return removable(connection, keys)

    def rehearse(
        self,
        nbytes: int,
        *,
        at: float,
        grace_seconds: float,
        ttl_seconds: float | None = None,
        selection: Selection | None = None,
        limit: int = 10_000,
    ) -> list[Victim]:
        """Return what would go if `victims` were called and evicted until `nbytes` are free. Nothing is changed.

        The same arguments, and the same errors, as `victims`; `limit` is that of one call.
        """
        choice = Choice(at=at, grace_seconds=grace_seconds, ttl_seconds=ttl_seconds, limit=limit)
        gone = list[Victim]()
        with contextlib.suppress(_Undone), self._connections.writing() as connection:
            among = conditions(connection, selection or Selection())
            while some := choose_victims(connection, max(0, nbytes - sum(v.nbytes for v in gone)), choice, among=among):
                gone += some
                changes.forget(connection, [(victim.address, victim.part) for victim in some])
            raise _Undone
        return gone

    def select(self, selection: Selection) -> Iterator[Row]:
        """Iterate over the selected representations, a page at a time, without a lock between two pages.

        Memory does not grow with their number, but for the ids of segments when they are selected by a text's prefix or
        are searched. They come by segment then, else by address; those that are recorded or forgotten meanwhile may
        appear or not.

        Raises `PromptError` for hex digits that are none and for a model that the catalog does not know, and
        `InvalidText` for strings that have no UTF-8.
        """
        with self._connections.reading() as connection:
            among = conditions_but_searches(connection, selection)
            ids = searched_segments(connection, selection)
        if ids is None:
            return pages.rows(self._connections, among)
        return pages.rows_of_segments(self._connections, ids, among)

    def ancestors(self, ids: Iterable[SegmentId]) -> set[SegmentId]:
        """Return the segments that the given ones follow, at any distance, as far as known, without the given ones."""
        with self._connections.reading() as connection:
            return graph.ancestors(connection, ids)

    def descendants(self, ids: Iterable[SegmentId]) -> set[SegmentId]:
        """Return the segments that follow the given ones, at any distance, without the given ones."""
        with self._connections.reading() as connection:
            return graph.descendants(connection, ids)

    def of_segments(self, ids: Iterable[SegmentId]) -> Iterator[Row]:
        """Iterate over all representations of segments, as `select` does."""
        return pages.rows_of_segments(self._connections, set(ids), [])

    def count(self, increments: Mapping[str, float]) -> None:
        """Add to counts that all processes share; one that is not there begins at 0."""
        if increments:
            with self._connections.writing() as connection:
                events.count(connection, increments)

    def counts(self) -> dict[str, float]:
        """Return all counts, by name."""
        with self._connections.reading() as connection:
            return events.counts(connection)

    def log(self, new: Sequence[Event]) -> None:
        """Enter events; the newest thousand are kept."""
        if new:
            with self._connections.writing() as connection:
                events.log(connection, new)

    def events(self, *, limit: int = 20) -> list[Event]:
        """Return the newest events, the last one first."""
        with self._connections.reading() as connection:
            return events.events(connection, limit=limit)

    def vacuum(self) -> None:
        """Rewrite the file without free space; nothing of what was deleted remains in it."""
        with self._connections.writing() as connection:
            search.clear_stale(connection)
        self._connections.vacuum()

    def index_texts(self) -> Iterator[int]:
        """Make an index of all texts, or bring it up to date, some at a time; yield how many were left before each.

        Searching is as right without it. Others may write in between, and nothing is lost by giving up.
        """
        return pages.index_texts(self._connections)

    def has_index(self) -> bool:
        """Whether somebody has made an index of the texts."""
        with self._connections.reading() as connection:
            return search.has_index(connection)

    def pin(self, addresses: Iterable[Address], *, is_pinned: bool = True) -> None:
        """Set whether representations are pinned; unknown addresses are ignored."""
        with self._connections.writing() as connection:
            changes.annotate(connection, addresses, is_pinned=is_pinned)

    def label(self, addresses: Iterable[Address], label: str | None) -> None:
        """Set or, with `None`, remove the label of representations; unknown addresses are ignored."""
        with self._connections.writing() as connection:
            changes.annotate(connection, addresses, label=label)

    def save(self, *records: Known) -> None:
        """Save what is known of something, all or nothing of it, over what was known before."""
        with self._connections.writing() as connection:
            for record in records:
                models.save(connection, record)

    def model(self, weights_id: WeightsId) -> ModelRecord | None:
        """Return one model, `None` if it is unknown.

        A model that was never saved, but has representations, is `"unchecked"` and has the name `""`.
        """
        with self._connections.reading() as connection:
            return models.model(connection, weights_id)

    def models(self) -> list[ModelRecord]:
        """Return all models, by name."""
        with self._connections.reading() as connection:
            return models.models(connection)

    def tokenizers(self) -> list[TokenizerRecord]:
        """Return all tokenizers, by name; one that was never saved has the name `""`."""
        with self._connections.reading() as connection:
            return models.tokenizers(connection)

    def definition(self, tokenizer_id: TokenizerId) -> bytes | None:
        """Return a tokenizer's definition as it was saved, unchecked; `None` if none was."""
        with self._connections.reading() as connection:
            return models.definition(connection, tokenizer_id)

    def has_definition(self, tokenizer_id: TokenizerId) -> bool:
        """Whether a tokenizer's definition, or that there is none, was saved."""
        with self._connections.reading() as connection:
            return models.has_definition(connection, tokenizer_id)

    def source(self, key: bytes) -> Source | None:
        """Return the ids of unchanged files, `None` if they are unknown."""
        with self._connections.reading() as connection:
            return models.source(connection, key)

    def cuts(self, key: bytes) -> CutsRecord | None:
        """Return where a long string is cut, `None` if that is unknown."""
        with self._connections.reading() as connection:
            return models.cuts(connection, key)

    def greedy_paths(self, addresses: Iterable[Address]) -> dict[Address, GreedyPath]:
        """Return how models go on after prompts that end with these representations, as far as that is known."""
        with self._connections.reading() as connection:
            return models.greedy_paths(connection, addresses)

    def totals(self, *, namespace: str | None = None) -> Totals:
        """Return the sums over all representations, or over those of a namespace."""
        with self._connections.reading() as connection:
            return queries.totals(connection, namespace=namespace)

    def totals_by_model(self) -> dict[WeightsId, GroupTotals]:
        """Return the sums of each model that has representations."""
        with self._connections.reading() as connection:
            return queries.totals_by(connection, Sums.weights_id)

    def totals_by_namespace(self) -> dict[str, GroupTotals]:
        """Return the sums of each namespace that has representations."""
        with self._connections.reading() as connection:
            return queries.totals_by(connection, Sums.namespace)

    def rows(
        self, *, limit: int | None = None, order: Order = Order.NEWEST, selection: Selection | None = None
    ) -> list[Row]:
        """Return the first representations in an order; `selection` restricts them and raises what `select` raises."""
        with self._connections.reading() as connection:
            among = conditions(connection, selection or Selection())
            return queries.rows(connection, limit=limit, order=order, among=among)

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

    def edges(self, ids: Iterable[SegmentId]) -> list[tuple[SegmentId, SegmentId]]:
        """Return segments, each with each of its direct parents, which may be unknown to the catalog."""
        with self._connections.reading() as connection:
            return graph.edges(connection, ids)

    def segment(self, segment_id: SegmentId) -> Segment | None:
        """Return a segment, rebuilt with all that it follows as far as known; `None` if it is unknown itself."""
        with self._connections.reading() as connection:
            return graph.placed(connection, [segment_id], order=[]).get(segment_id)

    def namesakes(
        self, strings: Iterable[str], ids: tuple[WeightsId, TokenizerId], among: Sequence[Segment]
    ) -> dict[Segment, bool]:
        """Return the newest segments with one of these texts, rebuilt, and whether these ids have them represented.

        The namespace, and the order of parallel branches, are those of `among`.
        """
        with self._connections.reading() as connection:
            return queries.namesakes(connection, strings, ids, among)

    def seconds_per_token(self, weights_id: WeightsId) -> float | None:
        """Return what computing a token took lately under one model; None where nothing was recorded."""
        with self._connections.reading() as connection:
            return queries.seconds_per_token(connection, weights_id)

    def keys(self) -> Iterator[tuple[Address, Part]]:
        """Iterate over every part that the catalog believes to be in the store, by address.

        No lock is held between two of them: parts that are recorded or forgotten meanwhile may appear or not.
        """
        return pages.keys(self._connections)


class _Undone(Exception):
    """Takes back what a transaction has changed."""
