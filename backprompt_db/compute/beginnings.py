"""Segments that others begin with, token for token: all but the logits after them is taken out of those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backprompt_db.compute import plan
from backprompt_db.compute.plan import Pack
from backprompt_db.compute.prefill import Prefill
from backprompt_db.prompt.representation import Array, Arrays, Part
from backprompt_db.prompt.segments import Segment, ancestry

if TYPE_CHECKING:
    from backprompt_db.compute.inference.runner import ModelRunner
    from backprompt_db.compute.tokens import SegmentTokenizer


@dataclass(frozen=True, slots=True)
class Beginning:
    """A segment that is the beginning of another one; its last word makes the logits after it."""

    segment: Segment
    input_ids: Sequence[int]
    rest: Segment
    """The segment without its last word."""
    last: Segment
    """Its last word, after the rest."""

    @classmethod
    def of(cls, segment: Segment, tokenizer: SegmentTokenizer) -> Beginning | None:
        """Return how to take a segment out of another one; None where it cannot be cut before its last word."""
        for word in reversed(tokenizer.words(segment.string)):
            rest = Segment.after(
                segment.parents, segment.string[:word], start=segment.start, namespace=segment.namespace
            )
            last = Segment.after((rest,), segment.string[word:], start=None, namespace=segment.namespace)
            ids = tokenizer.encode([segment, rest, last])
            if ids[rest] + ids[last] == ids[segment]:
                return cls(segment, ids[segment], rest, last)
        return None

    @property
    def num_tokens(self) -> int:
        """How many tokens the segment has."""
        return len(self.input_ids)

    def is_that_of(self, scores: Arrays) -> bool:
        """Whether the tokens of another segment, by its scores, begin with those of this one."""
        ids: list[int] = scores["input_ids"].numpy()[: self.num_tokens].tolist()
        return ids == list(self.input_ids)

    def prefill(self, tokenizer: SegmentTokenizer, runner: ModelRunner) -> Prefill:
        """Return the one pass that makes the logits after the last word."""
        wanted = {self.last: frozenset({Part.LOGITS})}
        segments = ancestry([self.last])
        input_ids = tokenizer.encode(segments)
        starts = plan.positions(segments, {segment: len(ids) for segment, ids in input_ids.items()})
        pack = Pack((self.last,), tuple(segments[:-1]), is_scored=False)
        return Prefill(
            packs=[pack],
            input_ids=input_ids,
            starts=starts,
            wanted=wanted,
            missing=wanted,
            keep={self.last: frozenset()},
            is_deterministic=False,
            runner=runner,
        )


def first_tokens(kv: Arrays, num_tokens: int) -> Arrays:
    """Return the keys and values [num_layers, num_kv_heads, T, head_dim] of the first tokens."""
    return {name: Array.from_torch(array.torch()[:, :, :num_tokens]) for name, array in kv.items()}


def first_scores(scores: Arrays, num_tokens: int) -> Arrays:
    """Return the tokens and log-probabilities [T] of the first tokens."""
    return {name: Array.from_torch(array.torch()[:num_tokens]) for name, array in scores.items()}
