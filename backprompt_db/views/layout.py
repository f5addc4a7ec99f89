"""Where the segments of a picture lie: in rows from top to bottom, and from left to right in the picture's unit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backprompt_db.views.scene import PicturedSegment, Scene, State


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a segment, or several that follow each other in the order written and are folded."""

    number: int
    """The number of its first segment."""
    segments: tuple[PicturedSegment, ...]
    begin: float
    end: float

    @property
    def is_fold(self) -> bool:
        """Whether it stands for several segments."""
        return len(self.segments) > 1

    @property
    def state(self) -> State | None:
        """The state of its segments, None where they differ."""
        states = {segment.state for segment in self.segments}
        return states.pop() if len(states) == 1 else None


@dataclass(frozen=True, slots=True)
class Layout:
    """All rows, and which row directly follows which."""

    rows: tuple[Row, ...]
    edges: tuple[tuple[int, int], ...]
    """Parent and child, by the numbers of their rows, each pair once."""
    extent: float
    """Where the last segment ends."""

    @property
    def num_folded(self) -> int:
        """Segments that have no row of their own."""
        return sum(len(row.segments) for row in self.rows if row.is_fold)


def lay_out(scene: Scene, *, max_rows: int) -> Layout:
    """Lay out a picture in at most `max_rows` rows. A segment begins where the last of its parents ends."""
    segments = scene.segments
    begins, ends = list[float](), list[float]()
    for segment in segments:
        begins.append(max((ends[parent] for parent in segment.parents), default=0.0))
        ends.append(begins[-1] + segment.size)
    rows = [
        Row(
            numbers[0],
            tuple(segments[number] for number in numbers),
            min(begins[number] for number in numbers),
            max(ends[number] for number in numbers),
        )
        for numbers in _folded([segment.state for segment in segments], max_rows)
    ]
    return Layout(tuple(rows), _edges(rows), max(ends, default=0.0))


def _edges(rows: Sequence[Row]) -> tuple[tuple[int, int], ...]:
    row_of = {row.number + offset: at for at, row in enumerate(rows) for offset in range(len(row.segments))}
    edges = (
        (row_of[parent], child)
        for child, row in enumerate(rows)
        for segment in row.segments
        for parent in segment.parents
    )
    return tuple(dict.fromkeys(edge for edge in edges if edge[0] != edge[1]))


def _folded(states: Sequence[State], max_rows: int) -> Iterator[Sequence[int]]:
    """Yield which segments share a row.

    The reader looks for where one state ends and another begins. So of each run of segments in one state, the middle is
    folded; where even that leaves too many rows, the middle of the whole picture is.
    """
    groups = itertools.groupby(range(len(states)), key=lambda number: states[number])
    runs = [list(run) for _, run in groups]
    for margin in range(max_rows // 2, -1, -1):
        if sum(min(len(run), 2 * margin + 1) for run in runs) <= max_rows:
            for run in runs:
                yield from _without_middle(run, margin, margin)
            return
    yield from _without_middle(range(len(states)), max_rows // 2, (max_rows - 1) // 2)


def _without_middle(numbers: Sequence[int], num_first: int, num_last: int) -> Iterator[Sequence[int]]:
    """Yield each number alone, but those between the first and the last ones together."""
    end = max(num_first, len(numbers) - num_last)
    middle = numbers[num_first:end]
    yield from ([number] for number in numbers[:num_first])
    if middle:
        yield middle
    yield from ([number] for number in numbers[end:])
