"""How far given keys, values and logits are from computed ones, and where most.

The units are those of `maintenance.comparison`: numbers of another text, or made up, are off by about 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from backprompt_db.compute.caches import CachedTokens
from backprompt_db.compute.crosscheck import Computed

_TINY = 1e-30

_MIN_LOGPROB = -9.2
"""Logits of tokens that both sides find less likely than 1 in 10,000 are not compared."""


@dataclass(frozen=True, slots=True, order=True)
class Deviation:
    """The largest error of some tokens, and where it is."""

    size: float = 0.0
    token: int = 0
    what: str = "layer 0"


def of_keys_and_values(computed: Computed, given: CachedTokens) -> Deviation:
    """Return the largest error of one head's keys or values, in root mean squares of the layer's."""
    places = torch.from_numpy(computed.places)
    pairs = (computed.kv.keys, given.keys), (computed.kv.values, given.values)
    errors = torch.stack([_errors(ours, theirs[computed.layers][:, :, places]) for ours, theirs in pairs]).amax(0)
    layer, place = divmod(int(errors.argmax()), len(places))
    first = computed.layers.start or 0
    return Deviation(float(errors[layer, place]), int(places[place]), f"layer {first + layer}")


def _errors(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return the error of each token in each layer: [num_layers, T]."""
    ours, theirs = ours.float(), theirs.float()
    unit = ours.square().mean((1, 2, 3)).sqrt().clamp_min(_TINY)
    rows = (ours - theirs).square().mean(3).sqrt().amax(1)
    return _finite(rows / unit[:, None])


def of_logits(computed: Computed, given: torch.Tensor | None) -> Deviation:
    """Return the largest error of a log-probability after one of the tokens, in standard deviations of them all.

    `given` are the logits after every token of the text, [T, vocab_size], or None.
    """
    if given is None or computed.logits is None:
        return Deviation()
    rows = given[torch.from_numpy(computed.places)].cpu()
    ours, theirs = computed.logits.float().log_softmax(-1), rows.float().log_softmax(-1)
    is_unlikely = torch.maximum(ours, theirs) < _MIN_LOGPROB
    differences = (ours - theirs).abs().masked_fill(is_unlikely, 0.0).amax(1)
    errors = _finite(differences / ours.std(1).clamp_min(_TINY))
    worst = int(errors.argmax())
    return Deviation(float(errors[worst]), int(computed.places[worst]), "the logits after it")


def _finite(errors: torch.Tensor) -> torch.Tensor:
    return errors.nan_to_num(torch.inf, torch.inf)
