"""`show`: everything about one representation."""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backprompt_db.cli.location import DbOption, directory_of
from backprompt_db.cli.output import JsonOption, emit, emit_json, json_value
from backprompt_db.views.console import bare_table, grid, literal, one_line
from backprompt_db.views.formatting import age, duration, shortened, size, visible

if TYPE_CHECKING:
    from rich.columns import Columns
    from rich.table import Table
    from rich.text import Text

    from backprompt_db.operations.describe import Description, PartDescription, Piece, TokenScore
    from backprompt_db.prompt.ids import SegmentId

_NUM_SEGMENT_DIGITS = 12
_NUM_TEXT_CHARACTERS = 200
_NUM_PIECES = 20
_NUM_IDS = 20
_SURPRISES = ((-1.0, ""), (-4.0, "yellow"), (-math.inf, "red"))
"""The lowest log-probability for each style of a token."""

_TopOption = Annotated[
    int, typer.Option("--top", metavar="N", min=1, max=1_000, help="How many of the likeliest next tokens to show.")
]


def show(
    prefix: Annotated[
        str, typer.Argument(metavar="PREFIX", help="The first hex digits of an address or of a segment id.")
    ],
    *,
    db: DbOption = None,
    top: _TopOption = 10,
    as_json: JsonOption = False,
) -> None:
    """Show everything about the representations whose address or segment id begins with PREFIX.

    The prompt that it ends, its full text, parents and children, each stored part, each token with its log-probability,
    and the likeliest next tokens. No model is loaded. If there are more than 50, the newest 50 are shown.
    """
    found = _describe(prefix, db, top=top)
    if as_json:
        emit_json([_to_json(description) for description in found])
    else:
        for description in found:
            _print(description)


def _describe(prefix: str, db: DbOption, *, top: int) -> list[Description]:
    from backprompt_db.database.opening import open_catalog, open_store
    from backprompt_db.errors import PromptError
    from backprompt_db.operations.describe import describe

    directory = directory_of(db)
    with open_catalog(directory) as catalog, contextlib.closing(open_store(directory)) as store:
        found = describe(store, catalog, prefix, num_next_tokens=top)
    if not found:
        raise PromptError(
            f"no representation has an address or a segment id that begins with {prefix}",
            hint="`backprompt-db ls` lists addresses.",
        )
    return found


def _to_json(description: Description) -> dict[str, Any]:
    fields: dict[str, Any] = json_value(description)
    row: dict[str, Any] = fields.pop("row")
    return row | fields


def _print(description: Description) -> None:
    parts = {part.part.name.lower(): _part_line(part) for part in description.parts}
    emit(grid(_facts(description) | parts), "", "prompt", _prompt(description.prompt), "")
    if description.tokens:
        emit("tokens, with log-probabilities", _tokens(description.tokens), "")
    else:
        emit("no scores", "")
    if description.next_tokens:
        emit("likeliest next tokens", _next_tokens(description.next_tokens), "")
    emit("text", _indented(description.row.text), "", wrap=False)


def _facts(description: Description) -> dict[str, str]:
    row, now = description.row, time.time()
    return {
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


def _ids(ids: tuple[SegmentId, ...]) -> str:
    shown = [segment_id.hex() for segment_id in ids[:_NUM_IDS]]
    return " ".join([*shown, f"and {len(ids) - _NUM_IDS:,} more"] if len(ids) > _NUM_IDS else shown) or "-"


def _part_line(part: PartDescription) -> str:
    arrays = ", ".join(f"{array.name} {array.dtype} {list(array.shape)}" for array in part.arrays)
    return part.problem or f"{size(part.nbytes)}: {arrays}"


def _prompt(pieces: tuple[Piece, ...]) -> Table:
    """List the pieces of a prompt and mark the last. Of a long prompt, only the last pieces are listed."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for _ in ("mark", "number", "segment", "after"):
        table.add_column(no_wrap=True)
    table.add_column()
    numbers = {piece.segment_id: number for number, piece in enumerate(pieces, start=1)}
    if len(pieces) > _NUM_PIECES:
        table.add_row("", "", "", "", f"… {len(pieces) - _NUM_PIECES:,} more before these")
    for piece in pieces[-_NUM_PIECES:]:
        after = ", ".join(str(number) for number in sorted(numbers[parent] for parent in piece.parents))
        table.add_row(
            ">" if piece is pieces[-1] else "",
            str(numbers[piece.segment_id]),
            piece.segment_id.hex()[:_NUM_SEGMENT_DIGITS],
            f"after {after}" if after else "",
            one_line(literal(shortened(piece.text, num_characters=_NUM_TEXT_CHARACTERS))),
        )
    return table


def _tokens(tokens: tuple[TokenScore, ...]) -> Columns:
    from rich.columns import Columns

    return Columns([_token(token).append(f" {_logprob(token)}", "dim") for token in tokens], padding=(0, 3))


def _token(token: TokenScore) -> Text:
    """Return a token in quotes, or its id; in colour where it is a surprise."""
    from rich.text import Text

    style = next((style for least, style in _SURPRISES if token.logprob >= least), "")
    return Text(f"'{visible(token.text)}'" if token.text else str(token.id), style)


def _logprob(token: TokenScore) -> str:
    return "-" if math.isnan(token.logprob) else f"{token.logprob:.3f}"


def _next_tokens(tokens: tuple[TokenScore, ...]) -> Table:
    table = bare_table(padding=(0, 2))
    for name in ("token", "id", "log-probability", "probability"):
        table.add_column(name, no_wrap=name != "token", justify="left" if name == "token" else "right")
    for token in tokens:
        table.add_row(_token(token), str(token.id), _logprob(token), f"{math.exp(token.logprob):.2%}")
    return table


def _indented(text: str) -> str:
    return "\n".join(f"  {visible(line)}" for line in text.split("\n"))
