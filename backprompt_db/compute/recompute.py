"""Computing segments once more, with nothing that is stored anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from backprompt_db.compute.engine import Engine
from backprompt_db.compute.inference.loading import ModelSource, PretrainedModel
from backprompt_db.compute.plan import Need, Wanted
from backprompt_db.database.database import MEMORY
from backprompt_db.database.opening import open_database
from backprompt_db.errors import ModelMismatch
from backprompt_db.prompt.representation import Arrays, Part
from backprompt_db.prompt.segments import ancestry

if TYPE_CHECKING:
    from backprompt_db.prompt.ids import ModelIds

_NEEDED_BY_OTHERS = frozenset({Part.LOGITS, Part.KV})


class Recomputer:
    """A model that computes everything that it is asked for, ancestors included, in a database of its own."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source

    @property
    def name(self) -> str:
        """What people call the model."""
        return self._source.name

    @property
    def ids(self) -> ModelIds:
        """The ids of the model and the tokenizer."""
        return self._source.ids

    @property
    def kv_dtype(self) -> str:
        """The safetensors name of the dtype of keys and values."""
        return self._source.runner.kv_dtype

    def compute(self, wanted: Wanted) -> Mapping[Need, Arrays]:
        """Return the wanted parts. Raises the `ComputeError` that fits where the model cannot be used."""
        keep = dict.fromkeys(ancestry(wanted), _NEEDED_BY_OTHERS)
        with open_database(MEMORY) as db:
            found, _ = Engine(self._source, db, deterministic=False, progress=False).represent(wanted, keep=keep)
        return found


def pretrained(name_or_path: str, *, dtype: str | None = None) -> Recomputer:
    """Return the model of that name or directory, loaded. Raises `ModelMismatch` where it cannot be."""
    model = Recomputer(PretrainedModel(name_or_path, {} if dtype is None else {"dtype": dtype}, known_ids=None))
    try:
        _ = model.ids
    except (OSError, ValueError, AttributeError) as error:  # whatever transformers says of a name, a path or a dtype
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelMismatch(
            f"{name_or_path} cannot be loaded: {reason}", hint="Give a causal language model's name or path."
        ) from error
    return model
