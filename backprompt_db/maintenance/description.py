"""Everything that is known about one representation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backprompt_db.keys import SegmentId
from backprompt_db.maintenance.inspection import Inspection, Kind, inspect
from backprompt_db.representation import Arrays, Part
from backprompt_db.store.contract import Key, Store

if TYPE_CHECKING:
    from backprompt_db.catalog import Catalog, Row


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
class TokenScore:
    """One token and its natural log-probability, NaN where nothing predicts it."""

    id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Description:
    """One representation: its catalog row, its place among the segments, and what the store has of it."""

    row: Row
    parents: tuple[SegmentId, ...]
    children: tuple[SegmentId, ...]
    parts: tuple[PartDescription, ...]
    tokens: tuple[TokenScore, ...]
    """From the scores part; empty without one."""
    versions: Mapping[str, str]
    """The libraries that computed it."""


def describe(store: Store, catalog: Catalog, prefix: str) -> list[Description]:
    """Return the newest 50 representations whose address or segment id begins with the hex digits `prefix`.

    Raises `PromptError` when `prefix` is not 1 to 64 hex digits.
    """
    return [_describe(store, catalog, row) for row in catalog.find(prefix)]


def _describe(store: Store, catalog: Catalog, row: Row) -> Description:
    found = [inspect(store, Key(row.address, part)) for part in Part]
    present = [part for part in found if part.arrays is not None or part.problem or part.key.part in row.nbytes]
    arrays = {part.key.part: part.arrays for part in found if part.arrays is not None}
    origins = [part.origin for part in found if part.origin is not None]
    return Description(
        row=row,
        parents=catalog.parents(row.segment_id),
        children=catalog.children(row.segment_id),
        parts=tuple(_describe_part(part) for part in present),
        tokens=_tokens(arrays.get(Part.SCORES)),
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


def _tokens(scores: Arrays | None) -> tuple[TokenScore, ...]:
    if scores is None:
        return ()
    ids, logprobs = (scores[name].numpy().tolist() for name in ("input_ids", "token_logprobs"))
    return tuple(TokenScore(*token) for token in zip(ids, logprobs, strict=True))
