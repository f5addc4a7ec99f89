"""Small files in which it is remembered, for all databases of a user on this machine, what was found out about models.

They are in the user's cache directory; $BACKPROMPT_DB_VERDICTS names another one, and an empty value none. Who can
write there can run any code as this user anyway.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import TypeVar

import msgspec
import platformdirs

from backprompt_db.system.files import read_small, replacing

logger = logging.getLogger(__name__)

VARIABLE = "BACKPROMPT_DB_VERDICTS"

_Memo = TypeVar("_Memo")


def are_kept() -> bool:
    """Whether anything is remembered on this machine."""
    return os.environ.get(VARIABLE) != ""


def place_of(name: str) -> Path | None:
    """Return the path of the file of that name; None where nothing is to be remembered."""
    if not are_kept():
        return None
    given = os.environ.get(VARIABLE)
    directory = Path(given) if given else Path(platformdirs.user_cache_dir("backprompt-db-verdicts", appauthor=False))
    return directory / f"{name}.json"


def recalled(name: str, kind: type[_Memo]) -> _Memo | None:
    """Return what was remembered under a name; None for nothing, and for what cannot be read as a `kind`."""
    path = place_of(name)
    if path is None:
        return None
    try:
        return msgspec.json.decode(read_small(path), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.info("%s cannot be used: %s", path, error)
        return None


def remember(name: str, memo: object) -> None:
    """Write something down under a name; a file that cannot be written costs finding it out again."""
    path = place_of(name)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(msgspec.json.encode(memo))
