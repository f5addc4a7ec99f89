"""`ls`: the newest representations, or the models."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backprompt_db.cli.location import DbOption, directory_of
from backprompt_db.cli.output import JsonOption, age, emit, emit_json, grid, literal, shortened, size
from backprompt_db.cli.selecting import LabelOption, ModelOption, NamespaceOption

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from backprompt_db.catalog import ModelRecord, Row
    from backprompt_db.maintenance.sums import GroupSums

_NUM_ADDRESS_DIGITS = 12
_NUM_TEXT_CHARACTERS = 200


def ls(
    *,
    db: DbOption = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="How many representations.")] = 20,
    namespace: NamespaceOption = None,
    label: LabelOption = None,
    model: ModelOption = None,
    models: Annotated[bool, typer.Option("--models", help="List the models instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the newest representations: address, model, tokens, size, age, last use, hits, text.

    `show` takes the beginning of an address. With --models, list every model with what checking it has shown.
    """
    directory = directory_of(db)
    if models:
        _list_models(directory, as_json=as_json)
        return
    rows = _rows(directory, limit=limit, namespace=namespace, label=label, model=model)
    if as_json:
        emit_json(rows)
    else:
        emit(_table(rows) if rows else "The catalog lists no representations.")


def _rows(directory: Path, *, limit: int, namespace: str | None, label: str | None, model: str | None) -> list[Row]:
    from backprompt_db.catalog import Selection
    from backprompt_db.maintenance.existing import open_catalog

    with open_catalog(directory) as catalog:
        return catalog.rows(limit=limit, selection=Selection(namespace=namespace, label=label, model=model))


def _table(rows: list[Row]) -> Table:
    from rich.table import Table

    table, now = Table(box=None, pad_edge=False, header_style="bold"), time.time()
    table.add_column("address", no_wrap=True)
    table.add_column("model", min_width=5, max_width=20)
    for name in ("tokens", "size", "age", "used", "hits"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("text", min_width=10)
    for row in rows:
        table.add_row(
            row.address.hex()[:_NUM_ADDRESS_DIGITS],
            _cell((row.model_name or "?").rstrip("/").rpartition("/")[2]),
            f"{row.num_tokens:,}",
            size(sum(row.nbytes.values())),
            age(row.created_at, now=now),
            age(row.last_used_at, now=now),
            f"{row.num_hits:,}",
            _cell(shortened(row.text, num_characters=_NUM_TEXT_CHARACTERS)),
        )
    return table


def _cell(string: str) -> Text:
    """Return one line of text. Not the column is unwrappable but the text, so that the column can shrink."""
    text = literal(string)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _list_models(directory: Path, *, as_json: bool) -> None:
    from backprompt_db.maintenance.existing import CATALOG, open_catalog
    from backprompt_db.maintenance.sums import GroupSums, sums_by_model

    with open_catalog(directory) as catalog:
        records = catalog.models()
    sums = sums_by_model(directory / CATALOG)
    found = [(record, sums.get(record.weights_id, GroupSums())) for record in records]
    if as_json:
        emit_json([_fields(record) | _fields(total) for record, total in found])
    else:
        blocks = [(grid(_model_facts(record, total)), "") for record, total in found]
        emit(*itertools.chain(*blocks) if blocks else ["The catalog lists no models."])


def _fields(value: ModelRecord | GroupSums) -> dict[str, Any]:
    fields = dataclasses.asdict(value)
    fields.pop("signature", None)  # which tells nobody anything
    return fields


def _model_facts(record: ModelRecord, total: GroupSums) -> dict[str, str]:
    return {
        "model": record.name or "?",
        "weights": record.weights_id.hex()[:_NUM_ADDRESS_DIGITS],
        "architecture": record.architecture or "?",
        "dtype": record.dtype or "?",
        "verdict": record.verdict,
        "mask form": record.mask_form or "-",
        "measured error": "-" if record.max_error is None else f"{record.max_error:.1e}",
        "reason": record.reason or "-",
        "representations": f"{total.num_representations:,}",
        "size": size(sum(total.nbytes.values())),
    }
