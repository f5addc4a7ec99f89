"""Where a language model comes from: objects that the user holds, or files that are loaded at the first miss."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from huggingface_hub import try_to_load_from_cache

from backprompt_db.catalog.records import Source
from backprompt_db.compute.inference import memos, sketches
from backprompt_db.compute.inference.sketches import Sketches
from backprompt_db.compute.tokens import SegmentTokenizer
from backprompt_db.errors import ModelMismatch
from backprompt_db.prompt.ids import ModelIds, TokenizerId

if TYPE_CHECKING:
    from collections.abc import Callable

    from backprompt_db.catalog.records import ModelRecord
    from backprompt_db.compute.inference.runner import ModelRunner
    from backprompt_db.compute.inference.spec import ModelSpec
    from backprompt_db.database.catalogs import ModelMetadata

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

_SOURCE = b"backprompt-db/source/1\0"
_DEFAULTS = b"backprompt-db/generation defaults/1\0"
_SUFFIXES = frozenset({".json", ".safetensors", ".bin", ".gguf", ".model", ".txt", ".jinja", ".py", ".tiktoken"})
_HUB_BLOB = re.compile(r"[0-9a-f]{64}")
_ELSEWHERE = ("adapter_config.json",)
"""Files that point to weights in another place, whose changes would not be seen here."""

_CONFIG = "config.json"
_PATH_BEGINS = ("/", "./", "../", "~")
"""What the name of no model on the hub begins with."""

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


class ModelSource(Protocol):
    """A model and its tokenizer, loaded or not."""

    @property
    def name(self) -> str:
        """The name that people give the model."""

    @property
    def ids(self) -> ModelIds:
        """The ids of the model and the tokenizer as they are now."""

    @property
    def tokenizer_id(self) -> TokenizerId:
        """The id of the tokenizer as it is now."""

    @property
    def tokenizer(self) -> SegmentTokenizer:
        """The tokenizer; loads it if need be."""

    @property
    def runner(self) -> ModelRunner:
        """The model; loads it if need be."""

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""

    @property
    def defaults_id(self) -> bytes | None:
        """What names the model's generation configuration; None where only loading the model tells it."""

    def spec(self, record: ModelRecord | None) -> ModelSpec:
        """Return what follows from the model's shape alone; `record` is the result of a self-check, if there is one."""


class GivenModel:
    """A model and a tokenizer that the user holds."""

    is_loaded = True

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from backprompt_db.compute.inference.runner import ModelRunner

        self.name = str(getattr(model, "name_or_path", "") or type(model).__name__)
        self.tokenizer = SegmentTokenizer(tokenizer)
        self.runner = ModelRunner(model, name=self.name)

    @property
    def ids(self) -> ModelIds:
        """The ids of the two objects as they are now."""
        return ModelIds(self.runner.weights_id, self.tokenizer_id)

    @property
    def tokenizer_id(self) -> TokenizerId:
        """The id of the tokenizer as it is now."""
        return self.tokenizer.id

    @property
    def defaults_id(self) -> bytes:
        """A digest of the model's generation configuration as it is now."""
        return _defaults_digest(self.runner.model)

    def spec(self, record: ModelRecord | None) -> ModelSpec:
        """Return what follows from the model's shape alone."""
        from backprompt_db.compute.inference.spec import spec_of

        return spec_of(self.runner, record)


class PretrainedModel:
    """A model in files. If the ids of exactly these files are known, nothing is loaded until it is needed.

    Where loading shows that they are others, `correct` is called with what is to be known instead. What is loaded from
    files that this machine remembers is recognised by sketches, unless `checks_again`.
    """

    def __init__(
        self,
        name: str,
        arguments: dict[str, Any],
        *,
        known_ids: ModelIds | None,
        key: bytes | None = None,
        checks_again: bool = False,
        correct: Callable[[Source], None] | None = None,
    ) -> None:
        self.name = name
        self._arguments = arguments
        self._known_ids = known_ids
        self._correct = correct
        self.key = key
        """The digest of its files that `source_key` makes."""
        self._checks_again = checks_again
        self._loaded_defaults: bytes | None = None

    @property
    def ids(self) -> ModelIds:
        """The recorded ids as long as the model is not loaded, after that those of the loaded objects."""
        if self._known_ids is not None and not self.is_loaded:
            return ModelIds(self._known_ids.weights_id, self.tokenizer_id)
        return ModelIds(self.runner.weights_id, self.tokenizer_id)

    @property
    def tokenizer_id(self) -> TokenizerId:
        """The recorded id as long as neither the model nor the tokenizer is loaded, after that the tokenizer's."""
        if self._known_ids is not None and not self.is_loaded and "tokenizer" not in vars(self):
            return self._known_ids.tokenizer_id
        return self.tokenizer.id

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return "runner" in vars(self)

    @cached_property
    def tokenizer(self) -> SegmentTokenizer:
        """The tokenizer, loaded at the first access."""
        from transformers import AutoTokenizer

        arguments = {name: value for name, value in self._arguments.items() if name in _TOKENIZER_ARGUMENTS}
        tokenizer = SegmentTokenizer(AutoTokenizer.from_pretrained(self.name, **arguments))
        if (known := self._sketches()) is not None:
            tokenizer.recognise(known.tokenizer_id, sketch=known.tokenizer)
        return tokenizer

    @cached_property
    def runner(self) -> ModelRunner:
        """The model, loaded at the first access."""
        from backprompt_db.compute.inference.runner import ModelRunner

        runner = ModelRunner.load(self.name, self._arguments)
        self._loaded_defaults = _defaults_digest(runner.model)
        known = self._sketches()
        is_known = known is not None and runner.recognise(known.weights_id, sketch=known.weights)
        if self._known_ids is not None:  # checked now: later the user may have changed the model
            self._check_source(ModelIds(runner.weights_id, self.tokenizer.id))
        if not is_known:
            self._remember(runner)
        return runner

    def _sketches(self) -> Sketches | None:
        """Return the sketches of the files; None where they have changed, or nothing is to be taken over."""
        if self._checks_again or self.key is None or not self._is_unchanged():
            return None
        return sketches.recalled(self.key)

    def _remember(self, runner: ModelRunner) -> None:
        """Remember the ids and the sketches of what was loaded, if the files have not changed meanwhile."""
        if self.key is not None and memos.are_kept() and self._is_unchanged():
            tokenizer = self.tokenizer
            sketches.remember(Sketches(self.key, runner.weights_id, runner.sketch(), tokenizer.id, tokenizer.sketch()))

    def _is_unchanged(self) -> bool:
        """Whether the files are those that had the key when this was made."""
        return source_key(self.name, self._arguments) == self.key

    def _check_source(self, ids: ModelIds) -> None:
        """Correct the ids that are known of the files, unless they are right, or the files have changed since."""
        if ids == self._known_ids or self._correct is None or self.key is None:
            return
        if self._is_unchanged():
            logger.warning("the catalog had wrong ids for the files of %s; they are corrected", self.name)
            self._correct(Source(self.key, self.name, *ids))

    @property
    def defaults_id(self) -> bytes | None:
        """The digest of the files, one of which has the configuration; that of the configuration once it was changed.

        None where the files have no digest and the model is not loaded.
        """
        if not self.is_loaded:
            return self.key
        now = _defaults_digest(self.runner.model)
        return self.key if self.key is not None and now == self._loaded_defaults else now

    def spec(self, record: ModelRecord | None) -> ModelSpec:
        """Return what follows from the model's shape alone; loads the model only if its configuration is not enough."""
        from backprompt_db.compute.inference.spec import spec_of, spec_of_files

        if not self.is_loaded:
            try:
                return spec_of_files(self.name, self._arguments, record)
            except Exception as error:  # noqa: BLE001 - any that transformers raises for a configuration alone
                logger.info("%s must be loaded to learn its shape: %s", self.name, error)
        return spec_of(self.runner, record)


def pretrained_model(
    name: str, arguments: dict[str, Any], *, model_metadata: ModelMetadata, checks_again: bool = False
) -> PretrainedModel:
    """Return the model of that name or directory. It is loaded, unless the ids of exactly these files are known.

    Raises `ModelMismatch` for a path at which no model is; transformers would ask the hub for it.
    """
    if _is_path(name) and "config" not in arguments and not _has_config(Path(name), arguments):
        raise ModelMismatch(
            f"{name} is not a directory with the files of a model",
            hint="Give the directory in which its config.json is, without ~, or its name on the hub.",
        )
    key = source_key(name, arguments)
    known = model_metadata.recall(lambda catalog: catalog.source(key or b""))
    known_ids = ModelIds(known.weights_id, known.tokenizer_id) if known else None
    model = PretrainedModel(
        name, arguments, known_ids=known_ids, key=key, checks_again=checks_again, correct=model_metadata.save
    )
    if known is None:
        ids = model.ids  # loads the model, and downloads it if need be
        after = source_key(name, arguments)
        if after and key in (None, after):  # else the files have changed meanwhile
            model_metadata.save(Source(after, name, *ids))
            model.key = after
    return model


def _is_path(name: str) -> bool:
    return name.startswith(_PATH_BEGINS) or Path(name).exists()


def _has_config(directory: Path, arguments: dict[str, Any]) -> bool:
    """Whether the file is there that transformers reads first."""
    folder = directory / (arguments.get("subfolder") or "")
    return any((folder / name).is_file() for name in (arguments.get("gguf_file") or _CONFIG, *_ELSEWHERE))


def source_key(name_or_path: str, arguments: dict[str, Any]) -> bytes | None:
    """Return a digest that stays the same as long as loading `name_or_path` gives the same model and tokenizer.

    It covers every file of the model (a hub cache's blobs by their SHA-256 names, others by device, inode, size, change
    and modification time), the loading arguments and the versions of the libraries that load. None where that is not
    enough, or where no file is on this machine yet: then only loading the model tells its ids.
    """
    directory = locate(name_or_path, arguments)
    if directory is None or arguments.get("trust_remote_code") or arguments.get("subfolder"):
        return None
    try:
        described = json.dumps({name: _described(value) for name, value in arguments.items()}, sort_keys=True)
        files = [_file_identity(path) for path in sorted(directory.iterdir()) if path.suffix in _SUFFIXES]
    except (TypeError, OSError):
        return None
    if not files or any((directory / name).exists() for name in _ELSEWHERE):
        return None
    facts = [described, *files, *(f"{library} {version(library)}" for library in _LIBRARIES)]
    return hashlib.sha256(_SOURCE + json.dumps(facts).encode()).digest()


def locate(name_or_path: str, arguments: dict[str, Any]) -> Path | None:
    """Return the directory that holds a model's files: a local one, or a snapshot in the hub's cache."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        config = try_to_load_from_cache(
            name_or_path, _CONFIG, cache_dir=arguments.get("cache_dir"), revision=arguments.get("revision")
        )
    except ValueError:  # not a repository name
        return None
    return Path(config).parent if isinstance(config, str) else None


def _defaults_digest(model: Any) -> bytes:
    """Return a digest of a model's generation configuration, and of the version of the library that reads it."""
    configuration = getattr(model, "generation_config", None)
    values = {} if configuration is None else configuration.to_dict()
    facts = [version("transformers"), {name: value for name, value in values.items() if name != "transformers_version"}]
    return hashlib.sha256(_DEFAULTS + json.dumps(facts, sort_keys=True, default=str).encode()).digest()


def _file_identity(path: Path) -> str:
    blob = path.resolve()
    if _HUB_BLOB.fullmatch(blob.name) and blob.parent.name == "blobs":
        return f"{path.name} {blob.name}"
    status = path.stat()
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{path.name} {status.st_dev} {status.st_ino} {status.st_size} {times}"


def _described(value: Any) -> Any:
    """Return a loading argument as JSON, a dtype as its name. Raises `TypeError` for any other object."""
    if str(type(value)) == "<class 'torch.dtype'>":
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value)} has no fixed description")
