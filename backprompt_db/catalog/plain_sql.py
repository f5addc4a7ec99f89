"""Reading a catalog by plain SQL: where little is asked, importing SQLAlchemy would take longest."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backprompt_db.errors import CatalogError
from backprompt_db.prompt.ids import WeightsId

_TIMEOUT_SECONDS = 5.0
_NUM_TIMED = 1_000

_TIMINGS = """
    SELECT compute_seconds, num_tokens FROM representations WHERE weights_id = :weights_id AND compute_seconds > 0
    ORDER BY created_at DESC LIMIT :limit
"""


def rows(path: Path, query: str, **values: object) -> Sequence[tuple[Any, ...]]:
    """Return what a query finds in the catalog at `path`; raises `CatalogError` if it is unusable."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=_TIMEOUT_SECONDS)) as connection:
            return connection.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise CatalogError(
            f"the catalog {path} failed: {error}",
            hint="Run `backprompt-db reindex`: it upgrades the catalog, or rebuilds it from the store.",
        ) from error


def timings(path: Path, weights_id: WeightsId) -> list[tuple[float, int]]:
    """Return what the newest representations of a model took to compute: seconds and tokens, both above 0."""
    found = rows(path, _TIMINGS, weights_id=weights_id, limit=_NUM_TIMED)
    return [
        (seconds, num_tokens)
        for seconds, num_tokens in found
        if isinstance(seconds, float) and isinstance(num_tokens, int) and num_tokens > 0  # SQLite keeps any value
    ]
