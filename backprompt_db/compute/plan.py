"""What to compute, and in which passes: from texts to missing segments to packs. Knows tokens and graphs, no model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backprompt_db.errors import ContextLengthExceeded
from backprompt_db.representation import Part
from backprompt_db.text import Segment, ancestry

MAX_PACK_TOKENS = 2048
"""New tokens of a pass, unless one segment alone has more."""

MAX_WASTE_PER_TOKEN = 512
"""Key positions that a new token is multiplied with and may not see, on average over a pass. Beyond that, a pass of its
own is cheaper: a position costs `4 * hidden_size * num_layers` operations, a token twice the number of parameters."""


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward pass: the segments it computes, after the context that it brings in."""

    segments: tuple[Segment, ...]
    """Parents before children."""
    context: tuple[Segment, ...]
    """Every other segment that one of them sees, parents before children."""

    @property
    def needs(self) -> list[tuple[Segment, Part]]:
        """The parts that must be there before the pass: keys and values of the context, logits of the predictors."""
        return [(other, Part.KV) for other in self.context] + [(other, Part.LOGITS) for other in self.predictors]

    @property
    def predictors(self) -> tuple[Segment, ...]:
        """Segments of the context whose logits predict the first token of a segment of the pack."""
        inside = set(self.segments)
        single = (segment.parents[0] for segment in self.segments if len(segment.parents) == 1)
        return tuple(dict.fromkeys(parent for parent in single if parent not in inside))


def missing_segments(
    wanted: Mapping[Segment, Collection[Part]], *, is_stored: Callable[[Segment, Part], bool]
) -> list[Segment]:
    """Return the segments to compute so that every wanted part is there, parents before children.

    Computing a segment needs the keys and values of everything visible to it and, for the log-probability of its first
    token, its parent's logits; what of that is not stored is computed too.
    """
    needed = {segment: set(wanted.get(segment, ())) for segment in ancestry(wanted)}
    missing, context = [], set[Segment]()
    for segment in reversed(list(needed)):
        is_missing = any(not is_stored(segment, part) for part in needed[segment])
        if is_missing:
            missing.append(segment)
            if len(segment.parents) == 1:
                needed[segment.parents[0]].add(Part.LOGITS)
        if is_missing or segment in context:
            context.update(segment.parents)
            for parent in segment.parents:
                needed[parent].add(Part.KV)
    return missing[::-1]


def positions(segments: Iterable[Segment], num_tokens: Mapping[Segment, int]) -> dict[Segment, int]:
    """Return the position id of each segment's first token; `segments` come parents before children and complete."""
    starts: dict[Segment, int] = {}
    for segment in segments:
        ends = (starts[parent] + num_tokens[parent] for parent in segment.parents)
        starts[segment] = max(ends, default=0) if segment.start is None else segment.start
    return starts


def check_context_length(starts: Mapping[Segment, int], num_tokens: Mapping[Segment, int], limit: int | None) -> None:
    """Raise `ContextLengthExceeded` where a token would lie at position `limit` or beyond."""
    longest = max((start + num_tokens[segment] for segment, start in starts.items()), default=0)
    if limit is not None and longest > limit:
        raise ContextLengthExceeded(
            f"the prompt needs {longest:,} positions, this model takes {limit:,}",
            hint=f"Shorten it by {longest - limit:,} tokens, or use a model with a longer context.",
        )


def packs(
    missing: Sequence[Segment], num_tokens: Mapping[Segment, int], *, max_segments: int | None = None
) -> list[Pack]:
    """Divide the missing segments, given parents before children, into packs that are bounded in tokens and in waste.

    `max_segments=1` makes a pass for every segment.
    """
    divided: list[Pack] = []
    growing = _GrowingPack(num_tokens)
    for segment in missing:
        if growing.segments and not (len(growing.segments) != max_segments and growing.admits(segment)):
            divided.append(growing.pack())
            growing = _GrowingPack(num_tokens)
        growing.add(segment)
    return [*divided, growing.pack()] if growing.segments else divided


class _GrowingPack:
    """A pack being filled, with the running sums that bound it."""

    def __init__(self, num_tokens: Mapping[Segment, int]) -> None:
        self.segments: dict[Segment, None] = {}
        self._context: dict[Segment, None] = {}
        self._num_tokens = num_tokens
        self._visible: dict[Segment, int] = {}
        self._num_new = self._num_context = self._attended = 0

    def admits(self, segment: Segment) -> bool:
        num_new = self._num_new + self._num_tokens[segment]
        num_context = self._num_context + sum(self._num_tokens[other] for other in self._unseen(segment))
        attended = self._attended + self._area(segment)
        waste = num_new * num_context + num_new * num_new // 2 - attended
        return num_new <= MAX_PACK_TOKENS and waste <= num_new * MAX_WASTE_PER_TOKEN

    def add(self, segment: Segment) -> None:
        for other in self._unseen(segment):
            self._context[other] = None
            self._num_context += self._num_tokens[other]
        self.segments[segment] = None
        self._num_new += self._num_tokens[segment]
        self._attended += self._area(segment)

    def pack(self) -> Pack:
        return Pack(tuple(self.segments), tuple(_canonical(self._context)))

    def _unseen(self, segment: Segment) -> list[Segment]:
        """Ancestors of `segment` that are neither in the pack nor in its context yet."""
        unseen: dict[Segment, None] = {}
        stack = list(segment.parents)
        while stack:
            other = stack.pop()
            if other not in unseen and other not in self.segments and other not in self._context:
                unseen[other] = None
                stack.extend(other.parents)
        return list(unseen)

    def _area(self, segment: Segment) -> int:
        """Pairs of a new token and a position that it sees; exact for trees, too many after branches."""
        num_tokens = self._num_tokens[segment]
        return num_tokens * self._num_visible(segment) + num_tokens * num_tokens // 2

    def _num_visible(self, segment: Segment) -> int:
        stack = [segment]
        while stack:
            top = stack[-1]
            unknown = [parent for parent in top.parents if parent not in self._visible]
            if unknown:
                stack.extend(unknown)
            else:
                visible = sum(self._visible[parent] + self._num_tokens[parent] for parent in top.parents)
                self._visible[top] = min(visible, self._num_context + self._num_new)
                stack.pop()
        return self._visible[segment]


def _canonical(context: Collection[Segment]) -> list[Segment]:
    """Order a context by depth, then id: parents before children, whatever order the text was written in."""
    depths: dict[Segment, int] = {}
    for segment in ancestry(context):
        depths[segment] = max((depths[parent] + 1 for parent in segment.parents), default=0)
    return sorted(context, key=lambda segment: (depths[segment], segment.id))


def attention_mask(pack: Pack, num_tokens: Mapping[Segment, int]) -> npt.NDArray[np.bool_]:
    """Return who sees whom in a pack: `[new tokens, context tokens + new tokens]`, True where a token attends.

    A token attends to its segment's visible segments and to itself and earlier tokens of its own segment.
    """
    columns = [*pack.context, *pack.segments]
    index = {segment: number for number, segment in enumerate(columns)}
    between = np.zeros((len(columns), len(columns)), dtype=bool)
    for segment in ancestry(pack.segments):
        for parent in segment.parents:
            between[index[segment]] |= between[index[parent]]
            between[index[segment], index[parent]] = True
    column_of_token = np.repeat(np.arange(len(columns)), [num_tokens[segment] for segment in columns])
    num_context = sum(num_tokens[segment] for segment in pack.context)
    mask = between[column_of_token[num_context:]][:, column_of_token]
    for begin, segment in token_offsets(pack, num_tokens):
        end = begin + num_tokens[segment]
        mask[begin:end, num_context + begin : num_context + end] = np.tri(end - begin, dtype=bool)
    return mask


def token_offsets(pack: Pack, num_tokens: Mapping[Segment, int]) -> Iterator[tuple[int, Segment]]:
    """Yield where each segment of a pack begins among the pass's new tokens."""
    begin = 0
    for segment in pack.segments:
        yield begin, segment
        begin += num_tokens[segment]
