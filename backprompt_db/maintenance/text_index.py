"""The index of texts of a database on disk: made on request, and kept up by those who search."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import TYPE_CHECKING

from backprompt_db.errors import CatalogError
from backprompt_db.maintenance.existing import CATALOG, open_catalog

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_KEEPING_UP_SECONDS = 2.0


def update_index(directory: Path) -> Iterator[int]:
    """Make the index, or bring it up to date, some texts at a time; yield how many are left, until none are.

    Raises `CatalogError` for a catalog that cannot be written to or read.
    """
    from backprompt_db.catalog import Catalog

    open_catalog(directory).close()  # which neither makes a catalog nor upgrades one
    with Catalog.open(directory / CATALOG) as catalog:
        yield from catalog.index_texts()


def keep_up_index(directory: Path) -> None:
    """Add to the index what was recorded since, for two seconds at most, where one may write."""
    deadline = time.monotonic() + _KEEPING_UP_SECONDS
    with contextlib.suppress(CatalogError):
        for _ in itertools.takewhile(lambda _: time.monotonic() < deadline, update_index(directory)):
            pass
