"""Parts to enter into a catalog, under two models and in any namespace, and catalogs to enter them into."""

from __future__ import annotations

import contextlib
import functools
import json
import sqlite3
import tempfile
from collections.abc import Iterable
from pathlib import Path

from hypothesis import strategies as st

from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import ModelRecord, Row, StoredPart
from backprompt_db.prompt.ids import Address, TokenizerId, WeightsId, namespace_id
from backprompt_db.prompt.representation import Origin, Part

WEIGHTS = WeightsId(b"w" * 32)
OTHER_WEIGHTS = WeightsId(b"W" * 32)
TOKENIZER = TokenizerId(b"t" * 32)
MODEL = ModelRecord(
    weights_id=WEIGHTS,
    name="gpt2",
    architecture="GPT2LMHeadModel",
    dtype="float32",
    num_layers=12,
    num_kv_heads=12,
    head_dim=64,
    vocab_size=50257,
    max_positions=1024,
    verdict="packs",
    mask_form="4d",
    max_error=1e-6,
    reason=None,
    checked_with="torch 2.9, transformers 5.20, sdpa",
)
HOSTILE = ["'; DROP TABLE segments; --", '"quoted"', "%_\\", "a\0b", ":at ?1 $x", "naïve 🦜\n\t", "*[a-z]"]
"""Strings that mean something to SQL, or to patterns."""


def is_list_of_int(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


_IN_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
)
_LOOSE = st.integers(-9, 9) | st.floats(allow_nan=False) | st.binary() | st.text(st.characters(codec="utf-8"))
BAD_LISTS: st.SearchStrategy[object] = _IN_JSON.filter(lambda each: not is_list_of_int(each)).map(json.dumps) | _LOOSE
"""Values for a column with lists of whole numbers, which are none."""


def origin_of(
    text: str, *parents: Origin, weights_id: WeightsId = WEIGHTS, compute_seconds: float = 0.5, namespace: str = ""
) -> Origin:
    synthetic = namespace_id(namespace)
    ids = tuple(sorted(parent.segment_id for parent in parents)) or (() if synthetic is None else (synthetic,))
    return Origin(
        text=text,
        parents=ids,
        start=None,
        weights_id=weights_id,
        tokenizer_id=TOKENIZER,
        num_tokens=len(text.split()),
        compute_seconds=compute_seconds,
        namespace=namespace,
    )


def stored(origin: Origin, part: Part = Part.KV, nbytes: int = 100) -> StoredPart:
    return StoredPart(origin.address, part, nbytes, origin)


def texts(rows: Iterable[Row]) -> list[str]:
    return [row.text for row in rows]


def evicted_at(catalog: Catalog, address: Address) -> float | None:
    """When something of a representation was evicted the last time, as far as the catalog knows."""
    return catalog.evictions([address]).get(address)


@functools.cache
def _empty_catalog() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "catalog.sqlite"
        Catalog.open(path).close()
        return path.read_bytes()


def new_catalog(path: Path) -> Catalog:
    """Open a new catalog without running its migrations again."""
    path.write_bytes(_empty_catalog())
    return Catalog.open(path)


def put(path: Path, table: str, column: str, value: object) -> None:
    """Put a value into a column of every row, as whoever edits the file can."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(f"UPDATE {table} SET {column} = ?", (value,))  # noqa: S608
