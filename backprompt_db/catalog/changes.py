"""What is written to the catalog: plain functions on an open write transaction."""

from __future__ import annotations

from collections import defaultdict
from operator import itemgetter
from typing import TYPE_CHECKING

from sqlalchemy import Connection, LargeBinary, Select, Update, and_, bindparam, delete, exists, func, select, update
from sqlalchemy.dialects.sqlite import Insert, insert

from backprompt_db.catalog.graph import chunks
from backprompt_db.catalog.schema import (
    NBYTES,
    USED_AT,
    Base,
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

_NO_MODEL: dict[str, object] = {
    "name": "",
    "architecture": "",
    "dtype": "",
    "num_layers": 0,
    "num_kv_heads": 0,
    "head_dim": 0,
    "vocab_size": 0,
    "verdict": "unchecked",
}
_NO_TOKENIZER: dict[str, object] = {"name": "", "kind": "", "vocab_size": 0}

_MANY = 1_000
_MORE_CACHE = "PRAGMA cache_size = -131072"
"""Up to 128 MiB for a transaction of many rows, which lie all over the file. With the usual 2 MB, SQLite would read and
write their pages again and again before it commits."""

_MAX_TOKENS = 2**40
_MAX_SECONDS = 1e9
"""Whatever a part claims must not make sums overflow, which would keep all others out of the catalog too."""


def record(connection: Connection, parts: Sequence[StoredPart], *, at: float) -> None:
    """Write the rows of `parts` and of everything that they refer to; what is there already is completed."""
    _make_room(connection, len(parts))
    origins = {part.address: part.origin for part in parts}
    # Ids are digests: in their order each page of the index is brought in once, in any other once for each row.
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


def _make_room(connection: Connection, num_rows: int) -> None:
    if num_rows > _MANY:
        connection.exec_driver_sql(_MORE_CACHE)


def _touch_parents(connection: Connection, origins: Iterable[Origin], *, at: float) -> None:
    """Computing keys and values has used those of the parents."""
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
"""Where it was used later, that stays: a clock that was set back must not make what is new look old."""


def _model(weights_id: WeightsId) -> dict[str, object]:
    return {"weights_id": weights_id, **_NO_MODEL}


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
    # The namespace is the segment's, whatever a part claims: what is counted by namespace must agree.
    segment = bindparam("of_segment", type_=LargeBinary())
    namespace = select(Segment.namespace).where(Segment.id == segment).scalar_subquery()
    new = insert(Representation).values(segment_id=segment, namespace=namespace)
    sizes = {column.key: func.coalesce(new.excluded[column.key], column) for column in NBYTES.values()}
    slower = func.max(new.excluded.compute_seconds, Representation.compute_seconds)
    return new.on_conflict_do_update(index_elements=["address"], set_={**sizes, "compute_seconds": slower})


_UPSERT = _upsert()


def replace(connection: Connection, table: type[Base], values: Mapping[str, object]) -> None:
    """Write one row, over the one with the same primary key if there is one."""
    new = insert(table).values(values)
    key = [column.name for column in table.__table__.primary_key]
    connection.execute(
        new.on_conflict_do_update(index_elements=key, set_={name: new.excluded[name] for name in values})
    )


def touch(connection: Connection, hits: Mapping[Address, int], *, at: float) -> None:
    """Add to the number of hits of representations, and set when they were last used unless they were used later."""
    _make_room(connection, len(hits))
    used = func.max(USED_AT, at)
    statement = _one().values(num_hits=Representation.num_hits + bindparam("more"), last_used_at=used)
    connection.execute(statement, [{"which": address, "more": more} for address, more in sorted(hits.items())])


def annotate(connection: Connection, addresses: Iterable[Address], **values: object) -> None:
    """Set columns of representations that only people set."""
    rows = [{"which": address} for address in addresses]
    if rows:
        connection.execute(_one().values(values), rows)


def _one() -> Update:
    return update(Representation).where(Representation.address == bindparam("which"))


def forget(connection: Connection, keys: Iterable[tuple[Address, Part]]) -> None:
    """Clear the sizes of parts; rows that say nothing any more go, up to the first ancestor that something needs."""
    gone: dict[Part, list[Address]] = defaultdict(list)
    for address, part in keys:
        gone[part].append(address)
    _make_room(connection, sum(map(len, gone.values())))
    for part, addresses in gone.items():
        annotate(connection, addresses, **{NBYTES[part].key: None})
    for some in chunks({address for addresses in gone.values() for address in addresses}):
        _delete_empty(connection, some)


def _delete_empty(connection: Connection, addresses: Sequence[Address]) -> None:
    is_empty = and_(Representation.address.in_(addresses), *(column.is_(None) for column in NBYTES.values()))
    ids = connection.execute(select(Representation.segment_id).where(is_empty)).scalars().all()
    gone = select(Representation.address).where(is_empty)
    connection.execute(delete(GreedyPathRow).where(GreedyPathRow.address.in_(gone)))
    connection.execute(delete(Representation).where(is_empty))
    if unneeded := _unneeded(connection, ids):
        connection.execute(
            delete(Segment).where(Segment.id == bindparam("which")), [{"which": key} for key in unneeded]
        )


def _unneeded(connection: Connection, ids: Sequence[SegmentId]) -> set[SegmentId]:
    """Return those of the segments `ids`, and of their ancestors, with no representation and no child that stays.

    Suspects are the segments without representations from `ids` upwards. Every other segment stays; so a suspect stays
    if it has a child that is no suspect, or one that stays.
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
