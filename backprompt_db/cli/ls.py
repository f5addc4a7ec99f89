"""`ls`: the representations of a database, or its models."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backprompt_db.catalog.records import Order
from backprompt_db.cli.location import DbOption, directory_of
from backprompt_db.cli.options import (
    LIMIT,
    GrepOption,
    LabelOption,
    LargerThanOption,
    ModelOption,
    NamespaceOption,
    OlderThanOption,
    SmallerThanOption,
    UsedWithinOption,
    selected,
)
from backprompt_db.cli.output import JsonOption, emit, emit_json, json_value, progress_bar, short_name
from backprompt_db.views.console import bare_table, grid, literal, one_line
from backprompt_db.views.formatting import age, shortened, size, visible

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from backprompt_db.catalog.catalog import Catalog
    from backprompt_db.catalog.records import GroupTotals, ModelRecord, Row, Selection


_NUM_ADDRESS_DIGITS = 12
_NUM_TEXT_CHARACTERS = 200
_NUM_CHARACTERS_BEFORE = 8
"""Shown before a string that was found: few, so that the string is seen in a narrow column, too."""
_MAX_PLACES = 100
_FOUND_STYLE = "bold red"
_LONG_SEARCH_SECONDS = 2.0


class Sort(enum.StrEnum):
    """Those orders of the catalog that the command offers."""

    NEWEST = Order.NEWEST.value
    SIZE = Order.SIZE.value
    HITS = Order.HITS.value
    USED = Order.USED.value
    SECONDS = Order.SECONDS.value


_SortOption = Annotated[
    Sort,
    typer.Option(
        "--sort", metavar="BY", help="What comes first: newest, size, hits, used (last), seconds (of computation)."
    ),
]
_IndexOption = Annotated[
    bool, typer.Option("--index", help="First make an index of all texts, which makes --grep fast in large databases.")
]


def ls(
    *,
    db: DbOption = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help=LIMIT)] = 20,
    grep: GrepOption = None,
    namespace: NamespaceOption = None,
    label: LabelOption = None,
    model: ModelOption = None,
    used_within: UsedWithinOption = None,
    older_than: OlderThanOption = None,
    larger_than: LargerThanOption = None,
    smaller_than: SmallerThanOption = None,
    sort: _SortOption = Sort.NEWEST,
    index: _IndexOption = False,
    models: Annotated[bool, typer.Option("--models", help="List the models instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the newest representations: address, model, tokens, size, age, last use, hits, text.

    With --grep, only those whose text contains a string, and where. Representations must match all given options.
    `show` takes the beginning of an address. With --models, list every model with the results of its checks.
    """
    directory = directory_of(db)
    if models:
        _list_models(directory, as_json=as_json)
        return
    if index:
        _make_index(directory)
    selection = selected(
        text_matches=grep,
        namespace=namespace,
        label=label,
        model=model,
        used_within=used_within,
        older_than=older_than,
        larger_than=larger_than,
        smaller_than=smaller_than,
    )
    rows = _rows(directory, selection, limit=limit, sort=sort)
    if as_json:
        emit_json([json_value(row) | {"matches": places(row.text, grep)} for row in rows] if grep else rows)
    else:
        nothing = "The catalog lists no representations." if selection.is_everything else "Nothing matches all options."
        emit(_table(rows, grep) if rows else nothing)


def _make_index(directory: Path) -> None:
    from backprompt_db.catalog.search import TEXTS_PER_BATCH
    from backprompt_db.operations.reindex import update_index

    steps = update_index(directory)
    for _ in progress_bar(steps, "Indexing texts", total=next(steps) / TEXTS_PER_BATCH):
        pass


def _rows(directory: Path, selection: Selection, *, limit: int, sort: Sort) -> list[Row]:
    from backprompt_db.database.opening import open_catalog

    with open_catalog(directory) as catalog:
        if selection.text_matches:
            _keep_up_index(directory, catalog)
        before = time.monotonic()
        rows = catalog.rows(limit=limit, selection=selection, order=Order(sort.value))
        if selection.text_matches and time.monotonic() - before > _LONG_SEARCH_SECONDS and not catalog.has_index():
            typer.echo("hint: --index makes an index of the texts, which later searches use.", err=True)
    return rows


def _keep_up_index(directory: Path, catalog: Catalog) -> None:
    from backprompt_db.operations.reindex import keep_up_index

    if catalog.has_index():
        keep_up_index(directory)


def _table(rows: list[Row], grep: str | None) -> Table:
    table, now = bare_table(), time.time()
    table.add_column("address", no_wrap=True)
    table.add_column("model", min_width=5, max_width=20)
    for name in ("tokens", "size", "age", "used", "hits"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("text", min_width=24 if grep else 10)
    for row in rows:
        table.add_row(
            row.address.hex()[:_NUM_ADDRESS_DIGITS],
            one_line(literal(short_name(row.model_name))),
            f"{row.num_tokens:,}",
            size(sum(row.nbytes.values())),
            age(row.created_at, now=now),
            age(row.last_used_at, now=now),
            f"{row.num_hits:,}",
            one_line(excerpt(row.text, grep) if grep else literal(_beginning(row.text))),
        )
    return table


def _beginning(text: str) -> str:
    return shortened(text, num_characters=_NUM_TEXT_CHARACTERS)


def places(text: str, string: str) -> list[tuple[int, int]]:
    """Return the first hundred places, each with begin and end, where a text has a string in lower or upper case."""
    from backprompt_db.catalog.search import occurrences

    return list(itertools.islice(occurrences(text, string), _MAX_PLACES))


def excerpt(text: str, string: str) -> Text:
    """Return a text from shortly before the first place where it has a string, with ellipses where more is left out."""
    from rich.text import Text

    found = places(text, string)
    begin = max(0, found[0][0] - _NUM_CHARACTERS_BEFORE) if found else 0
    end = begin + _NUM_TEXT_CHARACTERS
    shown = Text("…" if begin else "")
    for first, last in itertools.takewhile(lambda place: place[0] < end, found):
        shown.append(visible(text[begin:first])).append(visible(text[first:last]), _FOUND_STYLE)
        begin = last
    return shown.append(visible(text[begin:end])).append("…" if max(begin, end) < len(text) else "")


def _list_models(directory: Path, *, as_json: bool) -> None:
    from backprompt_db.catalog.records import GroupTotals
    from backprompt_db.database.location import CATALOG
    from backprompt_db.database.opening import open_catalog
    from backprompt_db.operations.stats import sums_by_model
    from backprompt_db.prompt.representation import Part

    with open_catalog(directory) as catalog:
        records = catalog.models()
    sums = sums_by_model(directory / CATALOG)
    nothing = GroupTotals(0, dict.fromkeys(Part, 0))
    found = [(record, sums.get(record.weights_id, nothing)) for record in records]
    if as_json:
        emit_json([_fields(record) | _fields(total) for record, total in found])
    else:
        blocks = [(grid(_model_facts(record, total)), "") for record, total in found]
        emit(*itertools.chain(*blocks) if blocks else ["The catalog lists no models."])


def _fields(value: ModelRecord | GroupTotals) -> dict[str, Any]:
    fields = dataclasses.asdict(value)
    fields.pop("signature", None)  # means nothing to people
    return fields


_VERDICTS = {
    "packs": "packs: several pieces run in one pass, branches too",
    "chains": "chains: one piece runs in a pass, without branches",
    "refused": "refused: what it computes cannot be cached and stay right",
    "unchecked": "unchecked: nothing was computed with it here",
}
_ROUNDED = frozenset({"float16", "bfloat16"})


def _exactness(record: ModelRecord) -> str:
    """Say what the check has measured: the largest error of any log-probability, or of keys and values, in all."""
    if record.max_error is None or record.verdict not in ("packs", "chains"):
        return "-"
    error = f"within {record.max_error:.1e} of plain passes"
    return f"{error}, which {record.dtype} rounds as much" if record.dtype in _ROUNDED else error


def _model_facts(record: ModelRecord, total: GroupTotals) -> dict[str, str]:
    return {
        "model": record.name or "?",
        "weights": record.weights_id.hex()[:_NUM_ADDRESS_DIGITS],
        "architecture": record.architecture or "?",
        "dtype": record.dtype or "?",
        "verdict": _VERDICTS[record.verdict],
        "mask form": record.mask_form or "-",
        "exactness": _exactness(record),
        "reason": record.reason or "-",
        "representations": f"{total.num_representations:,}",
        "size": size(sum(total.nbytes.values())),
    }
