"""How far a stored part is from what the model gives, in units of how much such numbers vary.

Floats differ in their last bits from one grouping of segments to another, and more so in half precision. What belongs
to another text, or was made up, differs by about 1 in these units, whatever the model.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from backprompt_db.fidelity import Fidelity, restore
from backprompt_db.representation import Array, Arrays, Part

_TOLERANCE = {"F64": 1e-3, "F32": 1e-3, "F16": 0.1, "BF16": 0.5}
_TOLERANCE_OF_LOSSY = {Fidelity.EXACT: 0.0, Fidelity.BFLOAT16: 0.1, Fidelity.INT8: 0.25}
"""Both measured on a trained model (SmolLM2-135M, 1,100 tokens of prose) and multiplied by about three or more."""

_MIN_PROBABILITY = 1e-4
"""Logits of tokens that both sides find less likely are not compared: half precision moves them far, to no effect."""

_TINY = 1e-30
"""What is divided by is never less."""

_Floats = npt.NDArray[np.float64]


def tolerance(dtype: str, fidelity: Fidelity) -> float:
    """Return up to which error a part counts as the same, by the dtype of keys and values and by the fidelity."""
    return max(_TOLERANCE[dtype], _TOLERANCE_OF_LOSSY[fidelity])


def error(part: Part, stored: Arrays, again: Arrays, *, logits: Array) -> float:
    """Return the error of a stored part against the one that was computed `again`; infinite for other shapes or NaN.

    The unit of log-probabilities is the standard deviation of those of the whole vocabulary after this segment, from
    its `logits`. That of keys and values is the root mean square of their layer, against the vector of one head at one
    token.
    """
    if part is Part.KV:
        if "keys_scale" in stored:
            stored = restore(stored, "F32")
        return max(_kv_error(_floats(stored[name]), _floats(again[name])) for name in ("keys", "values"))
    spread = max(float(_logprobs(logits).std()), _TINY)
    nats = _scores_error(stored, again) if part is Part.SCORES else _logits_error(stored["logits"], again["logits"])
    return nats / spread


def _kv_error(stored: _Floats, again: _Floats) -> float:
    if stored.shape != again.shape or not stored.size:
        return 0.0 if stored.shape == again.shape else math.inf
    unit = np.sqrt(np.square(again).mean(axis=(1, 2, 3)))
    rows = np.sqrt(np.square(stored - again).mean(axis=3)).max(axis=(1, 2))
    return _finite((rows / np.maximum(unit, _TINY)).max())


def _scores_error(stored: Arrays, again: Arrays) -> float:
    if not np.array_equal(_floats(stored["input_ids"]), _floats(again["input_ids"])):
        return math.inf
    mine, theirs = _floats(stored["token_logprobs"]), _floats(again["token_logprobs"])
    is_defined = ~np.isnan(theirs)
    if not np.array_equal(~np.isnan(mine), is_defined):
        return math.inf
    return _finite(np.abs(mine - theirs)[is_defined].max(initial=0.0))


def _logits_error(stored: Array, again: Array) -> float:
    if stored.shape != again.shape:
        return math.inf
    mine, theirs = _logprobs(stored), _logprobs(again)
    is_likely = ~(np.maximum(mine, theirs) < math.log(_MIN_PROBABILITY))  # so that NaN is
    return _finite(np.abs(mine - theirs)[is_likely].max(initial=0.0))


def _logprobs(logits: Array) -> _Floats:
    values = _floats(logits)
    shifted = values - values.max()
    normalised: _Floats = shifted - np.log(np.exp(shifted).sum())
    return normalised


def _floats(array: Array) -> _Floats:
    found = array.torch().double().numpy() if array.dtype == "BF16" else array.numpy()  # NumPy has no bfloat16
    return np.asarray(found, dtype=np.float64)


def _finite(error: float) -> float:
    return float(error) if np.isfinite(error) else math.inf
