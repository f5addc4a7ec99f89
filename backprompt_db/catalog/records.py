"""The values that go into the catalog and come out of it. Times are POSIX seconds (UTC), sizes are bytes."""

from __future__ import annotations

import enum
import math
import sqlite3
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from backprompt_db.prompt.ids import WeightsId

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from backprompt_db.prompt.ids import Address, SegmentId, TokenizerId
    from backprompt_db.prompt.representation import Origin, Part


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One part that the writer has put into the store."""

    address: Address
    part: Part
    nbytes: int
    origin: Origin


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """One model, and what checking its packed passes against plain ones has shown."""

    weights_id: WeightsId
    name: str
    """`""` while all that is known of the model is that representations were computed with it."""
    architecture: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int | None
    verdict: str
    """`"packs"`, `"chains"`, `"refused"` or `"unchecked"`; the catalog takes no other."""
    mask_form: str | None
    max_error: float | None
    reason: str | None
    checked_with: str | None
    """The library versions and the attention implementation that the check ran with."""
    signature: bytes | None = None
    """A digest of all other fields, keyed in a database with a secret; None where it was saved without one."""


@dataclass(frozen=True, slots=True)
class TokenizerRecord:
    """One tokenizer."""

    tokenizer_id: TokenizerId
    name: str
    kind: str
    vocab_size: int
    definition: bytes | None = None
    """The text whose digest is the id, compressed by zlib; empty if it is not kept, `None` until somebody saves it."""


@dataclass(frozen=True, slots=True)
class CutsRecord:
    """Where one long string, known by a digest made elsewhere, is cut into segments."""

    key: bytes
    offsets: tuple[int, ...]
    """Character offsets, ascending."""
    signature: bytes | None = None


def require_all(kind: type, values: Mapping[str, object]) -> None:
    """Raise `sqlite3.DataError` where a row has nothing for a field of `kind` that is never None."""
    missing = [name for name in _needed(kind) if values.get(name, ...) is None]
    if missing:
        raise sqlite3.DataError(f"a row has no {' and no '.join(missing)}")


@cache
def _needed(kind: type) -> tuple[str, ...]:
    return tuple(name for name, annotation in kind.__annotations__.items() if "None" not in str(annotation))


def are_cuts(offsets: Iterable[int], *, num_characters: float = math.inf) -> bool:
    """Whether a string of this length can be cut at these offsets: they ascend, and lie inside it."""
    return all(begin < end for begin, end in pairwise((0, *offsets, num_characters)))


@dataclass(frozen=True, slots=True)
class EncodingRecord:
    """The tokens of strings that were encoded together, each alone."""

    key: bytes
    """32-byte digest of the tokenizer and the strings."""
    offsets: tuple[int, ...]
    """Where the tokens of each string end, ascending."""
    token_ids: tuple[int, ...]
    signature: bytes | None = None


@dataclass(frozen=True, slots=True)
class GreedyPath:
    """The tokens that a model goes on with after a prompt, as far as they are known: each time the likeliest one."""

    address: Address
    """The address of the representation that the prompt ends with."""
    token_ids: tuple[int, ...]
    signature: bytes | None = None


@dataclass(frozen=True, slots=True)
class GenerationRecord:
    """What a model has generated after a prompt, with certain arguments."""

    key: bytes
    """32-byte digest of the prompt, the model and the arguments."""
    address: Address
    """The address of the representation that prompt and continuation end with."""
    string: str
    """The continuation, without the end-of-sequence token that may have ended it."""
    token_ids: tuple[int, ...]
    """The generated tokens, the end-of-sequence token included."""
    token_logprobs: bytes
    """float32 [T], little-endian: natural log-probability of each of them under the model itself."""
    num_kept: int
    """Tokens of the continuation: all but the end-of-sequence token."""
    is_finished: bool
    """Whether it ended by itself; else more tokens would have followed."""
    signature: bytes | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """The ids of a model whose files have not changed, so that they need not be digested again."""

    key: bytes
    """32-byte digest of what shows that the files have not changed."""
    name: str
    weights_id: WeightsId
    tokenizer_id: TokenizerId
    signature: bytes | None = None


Known = ModelRecord | TokenizerRecord | Source | CutsRecord | EncodingRecord | GreedyPath | GenerationRecord
"""Something to save: about a model, a tokenizer, a model's files, strings or a prompt."""


@dataclass(frozen=True, slots=True)
class Row:
    """One representation, with the segment and the model that it belongs to."""

    address: Address
    segment_id: SegmentId
    weights_id: WeightsId
    tokenizer_id: TokenizerId
    model_name: str | None
    """`None` until the model has been saved under a name."""
    namespace: str
    text: str
    start: int | None
    num_tokens: int
    nbytes: dict[Part, int]
    """Stored bytes of each part that is present."""
    compute_seconds: float
    created_at: float
    last_used_at: float | None
    num_hits: int
    is_pinned: bool
    label: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which representations are meant: those that meet all conditions that are given."""

    text_prefix: str | None = None
    """What a prompt begins with, joined from its first segment. Means the segment where it ends, and all that follow.

    A segment is not meant if the catalog lacks the text of one before it.
    """
    text_contains: str | None = None
    """What the text of the segment itself contains, with this upper and lower case; not across two segments."""
    text_matches: str | None = None
    """What the text of the segment itself contains, whatever the case of its letters."""
    label: str | None = None
    model: str | None = None
    """A model's name, or the first hex digits of a weights id, at least 8."""
    namespace: str | None = None
    """`""` is the default namespace, None means any."""
    used_before: float | None = None
    """It was last used (or made, if it was never used) before this time."""
    used_after: float | None = None
    larger_than: int | None = None
    """The stored bytes of all its parts together are more than this."""
    smaller_than: int | None = None
    """The stored bytes of all its parts together are fewer than this."""
    address_prefix: str | None = None
    """The first hex digits of an address."""

    @property
    def is_everything(self) -> bool:
        """Whether nothing is given, or only empty strings, which every text begins with and contains."""
        texts = {name: getattr(self, name) or None for name in ("text_prefix", "text_contains", "text_matches")}
        return replace(self, **texts) == Selection()


class Order(enum.Enum):
    """Which representations come first; among equal ones, the newest."""

    NEWEST = "newest"
    """Those that were recorded last."""
    OLDEST = "oldest"
    """Those that were recorded first."""
    SIZE = "size"
    """The most stored bytes."""
    HITS = "hits"
    """The most uses."""
    USED = "used"
    """Those that were used last, or made last if they were never used."""
    SECONDS = "seconds"
    """The most seconds of computation."""


EXPIRED = "expired"
"""Why a part may be evicted: it was not used for longer than the time to live."""
VALUE = "value"
"""It is worth least: few seconds per byte, and old."""
ROOM = "room"
"""It was used within the grace, and room is needed for which nothing else is left."""
SELECTED = "selected"
"""It was asked for, whatever it is worth."""


class EvictionCandidate(NamedTuple):
    """A part that may be evicted, and what decides when."""

    address: Address
    part: Part
    nbytes: int
    seconds: float
    """How long computing its representation took."""
    used_at: float
    """When it was last used, or made if it was never used."""
    reason: str
    """One of the four above."""

    @property
    def key(self) -> tuple[Address, Part]:
        """What names the part."""
        return self.address, self.part


class Event(NamedTuple):
    """Something that somebody may want to know about: a failure, a quarantine."""

    at: float
    kind: str
    address: Address | None
    detail: str


@dataclass(frozen=True, slots=True)
class GroupTotals:
    """Sums over the representations of one model, or of one namespace."""

    num_representations: int
    nbytes: dict[Part, int]
    """Stored bytes of each kind of part, 0 where there are none."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all representations; segments and models count when they have at least one."""

    num_representations: int
    num_segments: int
    num_models: int
    num_tokens: int
    nbytes: dict[Part, int]
    """Stored bytes of each kind of part, 0 where there are none."""
    num_hits: int
    saved_seconds: float
    """Hits times compute seconds."""
