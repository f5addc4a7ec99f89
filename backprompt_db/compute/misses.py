"""Why parts of a text are not stored, by what the catalogs of a database know. Nothing is changed or counted."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from backprompt_db.compute.pace import weighted_median
from backprompt_db.errors import CatalogError
from backprompt_db.prompt.explanation import Difference, Miss, Reason, SeenUnder
from backprompt_db.prompt.ids import Address, ModelIds
from backprompt_db.prompt.representation import Part
from backprompt_db.prompt.segments import Segment, ancestry

if TYPE_CHECKING:
    from backprompt_db.catalog.catalog import Catalog
    from backprompt_db.catalog.records import ModelRecord, Row
    from backprompt_db.database.database import Database
    from backprompt_db.prompt.ids import SegmentId, WeightsId


logger = logging.getLogger(__name__)

_NUM_CONTEXT_CHARACTERS = 24
_NUM_EVENTS = 1_000
_QUARANTINE = "quarantine"

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class MissingSegment:
    """A segment with parts that a run needs and that are not stored."""

    segment: Segment
    address: Address
    needed: tuple[Part, ...]
    present: frozenset[Part]


class _Removal(NamedTuple):
    """When and why a part of a representation was removed."""

    at: float
    reason: Reason
    detail: str | None


class Records:
    """What the catalogs of a database, and of the one below it, say about the segments of one text.

    Only the text's own namespace is looked at.
    """

    def __init__(self, db: Database, ids: ModelIds, segments: Sequence[Segment]) -> None:
        self._db = db
        self._ids = ids
        self._segments = segments
        self._by_segment = _by_segment(self._rows([segment.id for segment in segments]))

    def row(self, segment: Segment) -> Row | None:
        """Return the row of a segment under the model and tokenizer of the text, the database's own first."""
        rows = self._by_segment.get(segment.id, [])
        return next((row for row in rows if _ids_of(row) == self._ids), None)

    def model(self, weights_id: WeightsId) -> ModelRecord | None:
        """Return the record of a model; its name is `""` where the catalog knows no more than that it was used."""
        records = [record for record in self._ask(lambda catalog: catalog.model(weights_id)) if record is not None]
        return next((record for record in records if record.name), records[0] if records else None)

    def seconds_per_token(self) -> float | None:
        """Return the seconds that computing a token took lately, as a rule; None where nothing was recorded."""
        timings = self._db.catalogs.timings(self._ids.weights_id)
        return weighted_median(timings) if timings else None

    def misses(self, missing: Sequence[MissingSegment]) -> dict[Segment, Miss]:
        """Return why each of them is missing. All texts are looked at, once, only if nothing else explains a miss."""
        removals = self._removals([each.address for each in missing])
        found = {
            each.segment: self._own_miss(each, removals.get(each.address, ())) or self._miss_elsewhere(each)
            for each in missing
        }
        rest = [each for each in missing if found[each.segment] is None]
        moved = self._moved(rest)
        return {segment: miss or moved[segment] for segment, miss in found.items()}

    def _own_miss(self, missing: MissingSegment, removals: Iterable[_Removal]) -> Miss | None:
        """Explain a miss by what happened to parts that were stored under the same address; None if none were."""
        row = self.row(missing.segment)
        recent = [removal for removal in removals if row is None or removal.at >= row.created_at]
        if recent:
            last = max(recent, key=lambda removal: removal.at)
            return Miss(needed=missing.needed, reason=last.reason, at=last.at, detail=last.detail)
        if row is not None and any(part in row.nbytes for part in missing.needed):
            return Miss(needed=missing.needed, reason=Reason.LOST)
        return Miss(needed=missing.needed, reason=Reason.NOT_KEPT) if missing.present else None

    def _removals(self, addresses: Sequence[Address]) -> dict[Address, list[_Removal]]:
        """Return when parts of representations were evicted or quarantined. Some of the keys are other addresses."""
        found: dict[Address, list[_Removal]] = {}
        for evictions in self._ask(lambda catalog: catalog.evictions(addresses)):
            for evicted, at in evictions.items():
                found.setdefault(evicted, []).append(_Removal(at, Reason.EVICTED, None))
        recorded = self._ask(lambda catalog: catalog.events(limit=_NUM_EVENTS))
        for at, kind, address, detail in itertools.chain(*recorded, self._db.tally.untold):
            if kind == _QUARANTINE and address is not None:
                found.setdefault(address, []).append(_Removal(at, Reason.QUARANTINED, detail))
        return found

    def _miss_elsewhere(self, missing: MissingSegment) -> Miss | None:
        """Explain a miss by the other models or tokenizers that computed the segment; None if none did."""
        seen = self._seen_under(self._by_segment.get(missing.segment.id, []))
        retokenised = tuple(under for under in seen if under.weights_id == self._ids.weights_id)
        if retokenised:
            return Miss(needed=missing.needed, reason=Reason.OTHER_TOKENIZER, seen_under=retokenised)
        return Miss(needed=missing.needed, reason=Reason.OTHER_MODEL, seen_under=seen) if seen else None

    def _seen_under(self, rows: Iterable[Row]) -> tuple[SeenUnder, ...]:
        distinct = dict.fromkeys(map(_ids_of, rows))
        models = {weights_id: self.model(weights_id) for weights_id, _ in distinct}
        return tuple(
            SeenUnder(
                model_name=(record.name or None) if (record := models[ids.weights_id]) else None,
                dtype=(record.dtype or None) if record else None,
                weights_id=ids.weights_id,
                tokenizer_id=ids.tokenizer_id,
            )
            for ids in distinct
        )

    def _moved(self, missing: Sequence[MissingSegment]) -> dict[Segment, Miss]:
        """Explain misses of strings that were computed in other places, in the same namespace only."""
        if not missing:
            return {}
        strings = {each.segment.string for each in missing}
        answers = self._ask(lambda catalog: catalog.namesakes(strings, self._ids, self._segments))
        stored = StoredPrompts(dict(itertools.chain(*(answer.items() for answer in reversed(answers)))))
        nearest = {each.segment: stored.nearest(each.segment) for each in missing}  # parents before children
        rows = _by_segment(self._rows([near.segment.id for near in nearest.values() if near is not None]))
        return {each.segment: self._moved_miss(each, nearest[each.segment], rows) for each in missing}

    def _moved_miss(self, missing: MissingSegment, near: Near | None, rows: Mapping[SegmentId, Sequence[Row]]) -> Miss:
        if near is None:
            is_known = self._db.catalog is not None
            return Miss(needed=missing.needed, reason=Reason.NEVER_SEEN if is_known else Reason.UNKNOWN)
        found = rows.get(near.segment.id, ())
        is_own = any(_ids_of(row) == self._ids for row in found)
        return Miss(
            needed=missing.needed,
            reason=Reason.OTHER_PARENTS,
            seen_under=() if is_own else self._seen_under(found),
            difference=near.difference,
        )

    def _rows(self, ids: Sequence[SegmentId]) -> list[Row]:
        return [row for rows in self._ask(lambda catalog: list(catalog.of_segments(ids))) for row in rows]

    def _ask(self, read: Callable[[Catalog], _Answer]) -> list[_Answer]:
        """Return what each catalog says; one that cannot be read says nothing."""
        answers = []
        for catalog in self._db.catalogs:
            try:
                answers.append(read(catalog))
            except CatalogError as error:
                logger.warning("the catalog cannot be read: %s", error)
        return answers


def _ids_of(row: Row) -> ModelIds:
    return ModelIds(row.weights_id, row.tokenizer_id)


def _by_segment(rows: Iterable[Row]) -> dict[SegmentId, list[Row]]:
    """Group rows by their segments."""
    groups: dict[SegmentId, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.segment_id, []).append(row)
    return groups


class Near(NamedTuple):
    """The stored segment with the same string whose prompt is most like the given one."""

    segment: Segment
    difference: Difference | None
    """None where both prompts have the same characters up to the segment's end."""


class StoredPrompts:
    """Stored segments; those of the model and tokenizer in question come first."""

    def __init__(self, stored: Mapping[Segment, bool]) -> None:
        self._by_string: dict[str, list[Segment]] = {}
        for segment in sorted(stored, key=lambda segment: not stored[segment]):
            self._by_string.setdefault(segment.string, []).append(segment)
        self._is_own = stored
        self._found: dict[Segment, Near] = {}

    def nearest(self, segment: Segment) -> Near | None:
        """Return what is nearest to a segment, None where no stored segment has its string.

        Ask for parents before children: what continues the prompt that was nearest to the parents is nearest.
        """
        namesakes = self._by_string.get(segment.string, [])
        if not namesakes:
            return None
        before = [self._found[parent] for parent in segment.parents if parent in self._found]
        following = [each for each in namesakes if any(near.segment in each.parents for near in before)]
        if following and len(segment.parents) == 1 and _is_whole(before[0].difference):
            # The part that is shown stays the same. Joining all pieces again for each of many segments would take long.
            near = Near(following[0], before[0].difference)
        else:
            near = _compare(segment, following or self._own(namesakes) or namesakes)
        self._found[segment] = near
        return near

    def _own(self, segments: Iterable[Segment]) -> list[Segment]:
        return [segment for segment in segments if self._is_own[segment]]


def _compare(segment: Segment, stored: Iterable[Segment]) -> Near:
    given = _joined(segment)
    joined = {each: _joined(each) for each in stored}
    nearest = max(joined, key=lambda each: _num_common(joined[each], given))
    return Near(nearest, _difference(joined[nearest], given))


def _joined(segment: Segment) -> str:
    return "".join(each.string for each in ancestry([segment]))


def _num_common(one: str, other: str) -> int:
    """Return how many characters two strings have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices are compared many characters at a time
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _difference(stored: str, given: str) -> Difference | None:
    if stored == given:
        return None
    at = _num_common(stored, given)
    end = at + _NUM_CONTEXT_CHARACTERS
    return Difference(at, stored[max(0, at - _NUM_CONTEXT_CHARACTERS) : at], stored[at:end], given[at:end])


def _is_whole(difference: Difference | None) -> bool:
    """Whether the difference already shows as many characters of both prompts as it may."""
    return difference is not None and min(len(difference.stored), len(difference.given)) == _NUM_CONTEXT_CHARACTERS
