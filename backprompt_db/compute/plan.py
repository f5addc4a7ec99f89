"""What to compute, and in which passes: from wanted parts to missing segments to packs. Knows no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from backprompt_db.errors import ContextLengthExceeded, ModelMismatch
from backprompt_db.prompt.representation import Part
from backprompt_db.prompt.segments import Segment, ancestry

Need = tuple[Segment, Part]
"""One part of one segment."""

Wanted = Mapping[Segment, frozenset[Part]]
"""Parts that are wanted, by segment."""

MAX_PACK_TOKENS = 2048
"""New tokens of a pass, unless one segment alone has more: bounds the memory of its activations."""

MAX_PACK_PAIRS = 1 << 23
"""New tokens times all tokens of a pass, unless one segment alone has more: bounds the memory of its mask."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What passes of a model cost. The unit is the cost of multiplying one token with the weights."""

    tokens_per_pass: float = 32
    """The cost of one more pass, however short: reading the weights, and all else that its tokens do not change."""
    pairs_per_token: float = 4500
    """How many pairs of a new token and a key, visible or not, cost as much as one token."""

    @property
    def fair_share(self) -> float:
        """The extra cost of a token in passes of the best length, if there are enough tokens.

        A pass of N tokens that do not see each other wastes N pairs for each token. The sum of that waste and of the
        token's share of the pass is least for N = sqrt(tokens_per_pass * pairs_per_token).
        """
        return 2 * math.sqrt(self.tokens_per_pass / self.pairs_per_token)


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward pass: the segments that it computes, and the context that they see."""

    segments: tuple[Segment, ...]
    """Parents before children."""
    context: tuple[Segment, ...]
    """Every other segment that one of them sees, parents before children."""
    is_scored: bool = True
    """Whether the log-probabilities of its tokens are asked for, so that something must predict the first ones."""

    @property
    def needs(self) -> list[Need]:
        """The parts that a pass needs: keys and values of its context, logits of its predictors."""
        return [(other, Part.KV) for other in self.context] + [(other, Part.LOGITS) for other in self.predictors]

    @property
    def predictors(self) -> tuple[Segment, ...]:
        """Segments of the context whose logits predict the first token of a segment of the pack."""
        if not self.is_scored:
            return ()
        inside = set(self.segments)
        single = (segment.parents[0] for segment in self.segments if len(segment.parents) == 1)
        return tuple(dict.fromkeys(parent for parent in single if parent not in inside))


def missing_parts(
    wanted: Mapping[Segment, Collection[Part]], *, is_stored: Callable[[Segment, Part], bool]
) -> dict[Segment, frozenset[Part]]:
    """Return the segments to compute so that every wanted part is there, parents before children.

    Each comes with its parts that are needed and not stored. Computing a segment needs the keys and values of all
    segments that it sees and, for the log-probability of its first token, its parent's logits. Those that are not
    stored are computed too.
    """
    needed = {segment: set(wanted.get(segment, ())) for segment in ancestry(wanted)}
    missing, context = dict[Segment, frozenset[Part]](), set[Segment]()
    for segment in reversed(list(needed)):
        unstored = frozenset(part for part in needed[segment] if not is_stored(segment, part))
        if unstored:
            missing[segment] = unstored
            if len(segment.parents) == 1:
                needed[segment.parents[0]].add(Part.LOGITS)
        if unstored or segment in context:
            context.update(segment.parents)
            for parent in segment.parents:
                needed[parent].add(Part.KV)
    return dict(reversed(missing.items()))


def merged(each: Iterable[Wanted]) -> dict[Segment, frozenset[Part]]:
    """Return what is wanted by several together."""
    together: dict[Segment, frozenset[Part]] = {}
    for wanted in each:
        for segment, parts in wanted.items():
            together[segment] = parts | together.get(segment, frozenset())
    return together


def positions(segments: Iterable[Segment], num_tokens: Mapping[Segment, int]) -> dict[Segment, int]:
    """Return the position id of each segment's first token; `segments` are complete, parents before children."""
    starts: dict[Segment, int] = {}
    for segment in segments:
        ends = (starts[parent] + num_tokens[parent] for parent in segment.parents)
        starts[segment] = max(ends, default=0) if segment.start is None else segment.start
    return starts


def num_read(num_tokens: Mapping[Segment, int], *, produced: Mapping[Segment, frozenset[Part]]) -> dict[Segment, int]:
    """Return how many tokens of each segment the model reads, at most.

    The last token of a segment is predicted but not read if nothing follows it and only scores are wanted.
    """
    followed = {parent for segment in num_tokens for parent in segment.parents}
    ends = {segment for segment, parts in produced.items() if segment not in followed and parts <= {Part.SCORES}}
    return {segment: count - (segment in ends) for segment, count in num_tokens.items()}


def check_context_length(starts: Mapping[Segment, int], num_tokens: Mapping[Segment, int], limit: int | None) -> None:
    """Raise `ContextLengthExceeded` where a token would lie at position `limit` or beyond."""
    longest = max((start + num_tokens[segment] for segment, start in starts.items()), default=0)
    if limit is not None and longest > limit:
        raise ContextLengthExceeded(
            f"the prompt needs {longest:,} positions, this model takes {limit:,}",
            hint=f"Shorten it by {longest - limit:,} tokens, or use a model with a longer context.",
        )


def check_vocabulary(input_ids: Iterable[Sequence[int]], vocab_size: int) -> None:
    """Raise `ModelMismatch` for a token id that is not below `vocab_size`."""
    largest = max(max(ids) for ids in input_ids)
    if largest >= vocab_size:
        raise ModelMismatch(
            f"the tokenizer gives token id {largest}, the model reads ids below {vocab_size}",
            hint="Use the tokenizer that belongs to the model.",
        )


def packs(
    missing: Sequence[Segment],
    num_tokens: Mapping[Segment, int],
    *,
    costs: Costs = Costs(),
    max_segments: int | None = None,
    max_columns: int | None = None,
) -> list[Pack]:
    """Divide the missing segments, given parents before children, into packs that are cheap and bounded in memory.

    A segment joins a pack if the pairs that it wastes there, of tokens that may not see each other, cost less than its
    share of another pass. (Keys and values of the context cost the same either way: they stay in memory in between.)
    `max_segments=1` makes a pass for every segment. `max_columns` bounds the tokens of a pass of several segments,
    including its context.
    """
    divided: list[Pack] = []
    num_left = sum(num_tokens[segment] for segment in missing)
    growing = _GrowingPack(num_tokens, costs, max_columns)
    for segment in missing:
        if growing.segments and not (len(growing.segments) != max_segments and growing.admits(segment, num_left)):
            divided.append(growing.pack())
            growing = _GrowingPack(num_tokens, costs, max_columns)
        growing.add(segment)
        num_left -= num_tokens[segment]
    return [*divided, growing.pack()] if growing.segments else divided


class _GrowingPack:
    """A pack that is being filled, with the running sums that bound it."""

    def __init__(self, num_tokens: Mapping[Segment, int], costs: Costs, max_columns: int | None) -> None:
        self.segments: dict[Segment, None] = {}
        self._max_columns = math.inf if max_columns is None else max_columns
        self._context: dict[Segment, None] = {}
        self._costs = costs
        self._num_tokens = num_tokens
        self._visible: dict[Segment, int] = {}
        self._num_new = self._num_context = 0

    def admits(self, segment: Segment, num_left: int) -> bool:
        """Whether a segment should join this pack and not begin another; `num_left` tokens are in no pack yet."""
        num_tokens = self._num_tokens[segment]
        num_new = self._num_new + num_tokens
        num_columns = num_new + self._num_context + sum(self._num_tokens[other] for other in self._unseen(segment))
        if num_new > MAX_PACK_TOKENS or num_new * num_columns > MAX_PACK_PAIRS or num_columns > self._max_columns:
            return False
        num_pairs = num_new * num_columns - self._num_new * (self._num_new + self._num_context)
        waste = (num_pairs - self._area(segment)) / self._costs.pairs_per_token
        return waste <= num_tokens * max(self._costs.fair_share, self._costs.tokens_per_pass / num_left)

    def add(self, segment: Segment) -> None:
        for other in self._unseen(segment):
            self._context[other] = None
            self._num_context += self._num_tokens[other]
        self.segments[segment] = None
        self._num_new += self._num_tokens[segment]

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
        """Return the pairs of a token of the segment and one that it sees: exact for trees, too many after branches."""
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
    """Order a context by depth, then id: parents before children, and the same however the text was written."""
    depths: dict[Segment, int] = {}
    for segment in ancestry(context):
        depths[segment] = max((depths[parent] + 1 for parent in segment.parents), default=0)
    return sorted(context, key=lambda segment: (depths[segment], segment.id))


def num_chained(pack: Pack, num_whole: int) -> int:
    """Return how many of a pack's first `num_whole` segments see everything before them in the pass's buffer.

    Only these can be the context of a later pass, in this order; what follows them are branches.
    """
    number = 0
    for segment in pack.segments[:num_whole]:
        if number:
            sees_all = segment.parents == (pack.segments[number - 1],)
        else:
            sees_all = len(ancestry([segment])) == len(pack.context) + 1
        if not sees_all:
            break
        number += 1
    return number


def fed_lengths(
    pack: Pack, lengths: Mapping[Segment, int], produce: Mapping[Segment, frozenset[Part]]
) -> dict[Segment, int]:
    """Return how many tokens of each segment go through the model.

    The last token of a segment predicts what comes after it. If nothing does and only scores are wanted, the token is
    not computed: the score of a label of one token is read from the logits before it.
    """
    followed = {parent for segment in ancestry(pack.segments) for parent in segment.parents}
    return {
        segment: lengths[segment] - (segment not in followed and produce[segment] <= {Part.SCORES})
        for segment in pack.segments
    }


def token_offsets(pack: Pack, num_tokens: Mapping[Segment, int]) -> Iterator[tuple[int, Segment]]:
    """Yield each segment of a pack with the index of its first token among the pass's new tokens."""
    begin = 0
    for segment in pack.segments:
        yield begin, segment
        begin += num_tokens[segment]


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a text may be; None where there is no limit."""

    max_positions: int | None
    max_columns: int | None
    """Tokens that it may have in one pass, including those of parallel branches."""
