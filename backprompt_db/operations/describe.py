"""Everything that is known about one representation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from backprompt_db.database.vocabulary import Vocabulary, open_vocabulary
from backprompt_db.operations.inspection import Inspection, Kind, inspect
from backprompt_db.prompt.ids import SegmentId, TokenizerId
from backprompt_db.prompt.representation import Arrays, Part, likeliest
from backprompt_db.prompt.segments import ancestry
from backprompt_db.store.contract import Key, Store

if TYPE_CHECKING:
    from backprompt_db.catalog.catalog import Catalog
    from backprompt_db.catalog.records import Row


@dataclass(frozen=True, slots=True)
class ArrayDescription:
    """One array of a part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class PartDescription:
    """One part, as the store has it."""

    part: Part
    nbytes: int
    arrays: tuple[ArrayDescription, ...]
    problem: str | None
    """What is wrong with it, if anything is."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One segment of the prompt that ends in the one that is described."""

    segment_id: SegmentId
    parents: tuple[SegmentId, ...]
    """The ids of its parents that are known."""
    text: str


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token and its natural log-probability, which is NaN where nothing predicts the token."""

    id: int
    logprob: float
    text: str | None
    """Its share of the text; empty for all but the first token of a character, `None` where that is not known."""


@dataclass(frozen=True, slots=True)
class Description:
    """One representation: its row in the catalog, its place among the segments, and its parts in the store."""

    row: Row
    parents: tuple[SegmentId, ...]
    children: tuple[SegmentId, ...]
    prompt: tuple[Piece, ...]
    """The known segments that it follows, and itself; parents before children."""
    parts: tuple[PartDescription, ...]
    tokens: tuple[TokenScore, ...]
    """What the scores part says; empty without one."""
    next_tokens: tuple[TokenScore, ...]
    """The likeliest tokens after it, the likeliest first, as the logits part says; empty without one."""
    versions: Mapping[str, str]
    """The versions of the libraries that computed it."""


def describe(store: Store, catalog: Catalog, prefix: str, *, num_next_tokens: int = 10) -> list[Description]:
    """Return the newest 50 representations whose address or segment id begins with the hex digits `prefix`.

    Token ids become strings where the catalog knows the tokenizer. Raises `PromptError` when `prefix` is not 1 to 64
    hex digits.
    """

    @cache
    def vocabulary(tokenizer_id: TokenizerId) -> Vocabulary | None:
        return open_vocabulary(catalog, tokenizer_id)

    return [
        _describe(store, catalog, row, vocabulary(row.tokenizer_id), num_next_tokens=num_next_tokens)
        for row in catalog.find(prefix)
    ]


def _describe(
    store: Store, catalog: Catalog, row: Row, vocabulary: Vocabulary | None, *, num_next_tokens: int
) -> Description:
    found = [inspect(store, Key(row.address, part)) for part in Part]
    present = [part for part in found if part.arrays is not None or part.problem or part.key.part in row.nbytes]
    arrays = {part.key.part: part.arrays for part in found if part.arrays is not None}
    origins = [part.origin for part in found if part.origin is not None]
    return Description(
        row=row,
        parents=catalog.parents(row.segment_id),
        children=catalog.children(row.segment_id),
        prompt=_prompt(catalog, row.segment_id),
        parts=tuple(_describe_part(part) for part in present),
        tokens=_tokens(row.text, arrays.get(Part.SCORES), vocabulary),
        next_tokens=_next_tokens(arrays.get(Part.LOGITS), vocabulary, count=num_next_tokens),
        versions=origins[0].versions if origins else {},
    )


def _describe_part(found: Inspection) -> PartDescription:
    arrays = tuple(
        ArrayDescription(name, array.dtype, array.shape, array.nbytes) for name, array in (found.arrays or {}).items()
    )
    problem = None
    if found.problem is not None:
        problem = f"{found.problem.kind.value}: {found.problem.detail}"
    elif found.arrays is None:
        problem = f"{Kind.MISSING.value}: the catalog has it, the store does not"
    return PartDescription(found.key.part, found.nbytes, arrays, problem)


def _prompt(catalog: Catalog, segment_id: SegmentId) -> tuple[Piece, ...]:
    segment = catalog.segment(segment_id)
    found = () if segment is None else ancestry([segment])
    return tuple(Piece(each.id, tuple(parent.id for parent in each.parents), each.string) for each in found)


def _tokens(text: str, scores: Arrays | None, vocabulary: Vocabulary | None) -> tuple[TokenScore, ...]:
    if scores is None:
        return ()
    ids, logprobs = (scores[name].numpy().tolist() for name in ("input_ids", "token_logprobs"))
    pieces = [None] * len(ids) if vocabulary is None else vocabulary.pieces(text, ids)
    return tuple(TokenScore(*token) for token in zip(ids, logprobs, pieces, strict=True))


def _next_tokens(logits: Arrays | None, vocabulary: Vocabulary | None, *, count: int) -> tuple[TokenScore, ...]:
    if logits is None:
        return ()
    found = likeliest(logits["logits"], min(count, logits["logits"].shape[0]))
    return tuple(
        TokenScore(token_id, logprob, None if vocabulary is None else vocabulary.token(token_id))
        for token_id, logprob in found
    )
