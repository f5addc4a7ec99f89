"""`show`: everything about one representation."""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backprompt_db.cli.location import DbOption, directory_of
from backprompt_db.cli.output import JsonOption, age, duration, emit, emit_json, grid, plain, size, visible

if TYPE_CHECKING:
    from collections.abc import Iterable

    from backprompt_db.keys import SegmentId
    from backprompt_db.maintenance.description import Description, PartDescription, TokenScore

_NUM_TOKENS_PER_LINE = 6


def show(
    prefix: Annotated[str, typer.Argument(help="The first hex digits of an address or of a segment id.")],
    *,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show everything about the representations whose address or segment id begins with PREFIX.

    The text in full, parents and children, each part as the store has it, and the log-probability of each token.
    The newest 50 are shown if there are more.
    """
    found = _describe(prefix, db)
    if as_json:
        emit_json([_to_json(description) for description in found])
    else:
        for description in found:
            _print(description)


def _describe(prefix: str, db: DbOption) -> list[Description]:
    from backprompt_db.errors import PromptError
    from backprompt_db.maintenance.description import describe
    from backprompt_db.maintenance.existing import open_catalog, open_store

    directory = directory_of(db)
    with open_catalog(directory) as catalog, contextlib.closing(open_store(directory)) as store:
        found = describe(store, catalog, prefix)
    if not found:
        raise PromptError(
            f"no representation has an address or a segment id that begins with {prefix}",
            hint="`backprompt-db ls` lists addresses.",
        )
    return found


def _to_json(description: Description) -> dict[str, Any]:
    fields: dict[str, Any] = plain(description)
    row: dict[str, Any] = fields.pop("row")
    return row | fields


def _print(description: Description) -> None:
    row, now = description.row, time.time()
    facts = {
        "address": row.address.hex(),
        "segment": row.segment_id.hex(),
        "weights": f"{row.weights_id.hex()} {row.model_name or ''}",
        "tokenizer": row.tokenizer_id.hex(),
        "namespace": row.namespace or "-",
        "start": "after its parents" if row.start is None else str(row.start),
        "parents": _ids(description.parents),
        "children": _ids(description.children),
        "tokens": f"{row.num_tokens:,}",
        "computed in": duration(row.compute_seconds),
        "computed with": ", ".join(f"{name} {number}" for name, number in description.versions.items()) or "unknown",
        "created": f"{age(row.created_at, now=now)} ago",
        "last used": "never" if row.last_used_at is None else f"{age(row.last_used_at, now=now)} ago",
        "hits": f"{row.num_hits:,}",
        "pinned": "yes" if row.is_pinned else "no",
        "label": row.label or "-",
    }
    parts = {part.part.name.lower(): _part_line(part) for part in description.parts}
    emit(grid(facts | parts))
    emit("log-probabilities" if description.tokens else "no scores", *_token_lines(description.tokens))
    emit("text", _indented(row.text), "", wrap=False)


def _ids(ids: tuple[SegmentId, ...]) -> str:
    return " ".join(segment_id.hex() for segment_id in ids) or "-"


def _part_line(part: PartDescription) -> str:
    arrays = ", ".join(f"{array.name} {array.dtype} {list(array.shape)}" for array in part.arrays)
    return part.problem or f"{size(part.nbytes)}: {arrays}"


def _token_lines(tokens: tuple[TokenScore, ...]) -> Iterable[str]:
    for begin in range(0, len(tokens), _NUM_TOKENS_PER_LINE):
        yield "  " + "   ".join(_token(token) for token in tokens[begin : begin + _NUM_TOKENS_PER_LINE])


def _token(token: TokenScore) -> str:
    logprob = "-" if math.isnan(token.logprob) else f"{token.logprob:.3f}"
    return f"{token.id} {logprob}"


def _indented(text: str) -> str:
    return "\n".join(f"  {visible(line)}" for line in text.split("\n"))
