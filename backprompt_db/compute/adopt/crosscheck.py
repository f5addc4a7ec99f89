"""Whether keys and values are what this model makes of some tokens, checked for less than computing them costs.

Two facts make that possible. The first layer's keys and values follow from a token and its position alone, so a pass
that ends where they are made, before any attention, checks every token of a text. And if keys and values in deeper
layers are wrong, then some token's do not follow from those before it: so a sample of tokens, each computed over the
*given* keys and values of what it sees, is compared in all layers.

A cache of another text, at other positions, of another model, in another precision, or with another mask is wrong
nearly everywhere, and does not pass. One error can pass: a token that is wrong in deeper layers alone, is not in the
sample, and changes no token of the sample by more than rounding does.
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

from backprompt_db.compute.adopt.given_cache import KVTensors
from backprompt_db.compute.inference.forward import evaluation, extend
from backprompt_db.compute.inference.head import LogitsQuery
from backprompt_db.compute.inference.kv_cache import KVBuffer, cache_argument, short_name
from backprompt_db.compute.inference.masks import mask_of_tokens
from backprompt_db.compute.plan import MAX_PACK_PAIRS
from backprompt_db.errors import ModelMismatch
from backprompt_db.prompt.segments import Segment

if TYPE_CHECKING:
    from backprompt_db.compute.inference.runner import ModelRunner


STRIDE = 16
"""One token in so many is compared in all layers, and the last one of each segment."""

_MAX_TOKENS_PER_PASS = 256
_MIN_TOKENS_PER_PASS = 16
_TOKENS_OF_FIRST_LAYER = 2048

_TINY = 1e-30

_LIMIT = {"F64": 1e-3, "F32": 1e-3, "F16": 0.05, "BF16": 0.25}
"""The largest error of numbers that are the same, by the dtype of keys and values. Measured on a trained model
(SmolLM2-135M, 960 tokens of prose): 0.000003 in F32, 0.005 in F16 and 0.044 in BF16."""

_SHARE_OF_MEAN = 0.25
"""The share of that limit which the mean error of a token over all layers may reach. Rounding is large in few layers:
means were below 0.02 in BF16. Tokens 20 or 60 after one that a mask hid are off by 0.1 in the mean."""

_LIMIT_OF_FIRST_LAYER = {"F64": 1e-4, "F32": 1e-4, "F16": 0.003, "BF16": 0.02}
"""In the first layer no errors have added up: they were 0 in each dtype, and 0.012 in BF16 for numbers rounded from
another precision. A text that begins one position later is off by 0.6, or by 0.2 in models with slower rotations;
weights of 8 bits are off by 0.023."""

_MIN_LOGPROB = -9.2
"""Log-probabilities of tokens that are less likely than 1 in 10,000 on both sides are not compared."""

Places = npt.NDArray[np.int64]
"""Indices of tokens, counted from the beginning of the text."""


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
        """The segments that no other segment follows."""
        followed = {parent for segment in self.segments for parent in segment.parents}
        return [segment for segment in self.segments if segment not in followed]

    @property
    def sample(self) -> Places:
        """The tokens that are compared in all layers, ascending: evenly spread, and the last one of each segment."""
        return np.union1d(np.arange(0, len(self), STRIDE), list(self.ends.values()))


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What the model itself makes of some tokens."""

    places: Places
    layers: slice
    """Which layers were computed."""
    kv: KVTensors
    """[num_layers, num_kv_heads, num_places, head_dim] each."""
    logits: torch.Tensor | None = None
    """[num_places, vocab_size]: the logits after each of the tokens, on the CPU."""


def can_sample(runner: ModelRunner, tokens: Tokens) -> bool:
    """Whether single tokens can be computed over a cache: the model takes masks, and a pass has room for some more."""
    limit = runner.max_columns
    return runner.takes_packs and (limit is None or len(tokens) + _MIN_TOKENS_PER_PASS <= limit)


def recomputed_in_part(runner: ModelRunner, tokens: Tokens, given: KVTensors) -> Iterator[Recomputed]:
    """Yield the first layer of all tokens, then all layers of a sample of them, computed over what is `given`."""
    yield from _first_layers(runner, tokens)
    yield from _sample(runner, tokens, given)


def _first_layers(runner: ModelRunner, tokens: Tokens) -> Iterator[Recomputed]:
    """Yield the first layer's keys and values of all tokens: they follow from a token and its position alone."""
    for begin in range(0, len(tokens), _TOKENS_OF_FIRST_LAYER):
        places = np.arange(begin, min(begin + _TOKENS_OF_FIRST_LAYER, len(tokens)))
        inputs = {"input_ids": tokens.input_ids[places], "position_ids": tokens.position_ids[places]}
        layer, kv = _first_layer(runner, inputs)
        yield Recomputed(places, slice(layer, layer + 1), kv)


class _FarEnough(Exception):
    """Ends a pass where its first keys and values are made."""


class _LayerThatEndsThePass(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A layer of an empty cache that keeps the first keys and values, and then ends the pass."""

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Keep the keys and values, and end the pass."""
        self.keys, self.values = key_states, value_states
        raise _FarEnough


def _first_layer(runner: ModelRunner, inputs: dict[str, npt.NDArray[np.int64]]) -> tuple[int, KVTensors]:
    cache = DynamicCache()
    cache.layers = [_LayerThatEndsThePass() for _ in range(runner.shape.num_layers)]
    tensors = {name: torch.from_numpy(numbers)[None].to(runner.device) for name, numbers in inputs.items()}
    with evaluation(runner.model), suppress(_FarEnough):
        runner.model(**tensors, **cache_argument(runner.model, cache), use_cache=True)
    layer, filled = next((number, each) for number, each in enumerate(cache.layers) if each.keys is not None)
    return layer, KVTensors(filled.keys.cpu(), filled.values.cpu())


def _sample(runner: ModelRunner, tokens: Tokens, given: KVTensors) -> Iterator[Recomputed]:
    """Yield the sample's tokens in all layers, each computed over the `given` keys and values of what it sees."""
    sample = tokens.sample
    room = _tokens_per_pass(runner, len(tokens))
    context = KVBuffer(runner.shape, capacity=len(tokens) + min(room, len(sample)), device=runner.device)
    context.keys[:, 0, :, : len(tokens)] = given.keys
    context.values[:, 0, :, : len(tokens)] = given.values
    context.length = len(tokens)
    for begin in range(0, len(sample), room):
        yield _pass_over(runner, tokens, sample[begin : begin + room], context)


def _tokens_per_pass(runner: ModelRunner, num_tokens: int) -> int:
    limit = runner.max_columns
    num_left = _MAX_TOKENS_PER_PASS if limit is None else min(limit - num_tokens, _MAX_TOKENS_PER_PASS)
    return max(1, min(num_left, MAX_PACK_PAIRS // (num_tokens + num_left)))


def _pass_over(runner: ModelRunner, tokens: Tokens, places: Places, context: KVBuffer) -> Recomputed:
    """Compute some tokens side by side: a mask hides from each its own place in the context, and the others."""
    mask = np.hstack([mask_of_tokens(places, tokens.segments, tokens.num_tokens), np.eye(len(places), dtype=bool)])
    positions = np.concatenate([tokens.position_ids, tokens.position_ids[places]])
    rows = np.arange(len(places))
    with evaluation(runner.model):
        predicted = extend(
            runner.model, tokens.input_ids[places], positions, mask,
            context=context, form=runner.require_supported(), head=runner.head,
        )  # fmt: skip
        _, logits = predicted.read(LogitsQuery(rows[:0], rows[:0], rows))
    runner.num_calls += 1
    begin, end = len(tokens), context.length
    context.length = begin  # the next ones are computed beside these, not after them
    kv = KVTensors(*(whole[:, 0, :, begin:end].clone().cpu() for whole in (context.keys, context.values)))
    return Recomputed(places, slice(None), kv, logits.cpu())


@dataclass(frozen=True, slots=True, order=True)
class Deviation:
    """The first error among some tokens that is too large, or else the largest one, and its place."""

    size: float
    limit: float
    """Errors by rounding stay below this."""
    token: int
    what: str

    @property
    def is_rounding(self) -> bool:
        """Whether the numbers are the same except for their last bits."""
        return self.size <= self.limit


def deviations(
    computed: Recomputed, given: KVTensors, logits: torch.Tensor | None, *, dtype: str
) -> Iterator[Deviation]:
    """Yield the errors of keys and values, and of logits where both sides have them.

    `logits` are those after every token of the text, [T, vocab_size]; `dtype` is the safetensors name of the dtype of
    keys and values.
    """
    yield _deviation_of_kv(computed, given, dtype)
    if computed.logits is not None and logits is not None:
        yield _deviation_of_logits(computed, computed.logits, logits, dtype)


def _deviation_of_kv(computed: Recomputed, given: KVTensors, dtype: str) -> Deviation:
    """Return the error of the keys or values of one head, in root mean squares of its layer."""
    places = torch.from_numpy(computed.places)
    pairs = (computed.kv.keys, given.keys), (computed.kv.values, given.values)
    errors = torch.stack([_errors(ours, theirs[computed.layers][:, :, places]) for ours, theirs in pairs]).amax(0)
    limit = (_LIMIT if computed.layers == slice(None) else _LIMIT_OF_FIRST_LAYER)[dtype]
    means, mean_limit = errors.mean(0), _SHARE_OF_MEAN * _LIMIT[dtype]
    if len(errors) > 1 and not (errors > limit).any() and (means > mean_limit).any():
        place, _ = _worst(means[:, None], mean_limit)
        return Deviation(float(means[place]), mean_limit, int(places[place]), "the mean of all layers")
    place, layer = _worst(errors.T, limit)
    what = f"layer {(computed.layers.start or 0) + layer}"
    return Deviation(float(errors[layer, place]), limit, int(places[place]), what)


def _errors(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return the error of each token in each layer: [num_layers, T]."""
    ours, theirs = ours.float(), theirs.float()
    unit = ours.square().mean((1, 2, 3)).sqrt().clamp_min(_TINY)
    rows = (ours - theirs).square().mean(3).sqrt().amax(1)
    return _finite(rows / unit[:, None])


def _deviation_of_logits(computed: Recomputed, ours: torch.Tensor, given: torch.Tensor, dtype: str) -> Deviation:
    """Return the error of one log-probability after one token, in standard deviations of all of them there.

    Raises `ModelMismatch` for logits of another vocabulary or dtype.
    """
    if (ours.shape[1], ours.dtype) != (given.shape[1], given.dtype):
        raise ModelMismatch(
            f"the logits are {given.shape[1]:,} numbers in {short_name(given.dtype)} after each token, "
            f"this model's {ours.shape[1]:,} in {short_name(ours.dtype)}",
            hint="Give them as the model returns them; nothing was stored.",
        )
    mine, theirs = (rows.float().log_softmax(-1) for rows in (ours, given[torch.from_numpy(computed.places)].cpu()))
    is_unlikely = torch.maximum(mine, theirs) < _MIN_LOGPROB
    errors = (mine - theirs).abs().masked_fill(is_unlikely, 0.0).amax(1)
    errors = _finite(errors / mine.std(1).clamp_min(_TINY))
    worst, _ = _worst(errors[:, None], _LIMIT[dtype])
    return Deviation(float(errors[worst]), _LIMIT[dtype], int(computed.places[worst]), "the logits after it")


def _worst(errors: torch.Tensor, limit: float) -> tuple[int, int]:
    """Return the first place, row by row, where `errors` [T, num_layers] are beyond `limit`, else that of the largest.

    The first error is reported because it causes errors in all that follows.
    """
    beyond = (errors > limit).flatten()
    return divmod(int(beyond.int().argmax() if beyond.any() else errors.argmax()), errors.shape[1])


def _finite(errors: torch.Tensor) -> torch.Tensor:
    return errors.nan_to_num(torch.inf, torch.inf)
