"""Reading a catalog by plain SQL: where little is asked, importing SQLAlchemy would take longest."""

from __future__ import annotations

import contextlib
import sqlite3
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

from backprompt_db.catalog.schema_check import revision_of
from backprompt_db.errors import CatalogError
from backprompt_db.prompt.ids import WeightsId
from backprompt_db.system.locks import patience_for
from backprompt_db.views.formatting import shortened

STATEMENT_SECONDS = 60.0
"""How long a statement may run. In a damaged file pages may lead to each other, and a statement would never end."""

STEPS_BETWEEN_LOOKS = 100_000
"""After how many of SQLite's steps the clock is looked at: a few milliseconds."""

MAX_NUMBER = 2.0**63
"""Larger than any time, duration or sum. SQLite keeps infinity too."""

_NUM_TIMED = 1_000

_TIMINGS = """
    SELECT compute_seconds, num_tokens FROM representations WHERE weights_id = :weights_id AND compute_seconds > 0
    ORDER BY created_at DESC LIMIT :limit
"""

SUFFIXES = ("", "-journal", "-wal", "-shm")
"""What SQLite adds to a file's name for the files that belong together: itself, and those that it opens with it."""


def require_regular(path: Path) -> None:
    """Raise `CatalogError` for a link, a pipe or a device where SQLite would open a file: it would follow, or wait."""
    for suffix in SUFFIXES:
        file = path.with_name(path.name + suffix)
        with contextlib.suppress(OSError):  # which SQLite will tell
            if not stat.S_ISREG(file.lstat().st_mode):
                raise CatalogError(
                    f"the catalog's {file} is a link, a pipe or something else than a file",
                    hint="Find out who made it and why, and delete it; a reindex rebuilds the catalog from the store.",
                )


def passing(seconds: float) -> Callable[[], bool]:
    """Return what SQLite asks whether to stop: it says so once these seconds have passed."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


Kind = type | UnionType
"""What a column of an answer must be. SQLite keeps any value in any column."""


def rows(path: Path, query: str, kinds: Sequence[Kind] = (), **values: object) -> Sequence[tuple[Any, ...]]:
    """Return what a query finds in the catalog at `path`, of these kinds where any are given.

    Raises `CatalogError` if it is unusable.
    """
    require_regular(path)
    uri = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=patience_for(path))) as connection:
            connection.set_progress_handler(passing(STATEMENT_SECONDS), STEPS_BETWEEN_LOOKS)
            revision_of(connection.execute)
            found = connection.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise CatalogError(
            f"the catalog {path} failed: {error}",
            hint="Run `backprompt-db reindex`: it upgrades the catalog, or rebuilds it from the store.",
        ) from error
    for row in found if kinds else ():
        for value, kind in zip(row, kinds, strict=True):
            _require_kind(path, value, kind)
    return found


def _require_kind(path: Path, value: object, kind: Kind) -> None:
    is_finite = not isinstance(value, float) or abs(value) <= MAX_NUMBER
    if not isinstance(value, kind) or not is_finite:
        raise CatalogError(
            f"the catalog {path} has {shortened(repr(value), num_characters=40)} where something else belongs",
            hint="Run `backprompt-db reindex`: it rebuilds the catalog from the store.",
        )


def timings(path: Path, weights_id: WeightsId) -> list[tuple[float, int]]:
    """Return what the newest representations of a model took to compute: seconds and tokens, both above 0."""
    found = rows(path, _TIMINGS, weights_id=weights_id, limit=_NUM_TIMED)
    return [
        (seconds, num_tokens)
        for seconds, num_tokens in found
        if isinstance(seconds, float) and isinstance(num_tokens, int) and num_tokens > 0  # SQLite keeps any value
    ]
