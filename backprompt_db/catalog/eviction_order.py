"""What is evicted first when a database is full."""

from __future__ import annotations

import contextlib
import heapq
import math
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, TypeAlias

from sqlalchemy import ColumnElement, Connection, and_, case, false, func, or_, select, type_coerce

from backprompt_db.catalog.changes import forget
from backprompt_db.catalog.columns import Number
from backprompt_db.catalog.connection import CatalogFile
from backprompt_db.catalog.graph import chunks
from backprompt_db.catalog.records import EXPIRED, ROOM, VALUE, EvictionCandidate, Selection
from backprompt_db.catalog.schema import NBYTES, USED_AT, Representation
from backprompt_db.catalog.selection import conditions
from backprompt_db.prompt.representation import Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import Select

    from backprompt_db.prompt.ids import Address

CANDIDATES_PER_CALL = 100_000
"""How many parts one call returns at most, unless it says another limit."""

_HALVING_SECONDS = 86_400.0
"""A part that was not used for this long is worth half of what it was."""

_EXPIRED, _OLD, _YOUNG = range(3)
"""In which order the groups go, whatever their parts are worth."""

_REASONS = {_EXPIRED: EXPIRED, _OLD: VALUE, _YOUNG: ROOM}

_SAMPLE_SHARE = 256
_SAMPLE_END = b"\1"
"""One address in `_SAMPLE_SHARE` lies below this. Addresses are digests, so those are a random sample."""

_MANY = 10_000

_Rank: TypeAlias = tuple[int, float]
_Ranked: TypeAlias = tuple[_Rank, EvictionCandidate]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """By what parts are chosen to be evicted. Times are POSIX seconds."""

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
        """Whether a part goes no later than one of that rank. Expired parts always do."""
        group, value = rank
        if group == _EXPIRED:
            return self.is_expired
        is_worth_less = self.value(part) <= value
        return or_(self.is_expired, and_(self.is_old, is_worth_less) if group == _OLD else self.is_old | is_worth_less)

    def value(self, part: Part) -> ColumnElement[float]:
        """Return what a part is worth: seconds of computation per byte, the less the longer it was not used."""
        age = func.max(0.0, self.at - USED_AT) / _HALVING_SECONDS  # a clock may have been set back
        nbytes = _LEAST_NBYTES if part is Part.CONTINUATIONS else NBYTES[part]
        return Representation.compute_seconds / func.max(nbytes, 1) / (1.0 + age)


class EvictionOrder(CatalogFile):
    """The part of a catalog that says what is evicted first."""

    def eviction_order(
        self,
        nbytes: int,
        *,
        at: float,
        grace_seconds: float,
        ttl_seconds: float | None = None,
        selection: Selection | None = None,
        limit: int = CANDIDATES_PER_CALL,
    ) -> list[EvictionCandidate]:
        """Return what may go: all that is expired, then the least valuable parts until their sizes sum to `nbytes`.

        With `nbytes=0` only what is expired: what was not used for longer than `ttl_seconds`. A part's value is the
        seconds that computing it took, per byte, and falls with the time since it was used. Parts that were used within
        `grace_seconds` come last, and pinned ones never. Keys and values come only when no following segment has any:
        those before them are candidates in a later call. `selection` restricts the choice; it raises what `select`
        raises.
        """
        choice = _Choice(at=at, grace_seconds=grace_seconds, ttl_seconds=ttl_seconds, limit=limit)
        with self.reading() as connection:
            return _first_to_go(connection, nbytes, choice, among=conditions(connection, selection or Selection()))

    def rehearse(
        self,
        nbytes: int,
        *,
        at: float,
        grace_seconds: float,
        ttl_seconds: float | None = None,
        selection: Selection | None = None,
        limit: int = CANDIDATES_PER_CALL,
    ) -> list[EvictionCandidate]:
        """Return all that would go if the first were evicted, call by call, until `nbytes` are free. Changes nothing.

        Takes the arguments of `eviction_order`, `limit` being that of one call, and raises the same errors.
        """
        choice = _Choice(at=at, grace_seconds=grace_seconds, ttl_seconds=ttl_seconds, limit=limit)
        gone = list[EvictionCandidate]()
        with contextlib.suppress(_Undone), self.writing() as connection:
            among = conditions(connection, selection or Selection())
            while some := _first_to_go(connection, max(0, nbytes - sum(c.nbytes for c in gone)), choice, among=among):
                gone += some
                forget(connection, [candidate.key for candidate in some])
            raise _Undone
        return gone

    def removable(self, keys: Iterable[tuple[Address, Part]]) -> set[tuple[Address, Part]]:
        """Return which of some parts may go at this moment, whenever they were chosen.

        Such a part is recorded, its representation is not pinned, and if it is keys and values, none of a following
        segment are recorded.
        """
        addresses: dict[Part, set[Address]] = {part: set() for part in NBYTES}
        for address, part in keys:
            addresses[part].add(address)
        with self.reading() as connection:
            return {
                (address, part)
                for part, given in addresses.items()
                for some in chunks(given)
                for address in connection.execute(_ADDRESSES.where(_ADDRESS.in_(some), *_may_go(part))).scalars()
            }


class _Undone(Exception):
    """Takes back what a transaction has changed."""


def _first_to_go(
    connection: Connection, nbytes: int, choice: _Choice, *, among: Sequence[ColumnElement[bool]]
) -> list[EvictionCandidate]:
    """Return what is expired, then the least valuable parts until their sizes sum to `nbytes`.

    Pinned parts never go, and keys and values only if no others build on them.
    """
    only_expired = [] if nbytes else [choice.is_expired]
    found = [_ranked(connection, part, nbytes, choice, [*among, *only_expired]) for part in NBYTES]
    chosen, sum_nbytes = list[EvictionCandidate](), 0
    for (group, _), candidate in heapq.merge(*found, key=itemgetter(0)):
        if len(chosen) == choice.limit or (group != _EXPIRED and sum_nbytes >= nbytes):
            break
        chosen.append(candidate)
        sum_nbytes += candidate.nbytes
    return chosen


def _ranked(
    connection: Connection, part: Part, nbytes: int, choice: _Choice, among: Sequence[ColumnElement[bool]]
) -> list[_Ranked]:
    """Return as many parts of one kind as may have to go, in the order in which they go."""
    # Sorting all of them takes most of the time, and no index helps: the order changes as time goes by.
    last = _likely_last(connection, part, nbytes, choice, among)
    found = [] if last is None else _up_to(connection, part, last, choice, among)
    is_enough = len(found) == choice.limit or sum(candidate.nbytes for _, candidate in found) >= nbytes > 0
    return found if is_enough else _in_order(connection, part, choice, among)


def _likely_last(
    connection: Connection, part: Part, nbytes: int, choice: _Choice, among: Sequence[ColumnElement[bool]]
) -> _Rank | None:
    """Return a rank up to which there are enough parts, going by a sample; None where all may be needed."""
    is_in_sample = Representation.address < _SAMPLE_END
    sample = _in_order(connection, part, choice, [*among, is_in_sample]) if nbytes else []
    sum_nbytes = 0
    for number, (rank, candidate) in enumerate(sample, start=1):
        sum_nbytes += candidate.nbytes
        promised = max(number / choice.limit, sum_nbytes / nbytes) * _SAMPLE_SHARE
        if promised >= 1.0 + 3.0 / math.sqrt(number):  # three standard deviations more than needed
            return rank
    return None


def _up_to(
    connection: Connection, part: Part, last: _Rank, choice: _Choice, among: Sequence[ColumnElement[bool]]
) -> list[_Ranked]:
    """Return the parts of one kind that go no later than `last`; none where they are too many to sort here."""
    most = 2 * choice.limit + _MANY
    statement = _candidates(part, choice, [*among, choice.is_before(part, last)])
    found = _fetch(connection, part, statement.limit(most))
    found.sort(key=itemgetter(0))  # takes a third of the time that SQLite would take
    return found[: choice.limit] if len(found) < most else []


def _in_order(
    connection: Connection, part: Part, choice: _Choice, among: Sequence[ColumnElement[bool]]
) -> list[_Ranked]:
    """Return the parts of one kind that may go, in the order in which they go."""
    statement = _candidates(part, choice, among)
    return _fetch(connection, part, statement.order_by("goes", "worth").limit(choice.limit))


def _fetch(
    connection: Connection, part: Part, statement: Select[Address, int, float, float, int, float]
) -> list[_Ranked]:
    return [
        ((group, value), EvictionCandidate(address, part, nbytes, seconds, used_at, _REASONS[group]))
        for address, nbytes, seconds, used_at, group, value in connection.execute(statement).all()
    ]


def _candidates(
    part: Part, choice: _Choice, among: Sequence[ColumnElement[bool]]
) -> Select[Address, int, float, float, int, float]:
    nbytes, group, value = type_coerce(NBYTES[part], Number), choice.group.label("goes"), choice.value(part)
    columns = (Representation.address, nbytes, Representation.compute_seconds, USED_AT, group, value.label("worth"))
    return select(*columns).where(*_may_go(part), *among)


_LEAST_NBYTES: ColumnElement[int] = func.min(*(func.coalesce(each, 2**62) for each in NBYTES.values()))
"""The bytes of the smallest stored part. Continuations count as so many, however much they have grown: they go last."""

_ADDRESS = Representation.address
_ADDRESSES = select(_ADDRESS)


def _may_go(part: Part) -> list[ColumnElement[bool]]:
    is_stored, is_free = NBYTES[part].is_not(None), Representation.is_pinned.is_(False)
    return [is_stored, is_free, *([Representation.num_kv_children == 0] if part is Part.KV else [])]
