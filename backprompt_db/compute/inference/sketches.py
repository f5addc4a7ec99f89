"""The ids of models' files, remembered on this machine: then what is loaded from unchanged files is not digested again.

With the ids, sketches of what was loaded are remembered, which are cheap: all facts but the tensors' bytes, of which a
sketch covers samples. So a patch, another configuration, or tensors that are filled at random while they are loaded are
noticed, and everything is digested.
"""

from __future__ import annotations

from dataclasses import dataclass

from backprompt_db.compute.inference import memos
from backprompt_db.prompt.ids import TokenizerId, WeightsId


@dataclass(frozen=True, slots=True)
class Sketches:
    """What was loaded once from files that have not changed since."""

    key: bytes
    """The digest of the files that `source_key` makes."""
    weights_id: WeightsId
    weights: bytes
    tokenizer_id: TokenizerId
    tokenizer: bytes


def recalled(key: bytes) -> Sketches | None:
    """Return what was remembered of the files with this key; None where nothing was."""
    found = memos.recalled(_name(key), Sketches)
    return found if found is not None and found.key == key else None


def remember(sketches: Sketches) -> None:
    """Write down what was loaded."""
    memos.remember(_name(sketches.key), sketches)


def _name(key: bytes) -> str:
    return f"{key.hex()}-files"
