"""What pictures say in words: beside the bar of a row, when a row is pointed at, and about the whole picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from backprompt_db.views.formatting import duration, plural, shortened, size, visible
from backprompt_db.views.scene import State, Unit

if TYPE_CHECKING:
    from backprompt_db.views.layout import Layout, Row
    from backprompt_db.views.scene import PicturedSegment, Scene

_NUM_TOOLTIP_CHARACTERS = 2_000
_NUM_REMARK_CHARACTERS = 500
_NUM_FOLDED_TEXTS = 12
_NUM_FOLDED_CHARACTERS = 60


def label(row: Row, *, num_characters: int) -> str:
    """Return the text of a row's segment on one line, or how many segments are folded in it."""
    if row.is_fold:
        return f"… {len(row.segments):,} segments"
    text = row.segments[0].text
    # Shortened twice: first because a text may be a megabyte, then because escapes are longer than their characters.
    return shortened(visible(shortened(text, num_characters=num_characters + 1)), num_characters=num_characters)


def facts(row: Row, unit: Unit) -> str:
    """Return the size and the state of a row: `12 tokens · stored`."""
    return f"{amount(sum(segment.size for segment in row.segments), unit)} · {state(row)}"


def state(row: Row) -> str:
    """Return the state of a row; of several states, how many of its segments are in each."""
    return (
        row.state.value
        if row.state
        else ", ".join(f"{len(some):,} {each.value}" for each, some in _by_state(row.segments))
    )


def _by_state(segments: Iterable[PicturedSegment]) -> Iterator[tuple[State, list[PicturedSegment]]]:
    """Yield each state with the segments that are in it, if there are any."""
    found: dict[State, list[PicturedSegment]] = {}
    for segment in segments:
        found.setdefault(segment.state, []).append(segment)
    yield from ((each, found[each]) for each in State if each in found)


def amount(number: float, unit: Unit) -> str:
    """Return a number with its unit.

    >>> amount(1, Unit.TOKENS), amount(1200, Unit.CHARACTERS), amount(2048, Unit.BYTES), amount(0.5, Unit.SECONDS)
    ('1 token', '1,200 characters', '2.0 KiB', '0.5 s')
    """
    match unit:
        case Unit.BYTES:
            return size(round(number))
        case Unit.SECONDS:
            return duration(number)
    return plural(round(number), unit.value.removesuffix("s"))


def tooltip(row: Row) -> str:
    """Return what is shown when a row is pointed at: its text, cut if very long, and all that is known of it."""
    if row.is_fold:
        return "\n".join([*_folded_texts(row), "", state(row)])
    (segment,) = row.segments
    return f"{_bounded(segment.text)}\n\n{', '.join(_known(row.number, segment))}"


def _bounded(text: str) -> str:
    shown = "\n".join(map(visible, text[:_NUM_TOOLTIP_CHARACTERS].split("\n")))
    num_left_out = len(text) - _NUM_TOOLTIP_CHARACTERS
    return shown if num_left_out <= 0 else f"{shown}… ({num_left_out:,} characters more)"


def _known(number: int, segment: PicturedSegment) -> Iterator[str]:
    yield f"segment {number}"
    yield f"after {', '.join(map(str, segment.parents))}" if segment.parents else "at the beginning"
    yield plural(len(segment.text), "character")
    if segment.num_tokens is not None:
        yield plural(segment.num_tokens, "token")
    if segment.nbytes is not None:
        yield size(segment.nbytes)
    if segment.seconds is not None:
        yield f"{duration(segment.seconds)} to compute"
    yield visible(f"{segment.state.value}: {segment.reason}") if segment.reason else segment.state.value


def _folded_texts(row: Row) -> Iterator[str]:
    for offset, segment in enumerate(row.segments[:_NUM_FOLDED_TEXTS]):
        yield f"{row.number + offset}: {visible(shortened(segment.text, num_characters=_NUM_FOLDED_CHARACTERS))}"
    if len(row.segments) > _NUM_FOLDED_TEXTS:
        yield f"… and {len(row.segments) - _NUM_FOLDED_TEXTS:,} more"


def totals(scene: Scene) -> list[tuple[State, str]]:
    """Return a line for each state in the picture, with how much is in it: `stored: 2 segments, 612 tokens`."""
    return [
        (each, f"{each.value}: {plural(len(some), 'segment')}, {amount(sum(one.size for one in some), scene.unit)}")
        for each, some in _by_state(scene.segments)
    ]


def remarks(scene: Scene, layout: Layout) -> list[str]:
    """Return the remarks about the whole picture, a line each."""
    lines = [visible(shortened(remark, num_characters=_NUM_REMARK_CHARACTERS)) for remark in scene.remarks]
    if not scene.segments:
        lines.append("an empty text")
    if layout.num_folded:
        lines.append(
            f"{layout.num_folded:,} of {len(scene.segments):,} segments are folded:"
            f" the picture shows at most {len(layout.rows)} rows"
        )
    return lines
