"""Explaining what a run would find and compute. Nothing is computed, written or counted; torch is not needed."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from backprompt_db.compute import plan
from backprompt_db.compute.names import Names
from backprompt_db.explanation import Explanation, Place, SegmentExplanation
from backprompt_db.maintenance.reasons import Absence, Records
from backprompt_db.representation import Part
from backprompt_db.text import ancestry

if TYPE_CHECKING:
    from backprompt_db.compute.source import ModelSource
    from backprompt_db.compute.tokens import SegmentTokenizer
    from backprompt_db.database import Database
    from backprompt_db.explanation import Miss
    from backprompt_db.text import Segment

_PATIENCE_SECONDS = 10.0

_Number = TypeVar("_Number", int, float)

_Found = dict["Segment", dict[Part, tuple[Place, int]]]
"""Where the parts of each segment are, and their sizes."""


def explain_run(db: Database, source: ModelSource, tips: Sequence[Segment]) -> Explanation:
    """Explain what running a text on a model would do, as `explain` does. Loads the tokenizer, not the model.

    Waits for what is queued for writing: the catalog does not know of it before.
    """
    names = Names(*source.ids)
    wait_until_written(db)
    explanation = explain(db, names, tips, tokenizer=source.tokenizer)
    if explanation.dtype is not None or not source.is_loaded:
        return replace(explanation, model_name=explanation.model_name or source.name)
    dtype = str(source.runtime.model.dtype).removeprefix("torch.")
    return replace(explanation, model_name=source.name, dtype=dtype)


def wait_until_written(db: Database) -> None:
    """Wait for what is queued for writing, but not for long."""
    is_written = threading.Event()
    db.when_written(is_written.set)
    is_written.wait(_PATIENCE_SECONDS)


def explain(db: Database, names: Names, tips: Sequence[Segment], *, tokenizer: SegmentTokenizer | None) -> Explanation:
    """Explain what running the text that ends with the segments `tips` would find, and what it would compute and why.

    Without a tokenizer, tokens of what was never computed and seams stay unknown. Raises `InvalidText` for a segment
    that has no tokens.
    """
    segments = ancestry(tips)
    records = Records(db, names.ids, segments)
    found = _look(db, names, segments)
    misses = _misses(names, tips, found, records)
    num_tokens = _num_tokens(segments, records, tokenizer)
    seconds = _seconds(segments, records, num_tokens)
    numbers = {segment: number for number, segment in enumerate(segments)}
    model = records.model(names.weights_id)
    cached, missing = [each for each in segments if each not in misses], list(misses)
    return Explanation(
        model_name=(model.name or None) if model else None,
        dtype=(model.dtype or None) if model else None,
        weights_id=names.weights_id,
        tokenizer_id=names.tokenizer_id,
        namespace=segments[0].namespace,
        segments=tuple(
            SegmentExplanation(
                text=segment.string,
                parents=tuple(numbers[parent] for parent in segment.parents),
                start=segment.start,
                segment_id=segment.id,
                address=names.address(segment),
                places={part: place for part, (place, _) in found[segment].items()},
                nbytes={part: nbytes for part, (_, nbytes) in found[segment].items()},
                num_tokens=num_tokens[segment],
                seconds=seconds[segment],
                miss=misses.get(segment),
            )
            for segment in segments
        ),
        seams=None if tokenizer is None else tuple(tokenizer.seams(segments)),
        num_cached_tokens=_sum(num_tokens[segment] for segment in cached),
        num_missing_tokens=_sum(num_tokens[segment] for segment in missing),
        nbytes=sum(nbytes for parts in found.values() for _, nbytes in parts.values()),
        saved_seconds=_sum(seconds[segment] for segment in cached),
        needed_seconds=_sum(seconds[segment] for segment in missing),
    )


def _look(db: Database, names: Names, segments: Iterable[Segment]) -> _Found:
    """Look for all parts. Keys and values are in memory where a pass has left them in a buffer."""
    buffered = {address for buffer in db.memory.grouped() for address, _ in buffer.contents}
    found: _Found = {}
    for segment in segments:
        looked = {part: db.look(names.key(segment, part)) for part in Part}
        found[segment] = {part: where for part, where in looked.items() if where is not None}
        if Part.KV in found[segment] and names.address(segment) in buffered:
            found[segment][Part.KV] = Place.MEMORY, found[segment][Part.KV][1]
    return found


def _misses(names: Names, tips: Sequence[Segment], found: _Found, records: Records) -> Mapping[Segment, Miss]:
    """Plan what a run would plan, and find out why it is needed."""
    wanted = dict.fromkeys(found, frozenset({Part.SCORES}))
    if len(tips) == 1:
        wanted[tips[0]] |= {Part.LOGITS}

    def is_stored(segment: Segment, part: Part) -> bool:
        return part in found[segment]

    missing = plan.missing_parts(wanted, is_stored=is_stored)
    return records.misses(
        [
            Absence(
                segment, names.address(segment), tuple(sorted(parts, key=list(Part).index)), frozenset(found[segment])
            )
            for segment, parts in missing.items()
        ]
    )


def _num_tokens(
    segments: Sequence[Segment], records: Records, tokenizer: SegmentTokenizer | None
) -> dict[Segment, int | None]:
    rows = {segment: row for segment in segments if (row := records.row(segment)) is not None}
    unknown = [segment for segment in segments if segment not in rows]
    encoded = {} if tokenizer is None else tokenizer.encode(unknown)
    counted = {segment: len(ids) for segment, ids in encoded.items()} | {
        segment: row.num_tokens for segment, row in rows.items()
    }
    return {segment: counted.get(segment) for segment in segments}


def _seconds(
    segments: Sequence[Segment], records: Records, num_tokens: Mapping[Segment, int | None]
) -> dict[Segment, float | None]:
    """Return what computing each segment took, or at the recorded rate would take."""
    rate = records.seconds_per_token()
    seconds: dict[Segment, float | None] = {}
    for segment in segments:
        row, count = records.row(segment), num_tokens[segment]
        estimated = None if rate is None or count is None else rate * count
        seconds[segment] = estimated if row is None else row.compute_seconds
    return seconds


def _sum(numbers: Iterable[_Number | None]) -> _Number | None:
    """Return the sum of numbers, None if one of them is unknown."""
    total: _Number = 0
    for number in numbers:
        if number is None:
            return None
        total += number
    return total
