"""Pictures of prompts: of segments about which nothing is known, of an explanation, and of the result of a run."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from backprompt_db.prompt.explanation import why
from backprompt_db.views.picture import Picture
from backprompt_db.views.scene import PicturedSegment, ScoredSegment, State, Unit

if TYPE_CHECKING:
    from backprompt_db.prompt.explanation import Explanation, Miss, SegmentExplanation
    from backprompt_db.prompt.ids import SegmentId
    from backprompt_db.prompt.representation import Arrays
    from backprompt_db.prompt.segments import Segment


def picture_segments(segments: Sequence[Segment], *, remarks: tuple[str, ...] = ()) -> Picture:
    """Return a picture of segments about which nothing else is known: widths are numbers of characters."""
    return Picture(
        segments=tuple(
            PicturedSegment(text=segment.string, parents=parents, state=State.UNKNOWN, size=len(segment.string))
            for segment, parents in zip(segments, _parents(segments), strict=True)
        ),
        unit=Unit.CHARACTERS,
        remarks=remarks,
    )


def picture_result(segments: Sequence[Segment], scores: Sequence[Arrays], is_computed: Sequence[bool]) -> Picture:
    """Return a picture of what a run has found, and what it has computed. Nothing is looked up."""
    counts = [part["input_ids"].shape[0] for part in scores]
    states = [State.COMPUTED if each else State.STORED for each in is_computed]
    return Picture(
        segments=tuple(
            PicturedSegment(text=segment.string, parents=parents, state=state, size=count, num_tokens=count)
            for segment, parents, state, count in zip(segments, _parents(segments), states, counts, strict=True)
        ),
        unit=Unit.TOKENS,
    )


def scored_tokens(
    segments: Sequence[Segment], scores: Sequence[Arrays], is_computed: Sequence[bool]
) -> list[ScoredSegment]:
    """Return the tokens of a result with their log-probabilities, segment by segment."""
    return [
        ScoredSegment(
            text=segment.string,
            token_ids=part["input_ids"].numpy().tolist(),
            logprobs=part["token_logprobs"].numpy().tolist(),
            is_computed=each,
        )
        for segment, part, each in zip(segments, scores, is_computed, strict=True)
    ]


def picture_explanation(explanation: Explanation, *, computed: Container[SegmentId] = ()) -> Picture:
    """Return a picture of what a run would find; the segments with the ids `computed` were computed just now.

    Widths are characters where the tokens of a segment are not known.
    """
    unit = Unit.CHARACTERS if None in {each.num_tokens for each in explanation.segments} else Unit.TOKENS
    return Picture(
        segments=tuple(
            _explained(segment, unit=unit, is_computed=segment.segment_id in computed)
            for segment in explanation.segments
        ),
        unit=unit,
        remarks=() if unit is Unit.TOKENS else ("widths are characters: tokens are not known of every segment",),
    )


def _explained(segment: SegmentExplanation, *, unit: Unit, is_computed: bool) -> PicturedSegment:
    found = State.COMPUTED if is_computed else State.STORED
    return PicturedSegment(
        text=segment.text,
        parents=segment.parents,
        state=State.MISSING if segment.miss else found,
        size=segment.num_tokens if unit is Unit.TOKENS and segment.num_tokens else len(segment.text),
        num_tokens=segment.num_tokens,
        nbytes=sum(segment.nbytes.values()),
        seconds=segment.seconds,
        reason=_reason(segment.miss) if segment.miss else None,
    )


def _reason(miss: Miss) -> str:
    """Return why something is missing, with the date instead of the age: a picture may be kept."""
    if miss.at is None:
        return why(miss)
    return f"{why(replace(miss, at=None))} ({datetime.fromtimestamp(miss.at, UTC):%Y-%m-%d %H:%M:%S} UTC)"


def _parents(segments: Sequence[Segment]) -> list[tuple[int, ...]]:
    numbers = {segment: number for number, segment in enumerate(segments)}
    return [tuple(numbers[parent] for parent in segment.parents) for segment in segments]
