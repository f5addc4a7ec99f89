"""What self-checks have shown, remembered for all databases of a user on this machine.

One small file for each model, in the user's cache directory; $BACKPROMPT_DB_VERDICTS names another one, and an empty
value none. Who can write there can run any code as this user anyway.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import msgspec
import platformdirs

from backprompt_db.catalog.records import ModelRecord
from backprompt_db.prompt.ids import WeightsId

logger = logging.getLogger(__name__)

VARIABLE = "BACKPROMPT_DB_VERDICTS"


class _Found(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds: the fields of a `ModelRecord` that do not depend on where the model lies."""

    architecture: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int | None
    verdict: str
    mask_form: str | None
    max_error: float | None
    reason: str | None
    checked_with: str | None


def recalled(weights_id: WeightsId, *, device: str, name: str) -> ModelRecord | None:
    """Return what was found out about a model on such a device, under the name that it has now; None if nothing was."""
    path = _path(weights_id, device)
    if path is None:
        return None
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Found)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.info("%s cannot be used: %s", path, error)
        return None
    return ModelRecord(weights_id=weights_id, name=name, **msgspec.structs.asdict(found))


def remember(record: ModelRecord, *, device: str) -> None:
    """Write down what was found out about a model; a file that cannot be written costs another check."""
    path = _path(record.weights_id, device)
    if path is None:
        return
    content = msgspec.json.encode(msgspec.convert(asdict(record), type=_Found))
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)


def _path(weights_id: WeightsId, device: str) -> Path | None:
    given = os.environ.get(VARIABLE)
    if given == "":
        return None
    directory = Path(given) if given else Path(platformdirs.user_cache_dir("backprompt-db-verdicts", appauthor=False))
    return directory / f"{weights_id.hex()}-{device}.json"
