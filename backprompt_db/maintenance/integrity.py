"""Whether the catalog's file is whole, and its rows refer to what is there, in plain SQL."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

_TIMEOUT_SECONDS = 5.0
_MAX_FLAWS = 10


def catalog_flaws(path: Path) -> list[str]:
    """Return what SQLite finds wrong with the catalog at `path`, at most 10 lines; none for a whole one."""
    try:
        with contextlib.closing(_connect(path)) as connection:
            damage = [str(line) for (line,) in connection.execute(f"PRAGMA integrity_check({_MAX_FLAWS})")]
            dangling = connection.execute("PRAGMA foreign_key_check").fetchmany(_MAX_FLAWS)
    except sqlite3.Error as error:
        return [f"it cannot be read: {error}"]
    flaws = [] if damage == ["ok"] else damage
    return flaws + [
        f"a row of {table} refers to a row of {target} that is not there" for table, _, target, _ in dangling
    ]


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_TIMEOUT_SECONDS)
