"""How an explanation is shown: as a table in a terminal, as plain text, and in a notebook."""

from __future__ import annotations

import html
import time
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from backprompt_db.display import age, duration, shortened, size, visible
from backprompt_db.explanation import Reason
from backprompt_db.representation import Part

if TYPE_CHECKING:
    from rich.console import Group

    from backprompt_db.explanation import Explanation, Miss, Place, SeenUnder, SegmentExplanation

_COLUMNS = ("", "segment", "found", "tokens", "bytes", "seconds")
_RIGHT = frozenset({"tokens", "bytes", "seconds"})
_NUM_TEXT_CHARACTERS = 60
_NUM_SEAM_CHARACTERS = 20
_NUM_SEEN = 3
_NUM_ID_DIGITS = 8
_UNKNOWN = "?"


def terminal_view(explanation: Explanation) -> Group:
    """Return what rich prints."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in _COLUMNS:
        is_long = name in {"segment", "found"}
        table.add_column(
            name,
            no_wrap=not is_long,
            justify="right" if name in _RIGHT else "left",
            min_width=10 if is_long else None,
            overflow="fold",
        )
    for number, segment in enumerate(explanation.segments):
        table.add_row(*(Text(cell) for cell in _cells(number, segment)), style="" if segment.is_found else "yellow")
    return Group(table, "", *(Text(line) for line in _remarks(explanation)))


def plain_view(explanation: Explanation) -> str:
    """Return the table as text without colours, as wide as the terminal."""
    from rich.console import Console

    console = Console(color_system=None, force_terminal=False, highlight=False)
    with console.capture() as captured:
        console.print(terminal_view(explanation))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def html_view(explanation: Explanation) -> str:
    """Return an HTML table. Whatever texts and names hold is shown and means nothing."""
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    rows = "".join(_html_row(number, segment) for number, segment in enumerate(explanation.segments))
    remarks = html.escape("\n".join(_remarks(explanation)))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table><pre>{remarks}</pre>"


def _html_row(number: int, segment: SegmentExplanation) -> str:
    style = "" if segment.is_found else ' style="background: rgba(255, 170, 0, 0.2)"'
    aligned = (
        f'<td style="text-align: {"right" if name in _RIGHT else "left"}">{html.escape(cell)}</td>'
        for name, cell in zip(_COLUMNS, _cells(number, segment), strict=True)
    )
    return f"<tr{style}>{''.join(aligned)}</tr>"


def _cells(number: int, segment: SegmentExplanation) -> tuple[str, ...]:
    return (
        str(number),
        visible(shortened(segment.text, num_characters=_NUM_TEXT_CHARACTERS)),
        visible(_found(segment)),
        _number(segment.num_tokens),
        size(sum(segment.nbytes.values())),
        _seconds(segment.seconds),
    )


def _found(segment: SegmentExplanation) -> str:
    reason = [] if segment.miss is None else [why(segment.miss)]
    return "; ".join(reason + [f"{place.value}: {_names(parts)}" for place, parts in _by_place(segment).items()])


def _by_place(segment: SegmentExplanation) -> dict[Place, list[Part]]:
    parts: dict[Place, list[Part]] = {}
    for part, place in segment.places.items():
        parts.setdefault(place, []).append(part)
    return parts


def why(miss: Miss) -> str:
    """Return the reason of a miss in words, with how long ago that was."""
    needed = _names(miss.needed)
    when = "" if miss.at is None else f" {age(miss.at, now=time.time())} ago"
    match miss.reason:
        case Reason.NEVER_SEEN:
            return "never seen"
        case Reason.OTHER_MODEL:
            return f"seen under {_models(miss.seen_under)}"
        case Reason.OTHER_TOKENIZER:
            ids = (under.tokenizer_id.hex()[:_NUM_ID_DIGITS] for under in miss.seen_under)
            return f"seen under another tokenizer ({_some(list(dict.fromkeys(ids)))})"
        case Reason.OTHER_PARENTS:
            return "seen after other parents" + (f", under {_models(miss.seen_under)}" if miss.seen_under else "")
        case Reason.EVICTED:
            return f"{needed} evicted{when}"
        case Reason.QUARANTINED:
            return f"{needed} quarantined{when}: {miss.detail}"
        case Reason.NOT_KEPT:
            return f"{needed} not kept"
        case Reason.LOST:
            return f"{needed} lost: the catalog lists what the store has not"
        case Reason.UNKNOWN:
            return "not there, and there is no catalog to say why"


def _models(seen: tuple[SeenUnder, ...]) -> str:
    named = [
        f"{under.model_name or 'another model'} ({under.dtype or 'unknown dtype'},"
        f" {under.weights_id.hex()[:_NUM_ID_DIGITS]})"
        for under in seen
    ]
    return _some(list(dict.fromkeys(named)))


def _some(names: list[str]) -> str:
    more = [f"and {len(names) - _NUM_SEEN} more"] if len(names) > _NUM_SEEN else []
    return ", ".join(names[:_NUM_SEEN] + more)


def _differences(explanation: Explanation) -> Iterator[str]:
    """Yield where segments that were seen after other parents differ from the nearest stored prompt."""
    for number, segment in enumerate(explanation.segments):
        if segment.miss is None or segment.miss.reason is not Reason.OTHER_PARENTS:
            continue
        difference = segment.miss.difference
        if difference is None:
            yield f"{number} is stored after the same characters, in other pieces, at other starts or in other branches"
            continue
        yield f"{number} is stored in a prompt that differs from character {difference.at:,} on:"
        ellipsis = "…" if difference.at > len(difference.before) else ""
        for name, rest in (("there", difference.stored), ("here", difference.given)):
            yield f"  {name + ':':7}{ellipsis}{visible(difference.before)}|{visible(rest)}"


def _remarks(explanation: Explanation) -> Iterator[str]:
    """Yield what is to be said of the whole text, a line each."""
    name = explanation.model_name or "a model without a name"
    digits = explanation.weights_id.hex()[:_NUM_ID_DIGITS]
    namespace = f", namespace {explanation.namespace}" if explanation.namespace else ""
    yield from _differences(explanation)
    yield visible(f"{name} ({explanation.dtype or 'unknown dtype'}, {digits}){namespace}")
    yield (
        f"cached: {_number(explanation.num_cached_tokens)} tokens, {size(explanation.nbytes)},"
        f" {_seconds(explanation.saved_seconds)} saved"
    )
    yield (
        f"to compute: {_number(explanation.num_missing_tokens)} tokens,"
        f" about {_seconds(explanation.needed_seconds)} needed"
    )
    if explanation.seams is None:
        yield "tokens of what was never computed, and seams that change tokens, are unknown without the tokenizer"
    for seam in explanation.seams or ():
        left, right = seam.left[-_NUM_SEAM_CHARACTERS:], seam.right[:_NUM_SEAM_CHARACTERS]
        apart, joined = _changed(seam.tokens_apart, seam.tokens_joined)
        yield visible(f"a seam changes tokens: {left!r} + {right!r} is {apart}, joined {joined}")


def _changed(apart: Sequence[str], joined: Sequence[str]) -> tuple[str, str]:
    """Return two lists of tokens without what they have in common at both ends."""
    begin = _num_common(apart, joined)
    apart, joined = apart[begin:], joined[begin:]
    end = _num_common(apart[::-1], joined[::-1])
    return " ".join(apart[: len(apart) - end]), " ".join(joined[: len(joined) - end])


def _num_common(one: Sequence[str], other: Sequence[str]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (left, right) in pairs if left != right), min(len(one), len(other)))


def _names(parts: Collection[Part]) -> str:
    return " ".join(part.name.lower() for part in Part if part in parts)


def _number(number: int | None) -> str:
    return _UNKNOWN if number is None else f"{number:,}"


def _seconds(seconds: float | None) -> str:
    return _UNKNOWN if seconds is None else duration(seconds)
