"""What is written to the catalog about the parts in the store, and about how they are used."""

from __future__ import annotations

from collections import defaultdict
from operator import itemgetter
from typing import TYPE_CHECKING

from sqlalchemy import Connection, LargeBinary, Select, Update, and_, bindparam, delete, exists, func, select, update
from sqlalchemy.dialects.sqlite import Insert, insert

from backprompt_db.catalog import events, models, search
from backprompt_db.catalog.connection import CatalogFile
from backprompt_db.catalog.graph import chunks
from backprompt_db.catalog.remembered import UNCHECKED
from backprompt_db.catalog.schema import (
    NBYTES,
    USED_AT,
    Base,
    EncodingRow,
    GenerationRow,
    GreedyPathRow,
    Model,
    Parent,
    Representation,
    Segment,
    Tokenizer,
)
from backprompt_db.prompt.ids import Address, SegmentId, TokenizerId, WeightsId
from backprompt_db.prompt.representation import Part
from backprompt_db.system.failpoints import reach

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from backprompt_db.catalog.records import StoredPart
    from backprompt_db.prompt.representation import Origin

_NO_TOKENIZER: dict[str, object] = {"name": "", "kind": "", "vocab_size": 0}

_MANY = 1_000
_MORE_CACHE = "PRAGMA cache_size = -131072"
"""A transaction of many rows, which lie all over the file, gets up to 128 MiB. With the usual 2 MB, SQLite would read
and write their pages again and again before it commits."""

_MAX_TOKENS = 2**40
_MAX_SECONDS = 1e9
"""Parts that claim more are entered with these: a sum that overflows would keep all others out of the catalog too."""


class Changes(CatalogFile):
    """The part of a catalog that is told what was stored, used and removed."""

    def record(self, parts: Sequence[StoredPart], *, at: float) -> None:
        """Enter parts that are in the store by now, all or none; entering one again changes only its size.

        `at` (POSIX seconds) is when they were created, unless their representation has a row already. Its hits, pin
        and label are kept, and its compute seconds are those of its slowest part.
        """
        if parts:
            with self.writing() as connection:
                _record(connection, parts, at=at)

    def touch(self, hits: Mapping[Address, int], *, at: float) -> None:
        """Add to the number of hits of representations that were used at `at`; unknown addresses are ignored."""
        more_hits = Representation.num_hits + bindparam("more")
        statement = _one().values(num_hits=more_hits, last_used_at=func.max(USED_AT, at))
        if hits:
            with self.writing() as connection:
                _enlarge_cache(connection, len(hits))
                connection.execute(statement, [{"which": address, "more": hits[address]} for address in sorted(hits)])

    def pin(self, addresses: Iterable[Address], *, is_pinned: bool = True) -> None:
        """Set whether representations are pinned; unknown addresses are ignored."""
        with self.writing() as connection:
            _set(connection, addresses, is_pinned=is_pinned)

    def label(self, addresses: Iterable[Address], label: str | None) -> None:
        """Set or, with `None`, remove the label of representations; unknown addresses are ignored."""
        with self.writing() as connection:
            _set(connection, addresses, label=label)

    def forget(self, keys: Iterable[tuple[Address, Part]]) -> None:
        """Enter that parts have left the store; unknown ones are ignored.

        A representation without parts goes, and so do the segments that have neither a representation nor a child.
        """
        if gone := list(keys):
            with self.writing() as connection:
                forget(connection, gone)

    def evict(self, keys: Iterable[tuple[Address, Part]], *, at: float) -> None:
        """Enter that parts were evicted from the store, and when: what `forget` does, and an entry of the eviction."""
        if gone := list(keys):
            with self.writing() as connection:
                forget(connection, gone)
                reach("catalog.evict.inside")
                events.remember_evictions(connection, {address for address, _ in gone}, at=at)

    def forget_encodings(self) -> None:
        """Forget which tokens strings have."""
        with self.writing() as connection:
            connection.execute(delete(EncodingRow))

    def erase(self, keys: Iterable[tuple[Address, Part]]) -> None:
        """Forget parts that have left the store, and that there was anything under their addresses."""
        if gone := list(keys):
            addresses = {address for address, _ in gone}
            with self.writing() as connection:
                models.forget_continuations(connection, addresses)  # first: it needs to know what they follow
                forget(connection, gone)
                search.clear(connection)
                events.forget_events(connection, addresses)


def _record(connection: Connection, parts: Sequence[StoredPart], *, at: float) -> None:
    """Write the rows of `parts` and of everything that they refer to; what is there already is completed."""
    _enlarge_cache(connection, len(parts))
    origins = {part.address: part.origin for part in parts}
    # Ids are digests. In their order, each page of the index is read once; in any other order, once for each row.
    ids = dict(sorted(((address, origin.segment_id) for address, origin in origins.items()), key=itemgetter(1)))
    _add(connection, Model, [_model(weights_id) for weights_id in {o.weights_id for o in origins.values()}])
    reach("catalog.record.inside")
    _add(connection, Tokenizer, [_tokenizer(key) for key in {o.tokenizer_id for o in origins.values()}])
    _add(connection, Segment, [_segment(origins[address], segment_id) for address, segment_id in ids.items()])
    _add(
        connection,
        Parent,
        [
            {"segment_id": segment_id, "parent_id": parent}
            for address, segment_id in ids.items()
            for parent in origins[address].parents
        ],
    )
    connection.execute(_UPSERT, [_representation(part, ids[part.address], at=at) for part in parts])
    _touch_parents(connection, [part.origin for part in parts if part.part is Part.KV], at=at)


def _enlarge_cache(connection: Connection, num_rows: int) -> None:
    if num_rows > _MANY:
        connection.exec_driver_sql(_MORE_CACHE)


def _touch_parents(connection: Connection, origins: Iterable[Origin], *, at: float) -> None:
    """Enter that the keys and values of parents were used: those of `origins` were computed with them."""
    used = {(parent, origin.weights_id, origin.tokenizer_id) for origin in origins for parent in origin.parents}
    if used:
        rows = [{"parent": parent, "weights": weights, "tokenizer": tokenizer} for parent, weights, tokenizer in used]
        connection.execute(_TOUCH_PARENT, [{**row, "at": at} for row in rows])


_TOUCH_PARENT = (
    update(Representation)
    .where(
        Representation.segment_id == bindparam("parent"),
        Representation.weights_id == bindparam("weights"),
        Representation.tokenizer_id == bindparam("tokenizer"),
    )
    .values(last_used_at=func.max(USED_AT, bindparam("at")))
)
"""A later time stays: a clock that was set back must not make new representations look old."""


def _model(weights_id: WeightsId) -> dict[str, object]:
    return {"weights_id": weights_id, **UNCHECKED}


def _tokenizer(tokenizer_id: TokenizerId) -> dict[str, object]:
    return {"tokenizer_id": tokenizer_id, **_NO_TOKENIZER}


def _segment(origin: Origin, segment_id: SegmentId) -> dict[str, object]:
    return {"id": segment_id, "text": origin.text, "start": origin.start, "namespace": origin.namespace}


def _representation(part: StoredPart, segment_id: SegmentId, *, at: float) -> dict[str, object]:
    sizes = {column.key: part.nbytes if part.part is kind else None for kind, column in NBYTES.items()}
    return {
        "address": part.address,
        "of_segment": segment_id,
        "weights_id": part.origin.weights_id,
        "tokenizer_id": part.origin.tokenizer_id,
        "num_tokens": min(part.origin.num_tokens, _MAX_TOKENS),
        "compute_seconds": max(0.0, min(part.origin.compute_seconds, _MAX_SECONDS)),
        "created_at": at,
        "num_hits": 0,
        "is_pinned": False,
        **sizes,
    }


def _add(connection: Connection, table: type[Base], rows: Sequence[Mapping[str, object]]) -> None:
    if rows:
        connection.execute(insert(table).on_conflict_do_nothing(), rows)


def _upsert() -> Insert:
    # The namespace is that of the segment, whatever the part says: the counts by namespace must agree.
    segment = bindparam("of_segment", type_=LargeBinary())
    namespace = select(Segment.namespace).where(Segment.id == segment).scalar_subquery()
    new = insert(Representation).values(segment_id=segment, namespace=namespace)
    sizes = {column.key: func.coalesce(new.excluded[column.key], column) for column in NBYTES.values()}
    slower = func.max(new.excluded.compute_seconds, Representation.compute_seconds)
    return new.on_conflict_do_update(index_elements=["address"], set_={**sizes, "compute_seconds": slower})


_UPSERT = _upsert()


def _set(connection: Connection, addresses: Iterable[Address], **values: object) -> None:
    rows = [{"which": address} for address in addresses]
    if rows:
        connection.execute(_one().values(values), rows)


def _one() -> Update:
    return update(Representation).where(Representation.address == bindparam("which"))


def forget(connection: Connection, keys: Iterable[tuple[Address, Part]]) -> None:
    """Clear the sizes of parts, then delete rows without parts, and segments up to the first one that is needed."""
    gone: dict[Part, list[Address]] = defaultdict(list)
    for address, part in keys:
        gone[part].append(address)
    _enlarge_cache(connection, sum(map(len, gone.values())))
    for part, addresses in gone.items():
        _set(connection, addresses, **{NBYTES[part].key: None})
    for some in chunks({address for addresses in gone.values() for address in addresses}):
        _delete_empty(connection, some)


def _delete_empty(connection: Connection, addresses: Sequence[Address]) -> None:
    is_empty = and_(Representation.address.in_(addresses), *(column.is_(None) for column in NBYTES.values()))
    ids = connection.execute(select(Representation.segment_id).where(is_empty)).scalars().all()
    gone = select(Representation.address).where(is_empty)
    for table in (GreedyPathRow, GenerationRow):
        connection.execute(delete(table).where(table.address.in_(gone)))
    connection.execute(delete(Representation).where(is_empty))
    if unneeded := _unneeded(connection, ids):
        connection.execute(
            delete(Segment).where(Segment.id == bindparam("which")), [{"which": key} for key in unneeded]
        )


def _unneeded(connection: Connection, ids: Sequence[SegmentId]) -> set[SegmentId]:
    """Return those of the segments `ids`, and of their ancestors, with no representation and no child that stays.

    Suspects are the segments without representations from `ids` upwards. All other segments stay, and so do suspects
    with a child that is not a suspect, or that stays.
    """
    edges = connection.execute(_SUSPECTS_AND_CHILDREN, {"ids": ids}).all()
    suspects = {suspect for suspect, _ in edges}
    parents = defaultdict(list)
    for suspect, child in edges:
        parents[child].append(suspect)
    kept = set[SegmentId]()
    staying = [child for child in parents if child is not None and child not in suspects]
    while staying:
        new = [parent for parent in parents[staying.pop()] if parent not in kept]
        kept.update(new)
        staying.extend(new)
    return suspects - kept


def _suspects_and_children() -> Select[SegmentId, SegmentId | None]:
    has_none = ~exists().where(Representation.segment_id == Segment.id)
    first = select(Segment.id).where(Segment.id.in_(bindparam("ids", expanding=True)), has_none)
    suspects = first.cte("suspects", recursive=True)
    above = select(Segment.id).join(Parent, Parent.parent_id == Segment.id)
    suspects = suspects.union(above.join(suspects, Parent.segment_id == suspects.c.id).where(has_none))
    return select(suspects.c.id, Parent.segment_id).join_from(
        suspects, Parent, Parent.parent_id == suspects.c.id, isouter=True
    )


_SUSPECTS_AND_CHILDREN = _suspects_and_children()
