"""Whether keys and values are this model's for these tokens, found out for less than computing them.

Two facts make that possible. The first layer's keys and values follow from a token and its position alone, so a pass
that ends where they are made, before any attention, checks every token of a text. And if some token's keys and values
in deeper layers are wrong, then there is one that does not follow from those before it: so some tokens, each computed
over the *given* keys and values of what it sees, are compared in all layers.

A cache of another text, at other positions, of another model, in another precision, or with another mask is wrong
nearly everywhere, and does not pass. What can: a token that is wrong in deeper layers alone, is not among those that
are compared, and moves none of them by more than rounding does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from backprompt_db.compute.caches import CachedTokens
from backprompt_db.compute.forward import evaluation, forward
from backprompt_db.compute.head import Question
from backprompt_db.compute.kvcache import KVBuffer
from backprompt_db.compute.masks import mask_of_tokens
from backprompt_db.compute.plan import MAX_PACK_PAIRS
from backprompt_db.errors import UnsupportedModel
from backprompt_db.text import Segment

if TYPE_CHECKING:
    from backprompt_db.compute.runtime import Runtime

STRIDE = 16
"""One token of so many is compared in all layers, and the last one of each segment."""

_MAX_TOKENS_PER_PASS = 256
_MIN_TOKENS_PER_PASS = 16
_TOKENS_OF_FIRST_LAYER = 2048

Places = npt.NDArray[np.int64]
"""Numbers of tokens, counted from the beginning of the text."""


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The tokens of some segments, one after the other, parents before children."""

    segments: list[Segment]
    num_tokens: dict[Segment, int]
    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def ends(self) -> dict[Segment, int]:
        """The last token of each segment."""
        lasts = np.cumsum([self.num_tokens[segment] for segment in self.segments]) - 1
        return dict(zip(self.segments, lasts.tolist(), strict=True))

    @property
    def tips(self) -> list[Segment]:
        """The segments that nothing follows."""
        followed = {parent for segment in self.segments for parent in segment.parents}
        return [segment for segment in self.segments if segment not in followed]

    @property
    def sample(self) -> Places:
        """The tokens that are compared in all layers, ascending: evenly spread, and the last one of each segment."""
        return np.union1d(np.arange(0, len(self), STRIDE), list(self.ends.values()))


@dataclass(frozen=True, slots=True)
class Computed:
    """What the model itself makes of some tokens."""

    places: Places
    layers: slice
    """Which layers were computed."""
    kv: CachedTokens
    """[num_layers, num_kv_heads, num_places, head_dim] each."""
    logits: torch.Tensor | None = None
    """[num_places, vocab_size]: what it predicts after each of the tokens, on the CPU."""


def can_sample(runtime: Runtime, tokens: Tokens) -> bool:
    """Whether single tokens can be computed over a cache: the model takes masks, and has room for them beside it."""
    limit = runtime.max_columns
    return runtime.takes_packs and (limit is None or len(tokens) + _MIN_TOKENS_PER_PASS <= limit)


def computed_in_part(runtime: Runtime, tokens: Tokens, given: CachedTokens) -> Iterator[Computed]:
    """Yield the first layer of all tokens, then all layers of a sample of them, over what is `given` before each."""
    yield from _first_layers(runtime, tokens)
    yield from _sample(runtime, tokens, given)


def _first_layers(runtime: Runtime, tokens: Tokens) -> Iterator[Computed]:
    """Yield the first layer's keys and values of all tokens: what follows from a token and its position."""
    for begin in range(0, len(tokens), _TOKENS_OF_FIRST_LAYER):
        places = np.arange(begin, min(begin + _TOKENS_OF_FIRST_LAYER, len(tokens)))
        inputs = {"input_ids": tokens.input_ids[places], "position_ids": tokens.position_ids[places]}
        layer, kv = _first_layer(runtime, inputs)
        yield Computed(places, slice(layer, layer + 1), kv)


class _FarEnough(Exception):
    """Ends a pass where its first keys and values are made."""


class _LayerThatEndsThePass(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A layer of an empty cache that keeps what it is given first, and lets nothing come after it."""

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Keep keys and values, and end the pass."""
        self.keys, self.values = key_states, value_states
        raise _FarEnough


def _first_layer(runtime: Runtime, inputs: dict[str, npt.NDArray[np.int64]]) -> tuple[int, CachedTokens]:
    cache = DynamicCache()
    cache.layers = [_LayerThatEndsThePass() for _ in range(runtime.shape.num_layers)]
    tensors = {name: torch.from_numpy(numbers)[None].to(runtime.device) for name, numbers in inputs.items()}
    with evaluation(runtime.model), suppress(_FarEnough):
        runtime.model(**tensors, past_key_values=cache, use_cache=True)
    layer, filled = next((number, each) for number, each in enumerate(cache.layers) if each.keys is not None)
    return layer, CachedTokens(filled.keys.cpu(), filled.values.cpu())


def _sample(runtime: Runtime, tokens: Tokens, given: CachedTokens) -> Iterator[Computed]:
    """Yield the sample's tokens in all layers, each computed over what is `given` of the tokens that it sees."""
    sample = tokens.sample
    room = _tokens_per_pass(runtime, len(tokens))
    context = KVBuffer(runtime.shape, capacity=len(tokens) + min(room, len(sample)), device=runtime.device)
    context.keys[:, 0, :, : len(tokens)] = given.keys
    context.values[:, 0, :, : len(tokens)] = given.values
    context.length = len(tokens)
    for begin in range(0, len(sample), room):
        yield _pass_over(runtime, tokens, sample[begin : begin + room], context)


def _tokens_per_pass(runtime: Runtime, num_tokens: int) -> int:
    limit = runtime.max_columns
    num_left = _MAX_TOKENS_PER_PASS if limit is None else min(limit - num_tokens, _MAX_TOKENS_PER_PASS)
    return max(1, min(num_left, MAX_PACK_PAIRS // (num_tokens + num_left)))


def _pass_over(runtime: Runtime, tokens: Tokens, places: Places, context: KVBuffer) -> Computed:
    """Compute some tokens beside each other: a mask hides from each its own place in the context, and all others."""
    mask = np.hstack([mask_of_tokens(places, tokens.segments, tokens.num_tokens), np.eye(len(places), dtype=bool)])
    positions = np.concatenate([tokens.position_ids, tokens.position_ids[places]])
    cache, rows = context.cache(), np.arange(len(places))
    with evaluation(runtime.model):
        predicted = forward(
            runtime.model, tokens.input_ids[places], positions, mask,
            cache=cache, form=runtime.require_supported(), head=runtime.head,
        )  # fmt: skip
        if len(predicted) != len(places) or not context.is_extended_by(cache, len(places)):
            raise UnsupportedModel(
                f"{type(runtime.model).__name__} gave no keys and values for some of its tokens",
                hint="Run it with transformers directly; nothing was stored.",
            )
        _, logits = predicted.read(Question(rows[:0], rows[:0], rows))
    runtime.num_calls += 1
    begin, end = len(tokens), len(tokens) + len(places)
    kv = CachedTokens(*(whole[:, 0, :, begin:end].clone().cpu() for whole in (context.keys, context.values)))
    return Computed(places, slice(None), kv, logits.cpu())
