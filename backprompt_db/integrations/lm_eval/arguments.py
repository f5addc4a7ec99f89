"""What `--model_args` may say. What would not mean the same as for `--model hf` is refused."""

from __future__ import annotations

import re
from typing import Any

from backprompt_db.errors import PromptError

_LOADING = ("revision", "trust_remote_code", "gguf_file", "subfolder", "cache_dir", "token", "attn_implementation")
"""Passed on to transformers as they are."""

_ACCEPTED = (
    *("pretrained", "db", "namespace", "dtype", "max_length", "max_gen_toks", "prefix_token_id", "chat_template_args"),
    *("batch_size", "max_batch_size", "device", "backend"),
    *_LOADING,
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "backend": (None, "default", "causal"),
    "revision": (None, "main"),
    "trust_remote_code": (None, False),
    "subfolder": (None, ""),
    "dtype": (None, "auto"),
}
"""Values that mean the same as leaving the argument out."""

_DEVICE = re.compile(r"cpu|mps(:0)?|cuda(:\d+)?")


def check(arguments: dict[str, Any]) -> None:
    """Raise `PromptError` for arguments that this model does not take, and for values that it cannot follow."""
    for name, value in arguments.items():
        if name not in _ACCEPTED and value is not None:
            raise PromptError(
                f"--model backprompt takes no {name}=",
                hint=f"It takes {', '.join(sorted(_ACCEPTED))}; or use --model hf.",
            )
    if arguments.get("backend") not in _NEUTRAL["backend"]:
        raise PromptError(f"backend={arguments['backend']} cannot be cached", hint="Causal language models can be.")
    if not _DEVICE.fullmatch(str(arguments.get("device") or "cpu")):
        raise PromptError(f"device={arguments['device']} is no device", hint="Give cpu, mps, cuda or cuda:1, ...")


def loading(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for transformers' `from_pretrained`, without those that change nothing.

    What was computed through `LanguageModel.from_pretrained` with the same arguments is found.
    """
    names = ("dtype", *_LOADING)
    given = {name: arguments[name] for name in names if arguments.get(name) is not None}
    passed_on = {name: value for name, value in given.items() if value not in _NEUTRAL.get(name, ())}
    return passed_on | _placing(str(arguments.get("device") or "cpu"))


def _placing(device: str) -> dict[str, Any]:
    """Return the argument that puts a model on a device, if it is there: the harness says `cuda:0` on any machine."""
    kind = device.partition(":")[0]
    if kind == "cpu":
        return {}
    import torch

    is_there = torch.cuda.is_available() if kind == "cuda" else torch.backends.mps.is_available()
    return {"device_map": device} if is_there else {}


def file_names(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those loading arguments that say which files are meant, without those that say how they are loaded."""
    return {
        name: value for name, value in arguments.items() if name not in ("dtype", "attn_implementation", "device_map")
    }
