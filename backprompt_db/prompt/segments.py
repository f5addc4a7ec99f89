"""The graph that a text means: each leaf string in its place, linked to the segments that it directly follows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from backprompt_db.prompt.ids import SegmentId, namespace_id, segment_id
from backprompt_db.views.formatting import shortened


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One leaf string of a text in its place. Two segments are equal when their ids are."""

    id: SegmentId
    string: str
    parents: tuple[Segment, ...] = field(repr=False)
    """The segments that this one directly follows, in the order written."""
    start: int | None
    """The explicit position id of the first token, or None where it follows from the parents."""
    namespace: str

    @classmethod
    def after(cls, parents: tuple[Segment, ...], string: str, *, start: int | None, namespace: str) -> Segment:
        """Place `string` directly after `parents`; without parents it begins a prompt of `namespace`."""
        root = None if parents else namespace_id(namespace)
        parent_ids = (root,) if root else tuple(parent.id for parent in parents)
        return cls(segment_id(string, parents=parent_ids, start=start), string, parents, start, namespace)

    @property
    def parent_ids(self) -> tuple[SegmentId, ...]:
        """The ids that enter this segment's own id, ascending; a namespace counts as the parent of a first segment."""
        root = None if self.parents else namespace_id(self.namespace)
        return (root,) if root else tuple(sorted({parent.id for parent in self.parents}))

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, Segment) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        start = "" if self.start is None else f", start={self.start}"
        namespace = f", namespace={self.namespace!r}" if self.namespace else ""
        string = shortened(self.string, num_characters=_NUM_REPR_CHARACTERS)
        return f"<Segment {self.id.hex()[:_NUM_ID_DIGITS]} {string!r}{start}{namespace}>"


def ancestry(tips: Iterable[Segment], *, without: Iterable[Segment] = ()) -> list[Segment]:
    """Return `tips` and all their ancestors, each once, parents before children, otherwise in the order written.

    The segments `without` are left out, and so are ancestors that are reached only through them.
    """
    done: dict[Segment, None] = dict.fromkeys(without)
    num_left_out = len(done)
    stack = [(tip, False) for tip in reversed(list(tips))]
    while stack:
        segment, parents_done = stack.pop()
        if segment in done:
            continue
        if parents_done:
            done[segment] = None
        else:
            stack.append((segment, True))
            stack.extend((parent, False) for parent in reversed(segment.parents))
    return list(done)[num_left_out:]


class SeamRule(StrEnum):
    """What is done where the pieces of a text have other tokens than its joined string."""

    HEAL = "heal"
    """The tokens of the joined string are run: a cut is moved to where no token crosses it."""
    KEEP = "keep"
    """The pieces are run as they were written, each tokenised alone."""
    ERROR = "error"
    """The text is refused."""


@dataclass(frozen=True, slots=True)
class Seam:
    """A place between two pieces where their tokens differ from those of the joined string."""

    left: str
    """The end of the text before the seam."""
    right: str
    """The beginning of the text after it."""
    tokens_apart: tuple[str, ...]
    """The tokens of the two sides when each is tokenised alone: what the model sees."""
    tokens_joined: tuple[str, ...]
    """The tokens of the two sides as one string: what the model would see if they were one piece."""

    def __str__(self) -> str:
        apart, joined = self.changed()
        return f"{self.left[-_NUM_SHOWN:]!r} + {self.right[:_NUM_SHOWN]!r} is {apart}, joined {joined}"

    def changed(self) -> tuple[str, str]:
        """Return the tokens apart and joined, without what they have in common at both ends."""
        apart, joined = self.tokens_apart, self.tokens_joined
        begin = _num_common(apart, joined)
        end = _num_common(apart[begin:][::-1], joined[begin:][::-1])
        return _shown(apart[begin : len(apart) - end]), _shown(joined[begin : len(joined) - end])

    @property
    def moved(self) -> str:
        """The end of the left side that becomes part of other tokens: what healing moves across the seam."""
        num_same = _num_common(self.tokens_apart, self.tokens_joined)
        return self.left[len("".join(self.tokens_apart[:num_same])) :]


_NUM_SHOWN = 20
_NUM_ID_DIGITS = 12
_NUM_REPR_CHARACTERS = 60


def _shown(tokens: Sequence[str]) -> str:
    return " ".join(map(repr, tokens))


def _num_common(one: Sequence[str], other: Sequence[str]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (left, right) in pairs if left != right), min(len(one), len(other)))
