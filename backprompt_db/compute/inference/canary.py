"""The canary: what a fixed short pass of a model gave on this machine, to be compared in each process that computes.

It is the last line of defence against what changes a pass and has no id: compiled code exchanged for other compiled
code, a kernel that another library registers, a switch of the environment. Rounding differs between thread counts and
kernels and is let pass. What was shown on the way, the shape of keys and values and the head, is remembered with it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from backprompt_db.compute.inference import memos
from backprompt_db.prompt.ids import WeightsId

TOLERANCES: Mapping[str, float] = {"float64": 1e-6, "float32": 5e-4, "float16": 0.02, "bfloat16": 0.1}
"""The largest error, as root mean square, in standard deviations of the numbers. Rounding stays ten times below in
float32, where attention that is off by a thousandth does not; products in TensorFloat-32 are off by more."""


@dataclass(frozen=True, slots=True)
class Canary:
    """The numbers of one pass, and what they depend on besides the weights."""

    weights_id: WeightsId
    conditions: str
    """The versions, the kind of attention and the processor: under others, there is another canary."""
    kv_size: tuple[int, int, int, int]
    """Of keys and values: layers, heads, and the dimensions of a key and of a value."""
    kv_dtype: str
    """What torch calls their dtype."""
    has_head: bool
    """Whether the head was proven to make the logits alone."""
    numbers: dict[str, tuple[float, ...]]
    """Log-probabilities of tokens, and samples of the last logits, of the keys and of the values."""

    def __post_init__(self) -> None:
        if self.kv_dtype not in TOLERANCES or min(self.kv_size) < 1:
            raise ValueError(f"{self.kv_dtype} {self.kv_size} are no keys and values")

    def is_like(self, other: Canary) -> bool:
        """Whether the numbers are those of another canary, but for rounding."""
        shown, expected = (
            (each.kv_size, each.kv_dtype, {name: len(numbers) for name, numbers in each.numbers.items()})
            for each in (self, other)
        )
        return shown == expected and self._error(other) <= TOLERANCES[self.kv_dtype]

    def _error(self, other: Canary) -> float:
        """Return the error of the kind of numbers that differs most; infinite where some are not finite."""
        errors = [_error(np.array(self.numbers[name]), np.array(other.numbers[name])) for name in self.numbers]
        return max((error if math.isfinite(error) else math.inf for error in errors), default=math.inf)


def place_of(weights_id: WeightsId, conditions: str) -> Path | None:
    """Return the path of the file of a canary; None where nothing is to be remembered."""
    return memos.place_of(_name(weights_id, conditions))


def recalled(weights_id: WeightsId, conditions: str) -> Canary | None:
    """Return the canary of a model under these conditions; None where there is none."""
    found = memos.recalled(_name(weights_id, conditions), Canary)
    return found if found and (found.weights_id, found.conditions) == (weights_id, conditions) else None


def remember(canary: Canary) -> None:
    """Write down a canary, unless it has numbers that are not finite and would be like no other."""
    if canary.is_like(canary):
        memos.remember(_name(canary.weights_id, canary.conditions), canary)


def _name(weights_id: WeightsId, conditions: str) -> str:
    return f"{weights_id.hex()}-canary-{hashlib.sha256(conditions.encode()).hexdigest()[:16]}"


def _error(numbers: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> float:
    with np.errstate(invalid="ignore"):  # logits may be infinite
        return float(np.sqrt(np.mean((numbers - expected) ** 2)) / max(expected.std(), 1e-12))
