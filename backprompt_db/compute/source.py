"""Where a language model comes from: objects that the user has, or files that are loaded at the first miss."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from backprompt_db.catalog import Source
from backprompt_db.compute.pretrained import source_key
from backprompt_db.compute.tokens import SegmentTokenizer
from backprompt_db.keys import TokenizerId, WeightsId

if TYPE_CHECKING:
    from backprompt_db.catalog import ModelRecord
    from backprompt_db.compute.outline import Outline
    from backprompt_db.compute.runtime import Runtime
    from backprompt_db.notes import Notes

logger = logging.getLogger(__name__)

_TOKENIZER_ARGUMENTS = (
    "revision",
    "cache_dir",
    "local_files_only",
    "token",
    "trust_remote_code",
    "subfolder",
    "gguf_file",
)


class ModelSource(Protocol):
    """A model and its tokenizer, loaded or not."""

    @property
    def name(self) -> str:
        """What people call the model."""

    @property
    def ids(self) -> tuple[WeightsId, TokenizerId]:
        """The ids of the model and the tokenizer as they are now."""

    @property
    def tokenizer(self) -> SegmentTokenizer:
        """The tokenizer; loads it if need be."""

    @property
    def runtime(self) -> Runtime:
        """The model; loads it if need be."""

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""

    def outline(self, record: ModelRecord | None) -> Outline:
        """Return what follows from the model's shape; `record` is what a self-check has shown of it."""


class GivenModel:
    """A model and a tokenizer that the user holds."""

    is_loaded = True

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from backprompt_db.compute.runtime import Runtime

        self.name = str(getattr(model, "name_or_path", "") or type(model).__name__)
        self.tokenizer = SegmentTokenizer(tokenizer)
        self.runtime = Runtime(model, name=self.name)

    @property
    def ids(self) -> tuple[WeightsId, TokenizerId]:
        """The ids of the two objects as they are now."""
        return self.runtime.weights_id, self.tokenizer.id

    def outline(self, record: ModelRecord | None) -> Outline:
        """Return what follows from the model's shape."""
        from backprompt_db.compute.outline import outline_of

        return outline_of(self.runtime, record)


class PretrainedModel:
    """A model in files. Where the ids of these very files are known, nothing is loaded until it is needed."""

    def __init__(
        self, name: str, arguments: dict[str, Any], *, known_ids: tuple[WeightsId, TokenizerId] | None
    ) -> None:
        self.name = name
        self._arguments = arguments
        self._known_ids = known_ids

    @property
    def ids(self) -> tuple[WeightsId, TokenizerId]:
        """The ids: recorded ones while the model is not loaded, and those of the loaded objects after that."""
        if self._known_ids is not None and not self.is_loaded:
            weights_id, tokenizer_id = self._known_ids
            return weights_id, self.tokenizer.id if "tokenizer" in vars(self) else tokenizer_id
        return self.runtime.weights_id, self.tokenizer.id

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return "runtime" in vars(self)

    @cached_property
    def tokenizer(self) -> SegmentTokenizer:
        """The tokenizer, loaded at the first access."""
        from transformers import AutoTokenizer

        arguments = {name: value for name, value in self._arguments.items() if name in _TOKENIZER_ARGUMENTS}
        return SegmentTokenizer(AutoTokenizer.from_pretrained(self.name, **arguments))

    @cached_property
    def runtime(self) -> Runtime:
        """The model, loaded at the first access."""
        from backprompt_db.compute.runtime import Runtime

        return Runtime.load(self.name, self._arguments)

    def outline(self, record: ModelRecord | None) -> Outline:
        """Return what follows from the model's shape, without loading it where its configuration is enough."""
        from backprompt_db.compute.outline import outline_of, outline_of_files

        if not self.is_loaded:
            try:
                return outline_of_files(self.name, self._arguments, record)
            except Exception as error:  # noqa: BLE001 - whatever transformers says of a configuration alone
                logger.info("%s must be loaded to be known: %s", self.name, error)
        return outline_of(self.runtime, record)


def pretrained_model(name: str, arguments: dict[str, Any], *, notes: Notes) -> PretrainedModel:
    """Return the model of that name or directory. It is loaded unless the ids of these very files are known."""
    key = source_key(name, arguments)
    known = notes.recall(lambda catalog: catalog.source(key or b""))
    model = PretrainedModel(name, arguments, known_ids=(known.weights_id, known.tokenizer_id) if known else None)
    if known is None:
        ids = model.ids  # loads the model, and downloads it if need be
        after = source_key(name, arguments)
        if after and key in (None, after):  # else the files changed meanwhile
            notes.save(Source(after, name, *ids))
    return model
