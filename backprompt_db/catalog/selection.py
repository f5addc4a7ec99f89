"""Which representations a selection means, as conditions for a query in an open transaction."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from sqlalchemy import (
    ColumnElement,
    Connection,
    LargeBinary,
    Select,
    bindparam,
    cast,
    column,
    exists,
    func,
    literal,
    or_,
    select,
    table,
)
from sqlalchemy.orm import aliased

from backprompt_db.catalog.graph import children_of, chunks, descendants_of
from backprompt_db.catalog.schema import ALL_NBYTES, USED_AT, Model, Namespace, Parent, Representation, Segment
from backprompt_db.catalog.search import segments_with
from backprompt_db.errors import PromptError
from backprompt_db.prompt.ids import ID_NBYTES, SegmentId, namespace_id, utf8

if TYPE_CHECKING:
    from backprompt_db.catalog.records import Selection

_MIN_WEIGHTS_DIGITS = 8


def conditions(connection: Connection, selection: Selection) -> list[ColumnElement[bool]]:
    """Return conditions that the selected representations meet and no others, for use in the same transaction.

    Raises `PromptError` for a prefix that is not hex digits and for a model that the catalog does not know, and
    `InvalidText` for strings that have no UTF-8.
    """
    found = conditions_but_searches(connection, selection)
    if (ids := searched_segments(connection, selection)) is not None:
        found.append(Representation.segment_id.in_(_reach(connection, ids)))
    return found


def _reach(connection: Connection, ids: Iterable[SegmentId]) -> Select[bytes]:
    """Put segments into a temporary table and select them from it: they may be more than a statement can name."""
    connection.exec_driver_sql("CREATE TEMPORARY TABLE reached (id BLOB PRIMARY KEY) WITHOUT ROWID")
    if rows := [(each,) for each in ids]:
        connection.exec_driver_sql("INSERT INTO reached VALUES (?)", rows)
    return select(_REACHED.c.id)


_REACHED = table("reached", column("id", LargeBinary()))


def searched_segments(connection: Connection, selection: Selection) -> set[SegmentId] | None:
    """Return the segments that the text's prefix and the search mean; `None` when neither is given."""
    found = list[set[SegmentId]]()
    if selection.text_prefix:
        found.append(segments_of_prefix(connection, selection.text_prefix, selection.namespace))
    if selection.text_matches:
        found.append(segments_with(connection, selection.text_matches))
    return set.intersection(*found) if found else None


def conditions_but_searches(connection: Connection, selection: Selection) -> list[ColumnElement[bool]]:
    """Return all conditions but those of `searched_segments`, for use in any transaction.

    Raises the same errors as `conditions`.
    """
    found: list[ColumnElement[bool]] = []
    if selection.text_contains is not None:
        found.append(_has_text_with(_storable(selection.text_contains)))
    if selection.label is not None:
        found.append(Representation.label == _storable(selection.label))
    if selection.model is not None:
        found.append(Representation.weights_id.in_(_weights_ids(connection, selection.model)))
    if selection.namespace is not None:
        found.append(Representation.namespace == _storable(selection.namespace))
    if selection.used_before is not None:
        found.append(selection.used_before > USED_AT)
    if selection.used_after is not None:
        found.append(selection.used_after < USED_AT)
    if selection.larger_than is not None:
        found.append(selection.larger_than < ALL_NBYTES)
    if selection.smaller_than is not None:
        found.append(selection.smaller_than > ALL_NBYTES)
    if selection.address_prefix is not None:
        found.append(Representation.address.between(*id_range(selection.address_prefix)))
    return found


def _storable(string: str) -> str:
    utf8(string)
    return string


def id_range(prefix: str) -> tuple[bytes, bytes]:
    """Return the smallest and the largest id that begin with the hex digits `prefix`.

    Raises `PromptError` for anything but 1 to 64 hex digits.
    """
    num_digits = 2 * ID_NBYTES
    if not re.fullmatch(rf"[0-9a-fA-F]{{1,{num_digits}}}", prefix):
        raise PromptError(
            f"{prefix!r} does not begin an address or a segment id",
            hint=f"Give 1 to {num_digits} hex digits, as listings show them.",
        )
    return bytes.fromhex(prefix.ljust(num_digits, "0")), bytes.fromhex(prefix.ljust(num_digits, "f"))


def _has_text_with(string: str) -> ColumnElement[bool]:
    # A subquery for each representation: for one page of them, not every text is looked at.
    segment = aliased(Segment)
    has_it = func.instr(segment.text, string) > 0
    return exists().where(segment.id == Representation.segment_id, has_it).correlate(Representation)


def _weights_ids(connection: Connection, model: str) -> list[bytes]:
    named = Model.name == _storable(model)
    if re.fullmatch(rf"[0-9a-fA-F]{{{_MIN_WEIGHTS_DIGITS},64}}", model):
        named = or_(named, Model.weights_id.between(*id_range(model)))
    ids = connection.execute(select(Model.weights_id).where(named)).scalars().all()
    if not ids:
        raise PromptError(
            f"the catalog knows no model {model!r}",
            hint="Give a name that `backprompt-db ls --models` lists, or the first 8 digits of a weights id.",
        )
    return list(ids)


def segments_of_prefix(connection: Connection, prefix: str, namespace: str | None) -> set[SegmentId]:
    """Return the segments in which the prefix of a prompt ends, and all that follow them.

    The texts from a prompt's first segment up to such a segment, joined, begin with the prefix.
    """
    wanted = utf8(prefix)
    reached = set[SegmentId]()
    fronts = {(first, wanted) for first in _first_segments(connection, wanted, namespace)}
    while fronts:
        rests: dict[SegmentId, set[bytes]] = {}
        for segment_id, rest in fronts:
            rests.setdefault(segment_id, set()).add(rest)
        fronts = set()
        for segment_id, text in _texts(connection, rests):
            if any(text.startswith(rest) for rest in rests[segment_id]):
                reached.add(segment_id)
            elif further := {rest[len(text) :] for rest in rests[segment_id] if rest.startswith(text)}:
                fronts |= {(child, rest) for child in children_of(connection, [segment_id]) for rest in further}
    return reached | descendants_of(connection, reached)


def _first_segments(connection: Connection, prefix: bytes, namespace: str | None) -> Iterator[SegmentId]:
    """Yield the segments that begin prompts which may begin with the prefix."""
    text, wanted = cast(Segment.text, LargeBinary), literal(prefix, LargeBinary)
    agrees = or_(func.substr(text, 1, len(prefix)) == wanted, func.substr(wanted, 1, func.length(text)) == text)
    names = [namespace] if namespace is not None else connection.execute(select(Namespace.name)).scalars().all()
    for name in names:
        is_first = _IS_FIRST if (root := namespace_id(name)) is None else _follows_only(root)
        yield from connection.execute(select(Segment.id).where(is_first, agrees)).scalars()


_IS_FIRST = ~exists().where(Parent.segment_id == Segment.id)


def _follows_only(parent: SegmentId) -> ColumnElement[bool]:
    others = exists().where(Parent.segment_id == Segment.id, Parent.parent_id != parent)
    return Segment.id.in_(select(Parent.segment_id).where(Parent.parent_id == parent)) & ~others


_TEXTS = select(Segment.id, Segment.text).where(Segment.id.in_(bindparam("ids", expanding=True)))


def _texts(connection: Connection, ids: Iterable[SegmentId]) -> Iterator[tuple[SegmentId, bytes]]:
    for some in chunks(ids):
        for segment_id, text in connection.execute(_TEXTS, {"ids": some}):
            yield segment_id, utf8(text)
