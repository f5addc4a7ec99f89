"""How far given keys, values and logits are from computed ones, and where first.

The units are those of `maintenance.comparison`: numbers of another text, or made up, are off by about 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from backprompt_db.compute.caches import CachedTokens
from backprompt_db.compute.crosscheck import Computed
from backprompt_db.errors import ModelMismatch

_TINY = 1e-30

_LIMIT = {"F64": 1e-3, "F32": 1e-3, "F16": 0.05, "BF16": 0.25}
"""Up to which error numbers are the same, by the dtype of keys and values. Measured on a trained model (SmolLM2-135M,
960 tokens of prose): 0.000003, 0.005 and 0.044."""

_SHARE_OF_MEAN = 0.25
"""Up to which part of that the mean error of a token over all layers may reach. Rounding is large in few of them: means
were below 0.02 in BF16. What follows one token that a mask hid, 20 or 60 before, is off by 0.1 in the mean."""

_LIMIT_OF_FIRST_LAYER = {"F64": 1e-4, "F32": 1e-4, "F16": 0.003, "BF16": 0.02}
"""There nothing has added up: errors were 0 in each, and 0.012 in BF16 where another precision was rounded to it. A
text that begins one position later is off by 0.6, by 0.2 in models whose rotations are slower; weights of 8 bits by
0.023."""

_MIN_LOGPROB = -9.2
"""Logits of tokens that both sides find less likely than 1 in 10,000 are not compared."""


@dataclass(frozen=True, slots=True, order=True)
class Deviation:
    """The first error of some tokens that is too large, else the largest, and where it is."""

    size: float
    limit: float
    """What rounding stays below."""
    token: int
    what: str

    @property
    def is_rounding(self) -> bool:
        """Whether the numbers are the same but for their last bits."""
        return self.size <= self.limit


def deviations(
    computed: Computed, given: CachedTokens, logits: torch.Tensor | None, *, dtype: str
) -> Iterator[Deviation]:
    """Yield how far off keys and values are, and logits where there are both.

    `logits` are those after every token of the text, [T, vocab_size]; `dtype` is the safetensors name of that of keys
    and values.
    """
    yield _of_keys_and_values(computed, given, dtype)
    if computed.logits is not None and logits is not None:
        yield _of_logits(computed, computed.logits, logits, dtype)


def _of_keys_and_values(computed: Computed, given: CachedTokens, dtype: str) -> Deviation:
    """Return the error of one head's keys or values, in root mean squares of the layer's."""
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


def _of_logits(computed: Computed, ours: torch.Tensor, given: torch.Tensor, dtype: str) -> Deviation:
    """Return the error of a log-probability after one of the tokens, in standard deviations of them all.

    Raises `ModelMismatch` for logits of another vocabulary or dtype.
    """
    if (ours.shape[1], ours.dtype) != (given.shape[1], given.dtype):
        raise ModelMismatch(
            f"the logits are {given.shape[1]:,} numbers in {_name(given.dtype)} after each token, "
            f"this model's {ours.shape[1]:,} in {_name(ours.dtype)}",
            hint="Give them as the model returns them; nothing was stored.",
        )
    mine, theirs = (rows.float().log_softmax(-1) for rows in (ours, given[torch.from_numpy(computed.places)].cpu()))
    is_unlikely = torch.maximum(mine, theirs) < _MIN_LOGPROB
    errors = (mine - theirs).abs().masked_fill(is_unlikely, 0.0).amax(1)
    errors = _finite(errors / mine.std(1).clamp_min(_TINY))
    worst, _ = _worst(errors[:, None], _LIMIT[dtype])
    return Deviation(float(errors[worst]), _LIMIT[dtype], int(computed.places[worst]), "the logits after it")


def _worst(errors: torch.Tensor, limit: float) -> tuple[int, int]:
    """Return the first place, row by row, of `errors` [T, num_layers] that is beyond `limit`; else that of the largest.

    What is wrong first makes wrong what follows it.
    """
    beyond = (errors > limit).flatten()
    return divmod(int(beyond.int().argmax() if beyond.any() else errors.argmax()), errors.shape[1])


def _finite(errors: torch.Tensor) -> torch.Tensor:
    return errors.nan_to_num(torch.inf, torch.inf)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
