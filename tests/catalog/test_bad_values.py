"""SQLite keeps any value in any column. What does not belong there is unknown, or a `CatalogError`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import Column

from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import CutsRecord, Event, GreedyPath, Order, Selection, Source, TokenizerRecord
from backprompt_db.catalog.schema import Base
from backprompt_db.errors import CatalogError
from backprompt_db.prompt.ids import Address
from backprompt_db.prompt.segments import Segment
from tests.conftest import cases
from tests.support.catalogs import (
    BAD_LISTS,
    MODEL,
    TOKENIZER,
    WEIGHTS,
    is_list_of_int,
    new_catalog,
    origin_of,
    put,
    stored,
)

KEY = Address(b"k" * 32)
PARENT = origin_of("one")
CHILD = origin_of("two", PARENT)
LISTS = st.lists(st.integers(-2, 9), max_size=3).map(json.dumps)

READERS: list[Callable[[Catalog], object]] = [
    Catalog.models,
    lambda catalog: catalog.model(WEIGHTS),
    Catalog.tokenizers,
    lambda catalog: catalog.definition(TOKENIZER),
    lambda catalog: catalog.source(KEY),
    lambda catalog: catalog.cuts(KEY),
    lambda catalog: catalog.greedy_paths([KEY]),
    lambda catalog: [catalog.rows(order=order) for order in Order],
    Catalog.totals,
    Catalog.totals_by_model,
    lambda catalog: list(catalog.keys()),
    lambda catalog: catalog.segment(CHILD.segment_id),
    lambda catalog: catalog.edges([CHILD.segment_id]),
    Catalog.counts,
    Catalog.events,
    lambda catalog: catalog.evictions([KEY]),
    lambda catalog: catalog.generations([KEY]),
    lambda catalog: catalog.eviction_order(2**40, at=9.0, grace_seconds=0.0),
    lambda catalog: list(catalog.select(Selection(text_prefix="one"))),
    lambda catalog: list(catalog.select(Selection(text_matches="two"))),
    lambda catalog: catalog.find(CHILD.address.hex()),
    lambda catalog: catalog.namesakes(
        ["two"], (WEIGHTS, TOKENIZER), [Segment.after((), "two", start=None, namespace="")]
    ),
]


def oracle(found: object) -> tuple[int, ...] | None:
    """What the standard library reads, None for anything but a list of whole numbers."""
    try:
        numbers: Any = json.loads(found) if isinstance(found, str) else None
    except (ValueError, RecursionError):
        return None
    return tuple(numbers) if is_list_of_int(numbers) else None


@given(found=BAD_LISTS | LISTS)
@example(found=f"[{2**80}]")
@example(found="[" * 5_000)
@example(found="[" + "9" * 5_000 + "]")
def test_a_list_that_was_not_written_by_the_library_is_unknown(
    tmp_path_factory: pytest.TempPathFactory, found: str | float | bytes
) -> None:
    path = tmp_path_factory.mktemp("catalog") / "catalog.sqlite"
    with new_catalog(path) as catalog:
        catalog.save(CutsRecord(KEY, (1,)), GreedyPath(KEY, (1,)))
        put(path, "cuts", "offsets", found)
        put(path, "greedy_paths", "token_ids", found)
        cuts, paths = catalog.cuts(KEY), catalog.greedy_paths([KEY])
        catalog.save(CutsRecord(KEY, (2,)), GreedyPath(KEY, (2,)))
        assert (catalog.cuts(KEY), catalog.greedy_paths([KEY])) == (
            CutsRecord(KEY, (2,)),
            {KEY: GreedyPath(KEY, (2,))},
        )
    numbers = oracle(found)
    are_cuts = numbers is not None and all(begin < end for begin, end in pairwise((0, *numbers)))
    are_tokens = numbers is not None and all(0 <= token < 2**32 for token in numbers)
    assert cuts == (CutsRecord(KEY, numbers) if numbers is not None and are_cuts else None)
    assert paths == ({KEY: GreedyPath(KEY, numbers)} if numbers is not None and are_tokens else {})


@pytest.mark.parametrize("column", ["weights_id", "tokenizer_id"])
@pytest.mark.parametrize("value", [b"", b"short", b"w" * 33])
def test_a_source_without_whole_ids_is_unknown(tmp_path: Path, column: str, value: bytes) -> None:
    path = tmp_path / "catalog.sqlite"
    with new_catalog(path) as catalog:
        catalog.save(Source(KEY, "org/model", WEIGHTS, TOKENIZER))
        put(path, "sources", column, value)
        assert catalog.source(KEY) is None


COLUMNS = [
    column
    for table in Base.metadata.sorted_tables
    for column in table.columns
    if not column.primary_key and not column.foreign_keys
]

OF_EACH_TYPE = {(column.table.name, column.type.python_type): column for column in COLUMNS}
"""One column of each type in each table."""


@pytest.mark.parametrize("column", cases(COLUMNS, by_default=set(OF_EACH_TYPE.values())), ids=str)
def test_a_value_of_another_type_never_comes_out(tmp_path: Path, column: Column[Any]) -> None:
    path = tmp_path / "catalog.sqlite"
    with new_catalog(path) as catalog:
        catalog.save(MODEL, TokenizerRecord(TOKENIZER, "a", "BPE", 9), Source(KEY, "org/model", WEIGHTS, TOKENIZER))
        catalog.save(CutsRecord(KEY, (1,)), GreedyPath(KEY, (1,)))
        catalog.record([stored(PARENT), stored(CHILD)], at=1.0)
        catalog.count({"hits": 1.0})
        catalog.log([Event(1.0, "kind", KEY, "detail")])
        for value in (b"\xff", "other", 1.5, -(10**12)):
            put(path, column.table.name, column.name, value)
            for read in READERS:
                with contextlib.suppress(CatalogError):
                    found = repr(read(catalog))
                    assert isinstance(value, float | int | column.type.python_type) or repr(value) not in found
