"""What `text.explain()` returns: which segments of a text are stored, which must be computed, and why."""

from __future__ import annotations

import enum
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backprompt_db.prompt.ids import SegmentId, TokenizerId, WeightsId
from backprompt_db.prompt.representation import Part
from backprompt_db.views.console import bare_table, html_text, literal, plain_text
from backprompt_db.views.formatting import age, duration, plural, shortened, size

if TYPE_CHECKING:
    from rich.console import Group

    from backprompt_db.prompt.ids import Address
    from backprompt_db.prompt.segments import Seam


class Place(enum.Enum):
    """Where a part was found. The value is its name in tables and JSON."""

    MEMORY = "memory"
    """Still queued for writing, or in the memory cache."""
    DISK = "disk"
    BASE = "base"
    """In the database below, of a layered one."""


class Reason(enum.Enum):
    """Why something must be computed. The value is its name in JSON."""

    NEVER_SEEN = "never-seen"
    """Never in the time that the catalog covers."""
    OTHER_MODEL = "other-model"
    """The same segment was computed with other weights, or in another dtype."""
    OTHER_TOKENIZER = "other-tokenizer"
    """The same segment was computed with the same weights and another tokenizer."""
    OTHER_PARENTS = "other-parents"
    """The same string was computed in another place: after something else, or at another start."""
    EVICTED = "evicted"
    QUARANTINED = "quarantined"
    """It was damaged, and removed."""
    NOT_KEPT = "not-kept"
    """Only other parts of it were kept: after scoring a completion, only its scores are."""
    LOST = "lost"
    """The catalog lists it, but the store does not have it."""
    UNKNOWN = "unknown"
    """Only a catalog would know, and no catalog can be read."""


@dataclass(frozen=True, slots=True)
class SeenUnder:
    """A model and a tokenizer that a segment was computed with."""

    model_name: str | None
    """None where only its representations are known."""
    dtype: str | None
    weights_id: WeightsId
    tokenizer_id: TokenizerId

    def __repr__(self) -> str:
        ids = f"{self.weights_id.hex()[:_NUM_ID_DIGITS]}, {self.tokenizer_id.hex()[:_NUM_ID_DIGITS]}"
        return f"<SeenUnder {self.model_name or '?'} ({self.dtype or 'unknown dtype'}, {ids})>"


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two prompts that end with the same string begin to differ."""

    at: int
    """How many characters are the same before that."""
    before: str
    """The last of these characters."""
    stored: str
    """How the stored prompt goes on."""
    given: str
    """How the prompt that is explained goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """Why parts of a segment must be computed."""

    needed: tuple[Part, ...]
    """The parts that running the text needs, and that are not there."""
    reason: Reason
    at: float | None = None
    """When it was evicted or quarantined, POSIX seconds."""
    detail: str | None = None
    """What was wrong with the part that was quarantined."""
    seen_under: tuple[SeenUnder, ...] = ()
    """The models and tokenizers under which it was computed."""
    difference: Difference | None = None
    """The difference from the nearest stored prompt that has this string in another place.

    None if that prompt has the same characters: then its pieces, its starts or its branches are different.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentExplanation:
    """One segment of a text: where it was found, or why it must be computed."""

    text: str
    parents: tuple[int, ...]
    """The segments that it directly follows, by their numbers in the explanation, from 0."""
    start: int | None
    segment_id: SegmentId
    address: Address
    places: Mapping[Part, Place]
    """Where each part is, of those that are there."""
    nbytes: Mapping[Part, int]
    """The sizes of the parts that are there."""
    num_tokens: int | None
    """None where only the tokenizer would know, and it is not available."""
    seconds: float | None
    """What computing it took, or would take at the rate last recorded for the model; None if unknown."""
    miss: Miss | None
    """None where everything is there that running the text needs of it."""

    @property
    def is_found(self) -> bool:
        """Whether nothing of it needs to be computed."""
        return self.miss is None

    def __repr__(self) -> str:
        state = "found" if self.miss is None else f"to compute: {self.miss.reason.value}"
        tokens = "tokens unknown" if self.num_tokens is None else plural(self.num_tokens, "token")
        text = shortened(self.text, num_characters=_NUM_REPR_CHARACTERS)
        return f"<SegmentExplanation {self.segment_id.hex()[:_NUM_ID_DIGITS]} {text!r}: {tokens}, {state}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What running a text would find, and what it would compute and why. Printed, it is a table.

    A run is meant: `lm(text)` wants the scores of each segment. Logits are computed once they are asked for.
    """

    model_name: str | None
    dtype: str | None
    weights_id: WeightsId
    tokenizer_id: TokenizerId
    namespace: str
    segments: tuple[SegmentExplanation, ...]
    """Parents before children, in the order written."""
    seams: tuple[Seam, ...] | None
    """The seams that change tokens; None where the tokenizer is not available."""
    is_healed: bool
    """Whether the text is run in other pieces than it was written in, with the tokens of the joined string."""
    num_cached_tokens: int | None
    num_missing_tokens: int | None
    nbytes: int
    """The size of all parts that are there."""
    saved_seconds: float | None
    """What computing the segments that are found took."""
    needed_seconds: float | None
    """About what computing the others would take."""

    def __rich__(self) -> Group:
        """What rich prints: the table, and remarks about the whole text."""
        return _view(self)

    def __str__(self) -> str:
        return plain_text(self)

    def __repr__(self) -> str:
        cached, missing = _number(self.num_cached_tokens), _number(self.num_missing_tokens)
        return (
            f"<Explanation of {plural(len(self.segments), 'segment')}: {cached} tokens cached, {missing} to compute,"
            f" by {self.model_name or '?'} ({self.weights_id.hex()[:_NUM_ID_DIGITS]})>"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return html_text(self)


_COLUMNS = ("", "segment", "found", "tokens", "bytes", "seconds")
_RIGHT = frozenset({"tokens", "bytes", "seconds"})
_NUM_TEXT_CHARACTERS = 60
_NUM_SEEN = 3
_NUM_REPR_CHARACTERS = 60
_NUM_ID_DIGITS = 8
_UNKNOWN = "?"


def _view(explanation: Explanation) -> Group:
    from rich.console import Group

    table = bare_table()
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
        table.add_row(*map(literal, _cells(number, segment)), style="" if segment.is_found else "yellow")
    return Group(table, "", *map(literal, _remarks(explanation)))


def _cells(number: int, segment: SegmentExplanation) -> tuple[str, ...]:
    return (
        str(number),
        shortened(segment.text, num_characters=_NUM_TEXT_CHARACTERS),
        _found(segment),
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
    """Return the reason of a miss in words, with how long ago it was evicted or quarantined."""
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
            yield f"  {name + ':':7}{ellipsis}{difference.before}|{rest}"


def _remarks(explanation: Explanation) -> Iterator[str]:
    """Yield remarks about the whole text, a line each."""
    name = explanation.model_name or "a model without a name"
    digits = explanation.weights_id.hex()[:_NUM_ID_DIGITS]
    namespace = f", namespace {explanation.namespace}" if explanation.namespace else ""
    yield from _differences(explanation)
    yield f"{name} ({explanation.dtype or 'unknown dtype'}, {digits}){namespace}"
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
    what = "a token crosses a seam, so the cut is moved" if explanation.is_healed else "a seam changes tokens"
    for seam in explanation.seams or ():
        yield f"{what}: {seam}"


def _names(parts: Collection[Part]) -> str:
    return " ".join(part.name.lower() for part in Part if part in parts)


def _number(number: int | None) -> str:
    return _UNKNOWN if number is None else f"{number:,}"


def _seconds(seconds: float | None) -> str:
    return _UNKNOWN if seconds is None else duration(seconds)
