"""Why a text is answered from the database, or is not: what `text.explain()` returns."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group

    from backprompt_db.keys import Address, SegmentId, TokenizerId, WeightsId
    from backprompt_db.representation import Part
    from backprompt_db.text import Seam


class Place(enum.Enum):
    """Where a part was found. The value is its name in tables and JSON."""

    MEMORY = "memory"
    """Still queued for writing, or kept by the memory tier."""
    DISK = "disk"
    BASE = "base"
    """In the database below, of a layered one."""


class Reason(enum.Enum):
    """Why something must be computed. The value is its name in JSON."""

    NEVER_SEEN = "never-seen"
    """As far as the catalog goes back."""
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
    """Other parts of it were kept: of a completion that was scored, scores alone."""
    LOST = "lost"
    """The catalog lists it, and it is not in the store."""
    UNKNOWN = "unknown"
    """Only a catalog would know, and there is none that can be read."""


@dataclass(frozen=True, slots=True)
class SeenUnder:
    """A model and a tokenizer that a segment was computed with."""

    model_name: str | None
    """None where only its representations are known."""
    dtype: str | None
    weights_id: WeightsId
    tokenizer_id: TokenizerId


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two prompts, each joined up to the same string at its end, begin to differ."""

    at: int
    """Characters that are the same before."""
    before: str
    """The last of them."""
    stored: str
    """How the stored prompt goes on."""
    given: str
    """How the one that is explained goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """Why parts of a segment must be computed."""

    needed: tuple[Part, ...]
    """Those that running the text needs and that are not there."""
    reason: Reason
    at: float | None = None
    """When it was evicted or quarantined, POSIX seconds."""
    detail: str | None = None
    """What was wrong with what was quarantined."""
    seen_under: tuple[SeenUnder, ...] = ()
    """The models and tokenizers under which it was computed."""
    difference: Difference | None = None
    """To the nearest stored prompt with this string in another place; None if that has the same characters.

    Then its pieces, its starts or its branches are other ones.
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
    """Where each part is that is there."""
    nbytes: Mapping[Part, int]
    """Their sizes."""
    num_tokens: int | None
    """None where only the tokenizer would know, and it is not at hand."""
    seconds: float | None
    """What computing it took, or would take at the rate that was recorded last for the model; None if unknown."""
    miss: Miss | None
    """None where all is there that running the text needs of it."""

    @property
    def is_found(self) -> bool:
        """Whether nothing of it must be computed."""
        return self.miss is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What running a text would find, and what it would compute and why. Printed, it is a table.

    It is about a run: `lm(text)` wants the scores of each segment, and the logits of the last one.
    """

    model_name: str | None
    dtype: str | None
    weights_id: WeightsId
    tokenizer_id: TokenizerId
    namespace: str
    segments: tuple[SegmentExplanation, ...]
    """Parents before children, in the order written."""
    seams: tuple[Seam, ...] | None
    """Those that change tokens; None where the tokenizer is not at hand."""
    num_cached_tokens: int | None
    num_missing_tokens: int | None
    nbytes: int
    """Of all parts that are there."""
    saved_seconds: float | None
    """What computing the segments that are found took."""
    needed_seconds: float | None
    """What computing the others would take, about."""

    def __rich__(self) -> Group:
        """What rich prints: the table, and what is to be said of all."""
        from backprompt_db.explanation_views import terminal_view

        return terminal_view(self)

    def __str__(self) -> str:
        from backprompt_db.explanation_views import plain_view

        return plain_view(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from backprompt_db.explanation_views import html_view

        return html_view(self)
