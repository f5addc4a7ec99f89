"""What a short check cannot see of a model: read from its configuration, its modules and its cache's layer types."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.cache_utils import DynamicCache

_MAX_CHECKED_WINDOW = 1024
"""Tokens of a window that a self-check fills. A longer one is never reached: prompts end where it would begin."""

_WINDOW_NAME = re.compile(
    r"(sliding|attention|attn|local|local_attention)_(window|window_size|window_len|chunk_size)"
    r"|window_size|keep_window_size|local_attention"
)
_POSITIONS_NAMES = ("max_position_embeddings", "max_seq_len", "max_target_positions")
_CHANGING_SCALINGS = ("dynamic", "longrope")
_KINDS_OF_KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer"}


def refusal(model: Any) -> str | None:
    """Return why a model is refused before it is run, None for one that may try."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    peft = getattr(model, "active_peft_config", None)
    if getattr(peft, "is_prompt_learning", False):
        return "its adapter puts tokens of its own before every prompt (prompt learning)"
    try:
        layers = _cache_layers(model)
    except Exception as error:  # noqa: BLE001 - whatever transformers says of a configuration that it does not know
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


def checked_window(model: Any) -> int | None:
    """Return the longest attention window of any layer that a check can fill, None where there is none."""
    return max((window for window in _windows(model) if window <= _MAX_CHECKED_WINDOW), default=None)


def max_positions(model: Any) -> int | None:
    """Return how many positions a prompt may have; None where there is no limit.

    A window that is too long to be checked is a limit: before its end it hides nothing.
    """
    unchecked = [window for window in _windows(model) if window > _MAX_CHECKED_WINDOW]
    longest = _num_trained_positions(model)
    return min(unchecked + ([longest] if longest else []), default=None)


def is_index_dependent(model: Any) -> bool:
    """Whether attention is scaled by the number of tokens in the cache, which in a pack says nothing."""
    return bool(getattr(model.config.get_text_config(), "attn_temperature_tuning", False))


def _num_trained_positions(model: Any) -> int | None:
    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in _POSITIONS_NAMES)
    return next((int(limit) for limit in limits if isinstance(limit, int) and limit > 0), None)


def _windows(model: Any) -> Iterator[int]:
    """Yield every attention window that is shorter than the longest prompt, wherever it is written down."""
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
    """Yield windows in the configuration and in modules: layer types may be silent about them."""
    config = model.config.get_text_config()
    hides = "attention_layers" not in vars(config) or "local" in config.attention_layers
    places: list[Mapping[str, Any]] = [vars(module) for module in model.modules()]
    for place in [*places, config.to_dict() if hides else {}]:
        for name, value in place.items():
            is_window = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if is_window and _WINDOW_NAME.fullmatch(name):
                yield value


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
