"""What self-checks have shown, remembered for all databases of a user on this machine."""

from __future__ import annotations

from dataclasses import replace

from backprompt_db.catalog.records import ModelRecord
from backprompt_db.compute.inference import memos
from backprompt_db.prompt.ids import WeightsId


def recalled(weights_id: WeightsId, *, device: str, name: str) -> ModelRecord | None:
    """Return what was found out about a model on such a device, under the name that it has now; None if nothing was."""
    found = memos.recalled(_name(weights_id, device), ModelRecord)
    return replace(found, name=name) if found is not None and found.weights_id == weights_id else None


def remember(record: ModelRecord, *, device: str) -> None:
    """Write down what was found out about a model."""
    memos.remember(_name(record.weights_id, device), record)


def _name(weights_id: WeightsId, device: str) -> str:
    return f"{weights_id.hex()}-{device}"
