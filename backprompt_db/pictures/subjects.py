"""What can be pictured: a text of which nothing else is known, an explanation of a text, and the result of a run."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from backprompt_db.errors import BackpromptError
from backprompt_db.explanation_views import why
from backprompt_db.pictures.picture import Picture, PicturedSegment, State, Unit

if TYPE_CHECKING:
    from backprompt_db.explanation import Explanation, Miss, SegmentExplanation
    from backprompt_db.keys import SegmentId
    from backprompt_db.representation import ModelRepr
    from backprompt_db.text import Segment, Text


def picture_text(text: Text, *, after: ModelRepr | None) -> Picture:
    """Return a picture of a text: as its model would find it now, after a run.

    A text must be shown whatever happens: where nobody can tell states, they are unknown.
    """
    try:
        explanation = text.explain()
    except (BackpromptError, OSError) as error:
        return picture_segments(text.segments(), remarks=(f"states are unknown: {error}",) if text else ())
    is_same_model = after is not None and after.ids == (explanation.weights_id, explanation.tokenizer_id)
    return picture_explanation(explanation, computed=_computed_by(after) if after and is_same_model else ())


def _computed_by(result: ModelRepr) -> frozenset[SegmentId]:
    pairs = zip(result.text.segments(), result.is_computed, strict=True)
    return frozenset(segment.id for segment, is_computed in pairs if is_computed)


def picture_segments(segments: Sequence[Segment], *, remarks: tuple[str, ...] = ()) -> Picture:
    """Return a picture of a text's segments, of which nothing is known: widths are characters."""
    return Picture(
        segments=tuple(
            PicturedSegment(text=segment.string, parents=parents, state=State.UNKNOWN, size=len(segment.string))
            for segment, parents in zip(segments, _parents(segments), strict=True)
        ),
        unit=Unit.CHARACTERS,
        remarks=remarks,
    )


def picture_result(result: ModelRepr) -> Picture:
    """Return a picture of what a run has found and computed. Nothing is looked up."""
    segments = result.text.segments()
    counts = [scores["input_ids"].shape[0] for scores in result.scores]
    states = [State.COMPUTED if is_computed else State.STORED for is_computed in result.is_computed]
    return Picture(
        segments=tuple(
            PicturedSegment(text=segment.string, parents=parents, state=state, size=count, num_tokens=count)
            for segment, parents, state, count in zip(segments, _parents(segments), states, counts, strict=True)
        ),
        unit=Unit.TOKENS,
    )


def _parents(segments: Sequence[Segment]) -> list[tuple[int, ...]]:
    numbers = {segment: number for number, segment in enumerate(segments)}
    return [tuple(numbers[parent] for parent in segment.parents) for segment in segments]


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
    """Return why something is missing, with the date and not the age: pictures stay what they are."""
    if miss.at is None:
        return why(miss)
    return f"{why(replace(miss, at=None))} ({datetime.fromtimestamp(miss.at, UTC):%Y-%m-%d %H:%M:%S} UTC)"
