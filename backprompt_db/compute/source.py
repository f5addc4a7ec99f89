"""Where a language model comes from: objects that the user has, or files that are loaded at the first miss."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from backprompt_db.compute.tokens import SegmentTokenizer
from backprompt_db.keys import TokenizerId, WeightsId

if TYPE_CHECKING:
    from backprompt_db.compute.runtime import Runtime

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
