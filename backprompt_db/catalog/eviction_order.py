"""What goes first when a database is full: plain functions on an open read transaction."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, TypeAlias

from sqlalchemy import ColumnElement, Connection, Integer, and_, case, false, func, or_, select, type_coerce

from backprompt_db.catalog.graph import chunks
from backprompt_db.catalog.records import Victim
from backprompt_db.catalog.schema import NBYTES, USED_AT, Representation
from backprompt_db.prompt.representation import Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import Select

    from backprompt_db.prompt.ids import Address

_HALVING_SECONDS = 86_400.0
"""A part that was not used for this long is worth half of what it was."""

_EXPIRED, _OLD, _YOUNG = range(3)
"""In which order they go, whatever they are worth."""

_REASONS = {_EXPIRED: "expired", _OLD: "value", _YOUNG: "value"}

_SAMPLE_SHARE = 256
_SAMPLE_END = b"\1"
"""One in so many has an address below this. Addresses are digests: that is a random sample."""

_MANY = 10_000

_Rank: TypeAlias = tuple[int, float]
_Ranked: TypeAlias = tuple[_Rank, Victim]


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
    def is_old(self) -> ColumnElement[bool]:
        """Whether a representation was not used within the grace."""
        return self.at - self.grace_seconds >= USED_AT

    @property
    def group(self) -> ColumnElement[int]:
        """Whether a representation is expired, or old, or was used within the grace."""
        return case((self.is_expired, _EXPIRED), (self.is_old, _OLD), else_=_YOUNG)

    def is_before(self, part: Part, rank: _Rank) -> ColumnElement[bool]:
        """Whether a part goes no later than one of that rank. What is expired always does."""
        group, value = rank
        if group == _EXPIRED:
            return self.is_expired
        is_worth_less = self.value(part) <= value
        return or_(self.is_expired, and_(self.is_old, is_worth_less) if group == _OLD else self.is_old | is_worth_less)

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
    found = [_ranked(connection, part, nbytes, choice, [*among, *only_expired]) for part in Part]
    chosen, sum_nbytes = list[Victim](), 0
    for (group, _), victim in heapq.merge(*found, key=itemgetter(0)):
        if len(chosen) == choice.limit or (group != _EXPIRED and sum_nbytes >= nbytes):
            break
        chosen.append(victim)
        sum_nbytes += victim.nbytes
    return chosen


def _ranked(
    connection: Connection, part: Part, nbytes: int, choice: Choice, among: Sequence[ColumnElement[bool]]
) -> list[_Ranked]:
    """Return as many of one kind of parts as may have to go, first those that go first."""
    # Sorting all takes most of the time, and no index can do it: the order changes while time goes by.
    last = _likely_last(connection, part, nbytes, choice, among)
    found = [] if last is None else _up_to(connection, part, last, choice, among)
    is_enough = len(found) == choice.limit or sum(victim.nbytes for _, victim in found) >= nbytes > 0
    return found if is_enough else _in_order(connection, part, choice, among)


def _likely_last(
    connection: Connection, part: Part, nbytes: int, choice: Choice, among: Sequence[ColumnElement[bool]]
) -> _Rank | None:
    """Return a rank up to which there are enough parts, as a sample has it; None where all may be needed."""
    is_in_sample = Representation.address < _SAMPLE_END
    sample = _in_order(connection, part, choice, [*among, is_in_sample]) if nbytes else []
    sum_nbytes = 0
    for number, (rank, victim) in enumerate(sample, start=1):
        sum_nbytes += victim.nbytes
        promised = max(number / choice.limit, sum_nbytes / nbytes) * _SAMPLE_SHARE
        if promised >= 1.0 + 3.0 / math.sqrt(number):  # by three standard deviations more than is needed
            return rank
    return None


def _up_to(
    connection: Connection, part: Part, last: _Rank, choice: Choice, among: Sequence[ColumnElement[bool]]
) -> list[_Ranked]:
    """Return those of one kind of parts that go no later than `last`; none where they are too many to sort here."""
    most = 2 * choice.limit + _MANY
    statement = _candidates(part, choice, [*among, choice.is_before(part, last)])
    found = _fetch(connection, part, statement.limit(most))
    found.sort(key=itemgetter(0))  # in a third of the time that it takes SQLite
    return found[: choice.limit] if len(found) < most else []


def _in_order(
    connection: Connection, part: Part, choice: Choice, among: Sequence[ColumnElement[bool]]
) -> list[_Ranked]:
    """Return those of one kind of parts that may go, first those that go first."""
    statement = _candidates(part, choice, among)
    return _fetch(connection, part, statement.order_by("goes", "worth").limit(choice.limit))


def _fetch(
    connection: Connection, part: Part, statement: Select[Address, int, float, float, int, float]
) -> list[_Ranked]:
    return [
        ((group, value), Victim(address, part, nbytes, seconds, used_at, _REASONS[group]))
        for address, nbytes, seconds, used_at, group, value in connection.execute(statement).all()
    ]


def _candidates(
    part: Part, choice: Choice, among: Sequence[ColumnElement[bool]]
) -> Select[Address, int, float, float, int, float]:
    nbytes, group, value = type_coerce(NBYTES[part], Integer), choice.group.label("goes"), choice.value(part)
    columns = (Representation.address, nbytes, Representation.compute_seconds, USED_AT, group, value.label("worth"))
    return select(*columns).where(*_may_go(part), *among)


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
