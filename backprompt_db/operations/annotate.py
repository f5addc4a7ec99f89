"""What people set on representations: pins keep them from being evicted, labels select them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from backprompt_db.database.database import writable_catalog
from backprompt_db.errors import PromptError
from backprompt_db.prompt.ids import Address

if TYPE_CHECKING:
    from backprompt_db.catalog.catalog import Catalog
    from backprompt_db.catalog.records import Row, Selection
    from backprompt_db.database.database import Database


def pin(db: Database, selection: Selection, *, is_pinned: bool = True) -> int:
    """Pin, or unpin, what is selected and all that it follows under the same models; return how many were set.

    Unpinning includes what other prompts share with it. Raises `PromptError` when nothing is selected, `StoreReadOnly`
    and `CatalogError` where nothing can be set.
    """
    catalog = writable_catalog(db)
    chosen = _chosen(catalog, selection)
    ids = {(row.weights_id, row.tokenizer_id) for row in chosen}
    before = catalog.of_segments(catalog.ancestors({row.segment_id for row in chosen}))
    followed = [row for row in before if (row.weights_id, row.tokenizer_id) in ids]
    return _set(chosen + followed, lambda addresses: catalog.pin(addresses, is_pinned=is_pinned))


def label(db: Database, selection: Selection, name: str | None) -> int:
    """Label what is selected, or remove its label with None; return how many were set. Raises what `pin` raises."""
    catalog = writable_catalog(db)
    return _set(_chosen(catalog, selection), lambda addresses: catalog.label(addresses, name))


def _chosen(catalog: Catalog, selection: Selection) -> list[Row]:
    if selection.is_everything:
        raise PromptError("nothing says which representations are meant", hint="Select them, or one --namespace.")
    rows = list(catalog.select(selection))
    if not rows:
        raise PromptError("nothing is selected", hint="See what there is with `backprompt-db ls`.")
    return rows


def _set(rows: Iterable[Row], change: Callable[[Iterable[Address]], None]) -> int:
    addresses = {row.address for row in rows}
    change(addresses)
    return len(addresses)
