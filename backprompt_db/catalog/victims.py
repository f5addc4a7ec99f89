"""What goes first when a database is full: plain functions on an open read transaction."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from sqlalchemy import ColumnElement, Connection, Integer, case, false, func, select, type_coerce

from backprompt_db.catalog.graph import chunks
from backprompt_db.catalog.records import Victim
from backprompt_db.catalog.selection import USED_AT
from backprompt_db.catalog.tables import NBYTES, Representation
from backprompt_db.representation import Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import Select

    from backprompt_db.keys import Address

_HALVING_SECONDS = 86_400.0
"""A part that was not used for this long is worth half of what it was."""

_EXPIRED, _OLD, _YOUNG = range(3)
"""In which order they go, whatever they are worth."""

_REASONS = {_EXPIRED: "expired", _OLD: "value", _YOUNG: "value"}

_Ranked: TypeAlias = tuple[tuple[int, float], Victim]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """By what victims are chosen. Times are POSIX seconds."""

    at: float
    grace_seconds: float
    ttl_seconds: float | None
    limit: int

    @property
    def is_expired(self) -> ColumnElement[bool]:
        """Whether a representation was not used for longer than the time to live."""
        return false() if self.ttl_seconds is None else self.at - self.ttl_seconds > USED_AT

    @property
    def group(self) -> ColumnElement[int]:
        """Whether a representation is expired, or old, or was used within the grace."""
        return case((self.is_expired, _EXPIRED), (self.at - self.grace_seconds >= USED_AT, _OLD), else_=_YOUNG)

    def value(self, part: Part) -> ColumnElement[float]:
        """Return what a part is worth: seconds of computation per byte, the less the longer it was not used."""
        age = func.max(0.0, self.at - USED_AT) / _HALVING_SECONDS  # a clock may have been set back
        return Representation.compute_seconds / func.max(NBYTES[part], 1) / (1.0 + age)


def choose_victims(
    connection: Connection, nbytes: int, choice: Choice, *, among: Sequence[ColumnElement[bool]]
) -> list[Victim]:
    """Return what is expired, then the least valuable parts until their sizes sum to `nbytes`.

    Never pinned ones, and of keys and values only those that no others build on.
    """
    only_expired = [] if nbytes else [choice.is_expired]
    found = [_ranked(connection, part, choice, [*among, *only_expired]) for part in Part]
    chosen, sum_nbytes = list[Victim](), 0
    for (group, _), victim in heapq.merge(*found, key=lambda ranked: ranked[0]):
        if len(chosen) == choice.limit or (group != _EXPIRED and sum_nbytes >= nbytes):
            break
        chosen.append(victim)
        sum_nbytes += victim.nbytes
    return chosen


def _ranked(connection: Connection, part: Part, choice: Choice, among: Sequence[ColumnElement[bool]]) -> list[_Ranked]:
    """Return those of one kind of parts that may go, first those that go first."""
    found = connection.execute(_candidates(part, choice, among))
    return [
        ((group, value), Victim(address, part, nbytes, seconds, used_at, _REASONS[group]))
        for address, nbytes, seconds, used_at, group, value in found
    ]


def _candidates(
    part: Part, choice: Choice, among: Sequence[ColumnElement[bool]]
) -> Select[Address, int, float, float, int, float]:
    nbytes, group, value = type_coerce(NBYTES[part], Integer), choice.group.label("goes"), choice.value(part)
    found = select(
        Representation.address, nbytes, Representation.compute_seconds, USED_AT, group, value.label("worth")
    ).where(*_may_go(part), *among)
    return found.order_by("goes", "worth").limit(choice.limit)


def removable(connection: Connection, keys: Iterable[tuple[Address, Part]]) -> set[tuple[Address, Part]]:
    """Return those of the given parts that are recorded and may go."""
    addresses: dict[Part, set[Address]] = {part: set() for part in Part}
    for address, part in keys:
        addresses[part].add(address)
    return {
        (address, part)
        for part, given in addresses.items()
        for some in chunks(given)
        for address in connection.execute(_ADDRESSES.where(Representation.address.in_(some), *_may_go(part))).scalars()
    }


_ADDRESSES = select(Representation.address)


def _may_go(part: Part) -> list[ColumnElement[bool]]:
    is_stored, is_free = NBYTES[part].is_not(None), Representation.is_pinned.is_(False)
    return [is_stored, is_free, *([Representation.num_kv_children == 0] if part is Part.KV else [])]
