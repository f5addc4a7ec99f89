"""Which parts of what a call computes are stored.

Scores are small and always are. Keys, values and logits are stored where something follows or may follow: of texts that
others begin with, and of the first continuation of a text, as a document or a chat grows. Of its further continuations,
and of prompts of which only completions are scored, they are stored when they are computed for the second time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backprompt_db.compute.call import Addresses
from backprompt_db.compute.healing import Ending
from backprompt_db.compute.plan import Wanted
from backprompt_db.errors import PromptError
from backprompt_db.prompt.ids import SegmentId
from backprompt_db.prompt.representation import OWN_PARTS, Part
from backprompt_db.prompt.segments import Segment, ancestry
from backprompt_db.store.contract import Key

if TYPE_CHECKING:
    from backprompt_db.database.database import Database

PARTS = tuple(part.name.lower() for part in OWN_PARTS)
"""The names that people give the parts of a segment itself."""

AUTO = "auto"

_ALL, _SCORES = frozenset(OWN_PARTS), frozenset({Part.SCORES})
_MAX_REMEMBERED = 1 << 18


@dataclass(frozen=True, slots=True)
class Keep:
    """What a caller wants to have stored of the texts that it runs."""

    parts: frozenset[Part] | None
    """These parts of each segment; None for those that may be needed again."""

    @classmethod
    def named(cls, keep: str | Iterable[str]) -> Keep:
        """Return what `keep=` means: `"auto"`, `"all"`, or names of parts. Raises `PromptError` for anything else."""
        if isinstance(keep, str):
            keep = PARTS if keep == "all" else [keep]
        names = list(keep)
        if names == [AUTO]:
            return cls(None)
        if not names or not set(PARTS) >= set(names):
            raise PromptError(
                f"keep={names!r} are no parts", hint=f"Give 'auto', 'all', or some of {', '.join(PARTS)}."
            )
        return cls(frozenset(Part[name.upper()] for name in names))


class Keeper:
    """Decides what is stored, by what a database has and by what this process has run. For one model."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._first: dict[tuple[SegmentId, ...], SegmentId | None] = {}
        """By the ids of its parents, the first continuation of a text; None where several came together."""

    def of_run(self, tips: Iterable[Segment], keep: Keep, addresses: Addresses) -> Wanted:
        """Return the parts to store of segments that are run up to `tips`; all of their own of any others."""
        segments = ancestry(tips)
        if keep.parts is not None:
            return dict.fromkeys(segments, keep.parts)
        self._remember(segments)
        ends = [each for each in _ends(segments) if not self._was_computed(each, addresses)]
        return dict.fromkeys([end for end in ends if not self._is_first(end)], _SCORES)

    def to_warm(self, tips: Iterable[Segment], keep: Keep) -> Wanted:
        """Return the parts of each segment up to `tips` that running them may need, as long as nothing follows."""
        segments = ancestry(tips)
        if keep.parts is not None:
            return dict.fromkeys(segments, keep.parts)
        self._remember(segments)
        further = [end for end in _ends(segments) if not self._is_first(end)]
        return dict.fromkeys(segments, _ALL) | dict.fromkeys(further, _SCORES | {Part.LOGITS})

    def of_endings(self, endings: Sequence[Ending], keep: Keep, addresses: Addresses) -> Wanted:
        """Return the parts to store where completions are scored: of these, only scores."""
        scored = dict.fromkeys([each for some in endings for each in (*some.segments, *some.without)], _SCORES)
        segments = ancestry(scored)
        self._remember(segments)
        before = [each for each in segments if each not in scored]
        if keep.parts is not None:
            return dict.fromkeys(before, keep.parts) | scored
        ends = [end for end in _ends(before) if not self._was_computed(end, addresses)]
        return dict.fromkeys(ends, _SCORES) | scored

    def _was_computed(self, segment: Segment, addresses: Addresses) -> bool:
        """Whether a segment that must be computed had been before: its scores are stored, and no more of it."""
        return self._db.has(Key(addresses.address(segment), Part.SCORES))

    def _remember(self, segments: Sequence[Segment]) -> None:
        """Remember how texts go on here: what the catalog knows comes later, when it is written."""
        if len(self._first) > _MAX_REMEMBERED:
            self._first.clear()
        together = Counter(segment.parent_ids for segment in segments)
        for segment in segments:
            self._first.setdefault(segment.parent_ids, segment.id if together[segment.parent_ids] == 1 else None)

    def _is_first(self, end: Segment) -> bool:
        """Whether a segment begins a prompt, or its parents have not gone on in any other way."""
        if not end.parents:
            return True
        is_first = self._first.get(end.parent_ids) == end.id
        return is_first and not self._db.catalogs.is_continued(end.parent_ids, besides=end.id)


def _ends(segments: Sequence[Segment]) -> list[Segment]:
    """Return the segments that none of the others follows."""
    followed = {parent for segment in segments for parent in segment.parents}
    return [segment for segment in segments if segment not in followed]
