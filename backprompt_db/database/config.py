"""The settings of a database that may be changed while it exists: `config.json`, which is replaced whole."""

from __future__ import annotations

import contextlib
import json
import logging
import reprlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args, get_type_hints

from backprompt_db.database.location import CONFIG
from backprompt_db.errors import FormatError
from backprompt_db.store.files import Modes, Sharing, from_json
from backprompt_db.store.lmdb_errors import store_errors
from backprompt_db.system.files import read_small, replace_file

logger = logging.getLogger(__name__)

_MAX_NBYTES = 50 * 10**9
_MIN_NBYTES = 64 * 10**6
_SHARE_OF_FREE_SPACE = 4

_GREATEST_NBYTES = 1 << 62
_LONGEST_SECONDS = 1e11
"""What is beyond these bounds, 4 EiB and some 3,000 years, is a mistake, and numbers of SQLite and of clocks end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Who may use a database, how large it may grow, and what goes first when it is full."""

    sharing: Sharing = Sharing.PRIVATE
    """Which permissions its files have."""

    max_nbytes: int | None = None
    """The limit, in bytes of pages in use, over all processes; None for no limit."""
    high_water: float = 0.95
    """An eviction begins when more than this share of the limit would be in use."""
    low_water: float = 0.85
    """An eviction ends when no more than this share is in use."""
    ttl_seconds: float | None = None
    """What was not used for longer is removed at the next eviction, whether or not there is room; None to keep it."""
    grace_seconds: float = 10.0
    """What was made or used more recently than this is removed only when nothing else is left."""

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem is not None:
            raise FormatError(f"this is no configuration of a database: {problem}", hint="Give another value.")


def default_config(directory: Path, *, sharing: Sharing = Sharing.PRIVATE) -> Config:
    """Return the settings of a new database: a limit of 50 GB, or of a quarter of the free space if that is less.

    On a disk that is nearly full the limit is 64 MB: there may be more room when it is needed.
    """
    max_nbytes = min(_MAX_NBYTES, shutil.disk_usage(directory).free // _SHARE_OF_FREE_SPACE)
    return Config(sharing=sharing, max_nbytes=max(_MIN_NBYTES, max_nbytes))


def read_config(directory: Path) -> Config:
    """Return the configuration; one without limits for a database that has none. Raises `FormatError`."""
    path = directory / CONFIG
    try:
        return from_json(read_small(path), Config)
    except FileNotFoundError:
        return Config()
    except (OSError, ValueError, RecursionError, FormatError) as error:
        reason = error.message if isinstance(error, FormatError) else error
        raise FormatError(
            f"{path} cannot be read ({reason})", hint="Write it anew with `backprompt-db config --max-size SIZE`."
        ) from error


def sharing_of(directory: Path) -> Sharing:
    """Return who may use the database in `directory`: its owner alone, where its configuration cannot be read."""
    with contextlib.suppress(FormatError):
        return read_config(directory).sharing
    return Sharing.PRIVATE


def write_config(directory: Path, config: Config) -> None:
    """Replace the configuration, whole or not at all, with the permissions that it asks for itself.

    Raises the `StoreError` that fits: `StoreFull` on a full disk, `StoreReadOnly` where this user may not.
    """
    path = directory / CONFIG
    with store_errors(path):
        replace_file(path, json.dumps(asdict(config), indent=2) + "\n", mode=config.sharing.modes.file)


class Limits:
    """The configuration of the database in `directory`, read again when its file has changed. None has no limits."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._state: tuple[int, int, int] | None = None
        self._config = Config()

    @property
    def modes(self) -> Modes:
        """The permissions of files that are made now."""
        return self.config.sharing.modes

    @property
    def config(self) -> Config:
        """The configuration; the default one, which is logged, while the file cannot be read."""
        if self._directory is not None:
            state = _state(self._directory / CONFIG)
            if state != self._state:
                self._state, self._config = state, _read_or_default(self._directory)
        return self._config


def _read_or_default(directory: Path) -> Config:
    try:
        return read_config(directory)
    except FormatError as error:
        logger.warning("the default limit holds: %s", error)
    try:
        return default_config(directory)
    except OSError:  # the directory is gone
        return Config()


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _problem(config: Config) -> str | None:
    """Return what is wrong with the values."""
    for name, kind in get_type_hints(Config).items():
        value = getattr(config, name)
        if not _has_type(value, get_args(kind) or (kind,)):
            return f"{name}={value!r} is not of the type {Config.__annotations__[name]}"
    if config.max_nbytes is not None and not 0 < config.max_nbytes <= _GREATEST_NBYTES:
        return f"max_nbytes={reprlib.repr(config.max_nbytes)} is not a number of bytes from 1 to {_GREATEST_NBYTES}"
    if not 0 < config.low_water < config.high_water <= 1:
        return f"not 0 < low_water={config.low_water} < high_water={config.high_water} <= 1"
    for name, seconds in (("ttl_seconds", config.ttl_seconds), ("grace_seconds", config.grace_seconds)):
        if seconds is not None and not 0 <= seconds <= _LONGEST_SECONDS:
            return f"{name}={seconds} is not a length of time from 0 to {_LONGEST_SECONDS:.0f} seconds"
    return None


def _has_type(value: object, kinds: tuple[type, ...]) -> bool:
    """Whether a value has just one of the types: True is no number, but a whole number is one."""
    return type(value) in kinds or (type(value) is int and float in kinds)
