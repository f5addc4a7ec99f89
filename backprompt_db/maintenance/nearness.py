"""The stored prompt nearest to a segment: of those that end with its string the one that is the same for longest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from backprompt_db.explanation import Difference
from backprompt_db.text import Segment, ancestry

_NUM_CONTEXT_CHARACTERS = 24


class Near(NamedTuple):
    """The nearest stored segment with the same string."""

    segment: Segment
    difference: Difference | None
    """None where all characters up to its end are the same."""


class StoredPrompts:
    """Stored segments, and whether they are of the model and tokenizer in question, which then come first."""

    def __init__(self, stored: Mapping[Segment, bool]) -> None:
        self._by_string: dict[str, list[Segment]] = {}
        for segment in sorted(stored, key=lambda segment: not stored[segment]):
            self._by_string.setdefault(segment.string, []).append(segment)
        self._is_own = stored
        self._found: dict[Segment, Near] = {}

    def nearest(self, segment: Segment) -> Near | None:
        """Return what is nearest to a segment, None where nothing has its string. Parents are asked for first.

        What goes on from the prompt that was nearest to the parents is nearest.
        """
        namesakes = self._by_string.get(segment.string, [])
        if not namesakes:
            return None
        before = [self._found[parent] for parent in segment.parents if parent in self._found]
        following = [each for each in namesakes if any(near.segment in each.parents for near in before)]
        if following and len(segment.parents) == 1 and _is_whole(before[0].difference):
            # What is shown does not change any more. Joining all pieces for each of many would take long.
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
    """Whether as much is shown of both prompts as ever is."""
    return difference is not None and min(len(difference.stored), len(difference.given)) == _NUM_CONTEXT_CHARACTERS
