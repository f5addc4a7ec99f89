"""How much room a database takes on disk, and how much it may take."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from backprompt_db.database.config import read_config
from backprompt_db.database.location import STORE
from backprompt_db.errors import FormatError, StoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The room that a database takes, in bytes. What cannot be known is None, and a problem says why."""

    live_nbytes: int | None
    """The size of the store's pages in use, to which the limit applies."""
    file_nbytes: int
    """The size of all files in the directory."""
    max_nbytes: int | None
    """The limit; None where there is none."""
    fullness: float | None
    """Live bytes as a share of the limit."""
    store_problem: str | None
    config_problem: str | None


def room_of(directory: Path) -> Room:
    """Return how much room the database in `directory` takes. The time for it does not grow with what is stored."""
    live_nbytes, store_problem = _live_nbytes(directory)
    max_nbytes, config_problem = _max_nbytes(directory)
    return Room(
        live_nbytes=live_nbytes,
        file_nbytes=_file_nbytes(directory),
        max_nbytes=max_nbytes,
        fullness=None if live_nbytes is None or max_nbytes is None else live_nbytes / max_nbytes,
        store_problem=store_problem,
        config_problem=config_problem,
    )


def _live_nbytes(directory: Path) -> tuple[int | None, str | None]:
    from backprompt_db.store.environment import release, shared_environment

    try:
        environment = shared_environment(directory / STORE, readonly=True)
        try:
            return environment.usage().live_nbytes, None
        finally:
            release(environment)
    except StoreError as error:
        return None, error.message


def _max_nbytes(directory: Path) -> tuple[int | None, str | None]:
    try:
        return read_config(directory).max_nbytes, None
    except FormatError as error:
        return None, error.message


def _file_nbytes(directory: Path) -> int:
    paths = (Path(folder, name) for folder, _, names in os.walk(directory) for name in names)
    return sum(map(_nbytes, paths))


def _nbytes(path: Path) -> int:
    # SQLite's journal may vanish between being listed and being looked at.
    with contextlib.suppress(OSError):
        return path.lstat().st_size
    return 0
