"""Properties of a model that a short check cannot see, read from its configuration, modules and cache layers."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from backprompt_db.compute.inference.masks import SLIDING_LAYERS

_MAX_FILLED_WINDOW = 1024
"""The longest window, in tokens, that a self-check fills where the window can neither be masked nor be made shorter. A
longer one is never used: prompts may not be longer than the window."""

_MASKED_LAYERS = {"full_attention", SLIDING_LAYERS}

_WINDOW_NAME = re.compile(
    r"(sliding|attention|attn|local|local_attention)_(window|window_size|window_len|chunk_size)"
    r"|window_size|keep_window_size|local_attention"
)
_POSITIONS_NAMES = ("max_position_embeddings", "max_seq_len", "max_target_positions")
_CHANGING_SCALINGS = ("dynamic", "longrope")
_KINDS_OF_KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer"}


def refusal(model: Any) -> str | None:
    """Return why a model is refused without running it, None for one that a self-check may try."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    peft = getattr(model, "active_peft_config", None)
    if getattr(peft, "is_prompt_learning", False):
        return "its adapter puts tokens of its own before every prompt (prompt learning)"
    try:
        layers = _cache_layers(model)
    except Exception as error:  # noqa: BLE001 - any that transformers raises for a configuration that it does not know
        return f"transformers knows no cache for its configuration ({type(error).__name__}: {error})"
    kinds = {type(layer).__name__ for layer in layers} - _KINDS_OF_KEYS_AND_VALUES
    if kinds:
        return f"its state is not made of keys and values alone ({', '.join(sorted(kinds))})"
    changing = sorted(set(_CHANGING_SCALINGS) & set(_rope_types(model)))
    if changing:
        return f"its {changing[0]} rotary scaling changes with the total length, so a prefix is not what it was"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return f"its weights are on several devices ({', '.join(sorted(map(str, devices)))})"
    return None


def masked_window(model: Any) -> int | None:
    """Return the window to mask with, which is the one that transformers' own masks use; None without one."""
    window: int | None = getattr(model.config.get_text_config(), "sliding_window", None)
    return window if window in set(_windows(model)) else None


def masked_layer_types(model: Any) -> tuple[str, ...]:
    """Return the types of a model's layers if they differ and it is known what each type sees, else nothing."""
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return tuple(sorted(types)) if len(types) > 1 and types <= _MASKED_LAYERS else ()


def filled_window(model: Any, *, masked: int | None = None) -> int | None:
    """Return the longest attention window, except the masked one, that a check can fill; None where there is none."""
    others = (window for window in _windows(model) if window != masked)
    return max((window for window in others if window <= _MAX_FILLED_WINDOW), default=None)


def max_positions(model: Any, *, masked: int | None = None) -> int | None:
    """Return how many positions a prompt may have; None where there is no limit.

    A window that is neither masked nor short enough to be filled is a limit: shorter prompts are not affected by it.
    """
    unproven = [window for window in _windows(model) if window > _MAX_FILLED_WINDOW and window != masked]
    longest = _num_trained_positions(model)
    return min(unproven + ([longest] if longest else []), default=None)


def embedding_of(model: Any) -> Any:
    """Return the layer that turns token ids into vectors, inside the adapters around it, which know not its sizes."""
    layer = model.get_input_embeddings()
    return next((each for each in layer.modules() if hasattr(each, "num_embeddings")), layer)


def max_columns(model: Any) -> int | None:
    """Return how many tokens a pass may have with its context: the size of a causal mask inside a module, if any."""
    squares = (
        buffer.shape[-1]
        for buffer in model.buffers()
        if buffer.dtype in (torch.bool, torch.uint8) and buffer.dim() > 1 and buffer.shape[-2] == buffer.shape[-1] > 1
    )
    return min(squares, default=None)


def with_window(model: Any, *, masked: int, num_tokens: int) -> Any:
    """Return a second model over the same tensors whose masked window has another length, wherever it is written.

    Any other window is half as long there, so that it shows whether it is used at all. The model itself is not changed:
    other threads may run it, and its weights id must stay the same.
    """
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for place in _places(twin):
        windows = list(_windows_in(place))
        place.update({name: num_tokens if window == masked else num_tokens // 2 for name, window in windows})
    return twin


def is_index_dependent(model: Any) -> bool:
    """Whether attention is scaled by the number of tokens in the cache, which means nothing in a pack."""
    return bool(getattr(model.config.get_text_config(), "attn_temperature_tuning", False))


def _num_trained_positions(model: Any) -> int | None:
    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in _POSITIONS_NAMES)
    return next((int(limit) for limit in limits if isinstance(limit, int) and limit > 0), None)


def _windows(model: Any) -> Iterator[int]:
    """Yield every attention window that is shorter than the longest prompt, wherever it is written."""
    longest = _num_trained_positions(model)
    for window in [*_windows_of_cache(model), *_windows_written(model)]:
        if longest is None or window < longest:
            yield window


def _cache_layers(model: Any) -> list[Any]:
    return list(DynamicCache(config=model.config.get_text_config()).layers)


def _windows_of_cache(model: Any) -> Iterator[int]:
    for layer in _cache_layers(model):
        if getattr(layer, "is_sliding", False):
            yield int(getattr(layer, "sliding_window", None) or 1)


def _windows_written(model: Any) -> Iterator[int]:
    """Yield windows in the configuration and in modules: layer types may not mention them."""
    config = model.config.get_text_config()
    hides = "attention_layers" not in vars(config) or "local" in config.attention_layers
    for place in [*(vars(module) for module in model.modules()), config.to_dict() if hides else {}]:
        for _, window in _windows_in(place):
            yield window


def _windows_in(place: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in place.items():
        is_window = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if is_window and _WINDOW_NAME.fullmatch(name):
            yield name, value


def _places(model: Any) -> Iterator[dict[str, Any]]:
    """Yield the attributes of every module and of every configuration that a module has, each once."""
    modules = [vars(module) for module in model.modules()]
    configs = [place["config"] for place in modules if "config" in place] + [model.config.get_text_config()]
    yield from modules
    yield from {id(config): vars(config) for config in configs if hasattr(config, "__dict__")}.values()


def _rope_types(model: Any) -> Iterator[str]:
    config = model.config.get_text_config()
    for name in ("rope_parameters", "rope_scaling"):
        yield from _rope_types_in(getattr(config, name, None))
    for module in model.modules():
        yield from _rope_types_in({"type": vars(module).get("rope_type")})


def _rope_types_in(parameters: Any) -> Iterator[str]:
    if isinstance(parameters, dict):
        for value in (parameters.get("rope_type"), parameters.get("type")):
            yield from value.values() if isinstance(value, dict) else [str(value)]
        for value in parameters.values():
            yield from _rope_types_in(value)
