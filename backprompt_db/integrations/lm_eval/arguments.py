"""What `--model_args` may say, and what is refused because it would do something else than for `--model hf`."""

from __future__ import annotations

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
    "device": (None, "cpu"),
    "revision": (None, "main"),
    "trust_remote_code": (None, False),
    "subfolder": (None, ""),
    "dtype": (None, "auto"),
}
"""What says nothing, as it is what holds without it."""


def check(arguments: dict[str, Any]) -> None:
    """Raise `PromptError` for arguments that this model has not, or with a value that it cannot follow."""
    for name, value in arguments.items():
        if name not in _ACCEPTED and value is not None:
            raise PromptError(
                f"--model backprompt takes no {name}=",
                hint=f"It takes {', '.join(sorted(_ACCEPTED))}; or use --model hf.",
            )
    for name in ("backend", "device"):
        if arguments.get(name) not in _NEUTRAL[name]:
            raise PromptError(
                f"--model backprompt takes no {name}={arguments[name]}",
                hint="It runs causal language models where transformers puts them, which is the processor.",
            )


def loading(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what goes to transformers' `from_pretrained`: the same for all ways to say nothing.

    What was computed through `LanguageModel.from_pretrained` with the same arguments is found.
    """
    names = ("dtype", *_LOADING)
    given = {name: arguments[name] for name in names if arguments.get(name) is not None}
    return {name: value for name, value in given.items() if value not in _NEUTRAL.get(name, ())}


def of_files(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those of the loading arguments that say which files are meant, not what is made of them."""
    return {name: value for name, value in arguments.items() if name not in ("dtype", "attn_implementation")}
