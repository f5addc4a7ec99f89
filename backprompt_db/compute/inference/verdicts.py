"""What self-checks have shown, remembered for all databases of a user on this machine.

One small file for each model, in the user's cache directory; $BACKPROMPT_DB_VERDICTS names another one, and an empty
value none. Who can write there can run any code as this user anyway.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace
from pathlib import Path

import msgspec
import platformdirs

from backprompt_db.catalog.records import ModelRecord
from backprompt_db.prompt.ids import WeightsId
from backprompt_db.system.files import read_small, replacing

logger = logging.getLogger(__name__)

VARIABLE = "BACKPROMPT_DB_VERDICTS"


def recalled(weights_id: WeightsId, *, device: str, name: str) -> ModelRecord | None:
    """Return what was found out about a model on such a device, under the name that it has now; None if nothing was."""
    path = _path(weights_id, device)
    if path is None:
        return None
    try:
        found = msgspec.json.decode(read_small(path), type=ModelRecord)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.info("%s cannot be used: %s", path, error)
        return None
    return replace(found, name=name) if found.weights_id == weights_id else None


def remember(record: ModelRecord, *, device: str) -> None:
    """Write down what was found out about a model; a file that cannot be written costs another check."""
    path = _path(record.weights_id, device)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(msgspec.json.encode(record))


def _path(weights_id: WeightsId, device: str) -> Path | None:
    given = os.environ.get(VARIABLE)
    if given == "":
        return None
    directory = Path(given) if given else Path(platformdirs.user_cache_dir("backprompt-db-verdicts", appauthor=False))
    return directory / f"{weights_id.hex()}-{device}.json"
