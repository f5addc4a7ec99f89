"""Reading the keys and values of a text out of a transformers `Cache` that the user filled, or refusing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from backprompt_db.compute.inference.kv_cache import KVShape, short_name
from backprompt_db.errors import ModelMismatch, PromptError
from backprompt_db.prompt.numbers import plain_int


@dataclass(frozen=True, slots=True, eq=False)
class KVTensors:
    """Keys and values of some tokens in some layers of a model."""

    keys: torch.Tensor
    """[num_layers, num_kv_heads, T, key_dim]"""
    values: torch.Tensor
    """[num_layers, num_kv_heads, T, value_dim]"""

    def to(self, device: torch.device) -> KVTensors:
        """Return them on a device."""
        return KVTensors(self.keys.to(device), self.values.to(device))


def cached_tokens(cache: Any, shape: KVShape, *, num_tokens: int, row: int | None) -> KVTensors:
    """Return a copy of what `cache` holds of a text of `num_tokens` tokens.

    `row` is the text's row in a cache of several; its last `num_tokens` places are the text's, what lies before them is
    padding. Raises `PromptError` for anything but a cache of that many tokens, and `ModelMismatch` where a model of
    `shape` cannot have made it.
    """
    layers = _layers(cache, shape)
    index = _row(min(layer.keys.shape[0] for layer in layers), row)
    end = _num_places(layers)
    is_padded = row is not None and end > num_tokens
    if end != num_tokens and not is_padded:
        raise PromptError(
            f"the cache holds {end:,} tokens, the text has {num_tokens:,}", hint=_hint_for_length(end - num_tokens)
        )
    places = slice(end - num_tokens, end)
    rows = [[kv[index, :, places].detach().cpu() for kv in (layer.keys, layer.values)] for layer in layers]
    keys, values = (torch.stack(each) for each in zip(*rows, strict=True))
    if not (keys.isfinite().all() and values.isfinite().all()):
        raise ModelMismatch("some numbers of the cache are not finite", hint="Compute it again; nothing was stored.")
    return KVTensors(keys, values)


def _layers(cache: Any, shape: KVShape) -> Sequence[Any]:
    """Return the layers of a cache. Raises an error unless each has keys and values of the model's shape."""
    layers = list(getattr(cache, "layers", ()))
    if not layers or not all(_is_filled(layer) for layer in layers):
        raise PromptError(
            f"this {type(cache).__name__} is not a cache that a model has filled with keys and values",
            hint="Give the past_key_values of the model's output.",
        )
    if len(layers) != shape.num_layers:
        raise _mismatch(f"it has {len(layers)} layers, this model {shape.num_layers}")
    expected = f"{shape.num_kv_heads} heads of {shape.key_dim} and {shape.value_dim} in {short_name(shape.dtype)}"
    for number, layer in enumerate(layers):
        found = _form(layer)
        if found != (shape.num_kv_heads, shape.key_dim, shape.value_dim, shape.dtype):
            heads, key_dim, value_dim, dtype = found
            raise _mismatch(
                f"its layer {number} has {heads} heads of {key_dim} and {value_dim} in {short_name(dtype)}, "
                f"this model {expected}"
            )
    return layers


def _is_filled(layer: Any) -> bool:
    """Whether a layer has keys and values, [rows, heads, tokens, dim] each, as many keys as values, of one dtype."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not (isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)):
        return False
    is_whole = keys.dim() == values.dim() == 4 and keys.shape[:3] == values.shape[:3]
    return is_whole and keys.dtype == values.dtype


def _form(layer: Any) -> tuple[int, int, int, torch.dtype]:
    return layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], layer.keys.dtype


def _num_places(layers: Sequence[Any]) -> int:
    """Return how many tokens the layers have seen. Raises `PromptError` where one has forgotten some of them."""
    numbers = {int(layer.get_seq_length()) for layer in layers}
    if len(numbers) != 1:
        raise PromptError(
            f"its layers hold different numbers of tokens: {sorted(numbers)}", hint="Give a cache of one prompt."
        )
    (num_seen,) = numbers
    for number, layer in enumerate(layers):
        num_kept = layer.keys.shape[2]  # a cache of a fixed size keeps more than were seen
        if num_kept < num_seen:
            raise PromptError(
                f"layer {number} of the cache keeps {num_kept:,} of {num_seen:,} tokens: it forgets, or is compressed",
                hint="Fill a DynamicCache() made without the model's configuration, which keeps everything.",
            )
    return num_seen


def _row(num_rows: int, row: int | None) -> int:
    row = plain_int(row)
    if row is None and num_rows == 1:
        return 0
    if row is None:
        raise PromptError(f"the cache is of {num_rows} prompts", hint="Say which one with row=.")
    if not isinstance(row, int) or not 0 <= row < num_rows:
        raise PromptError(f"the cache has no row {row!r}", hint=f"It has {num_rows}, the first one is 0.")
    return row


def _hint_for_length(num_more: int) -> str:
    if num_more > 0:
        return f"Cut the end off with past_key_values.crop({-num_more}), or append it to the text."
    return "A cache that `generate` filled lacks its last token; the text's pieces are tokenised one by one."


def _mismatch(what: str) -> ModelMismatch:
    return ModelMismatch(f"this cache is another model's: {what}", hint="Nothing was stored.")
