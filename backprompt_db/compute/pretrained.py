"""Where a model's files are, and whether they are those seen before. Imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

_SOURCE = b"backprompt-db/source/1\0"
_SUFFIXES = frozenset({".json", ".safetensors", ".bin", ".gguf", ".model", ".txt", ".jinja", ".py", ".tiktoken"})
_HUB_BLOB = re.compile(r"[0-9a-f]{64}")
_ELSEWHERE = ("adapter_config.json",)
"""Files that point to weights in another place, whose changes would not be seen here."""

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


def source_key(name_or_path: str, arguments: dict[str, Any]) -> bytes | None:
    """Return a digest that stays the same as long as loading `name_or_path` gives the same model and tokenizer.

    It covers every file of the model (a hub cache's blobs by their SHA-256 names, others by device, inode, size, change
    and modification time), the loading arguments and the versions of the libraries that load. None where that does not
    suffice, or nothing is on this machine yet: then the model must be loaded to be known.
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
            name_or_path, "config.json", cache_dir=arguments.get("cache_dir"), revision=arguments.get("revision")
        )
    except ValueError:  # not a repository name
        return None
    return Path(config).parent if isinstance(config, str) else None


def _file_identity(path: Path) -> str:
    blob = path.resolve()
    if _HUB_BLOB.fullmatch(blob.name) and blob.parent.name == "blobs":
        return f"{path.name} {blob.name}"
    status = path.stat()
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{path.name} {status.st_dev} {status.st_ino} {status.st_size} {times}"


def _described(value: Any) -> Any:
    """A loading argument as JSON; dtypes by their names. Raises `TypeError` for what has no fixed description."""
    if str(type(value)) == "<class 'torch.dtype'>":
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value)} has no fixed description")
