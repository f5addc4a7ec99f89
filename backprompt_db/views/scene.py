"""What is drawn: the segments of a prompt, each with its parents and its state, or with its tokens and their scores."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class State(enum.Enum):
    """Where a segment's representation comes from. The value is its name in pictures and JSON."""

    STORED = "stored"
    COMPUTED = "computed now"
    """By the run whose result is drawn."""
    MISSING = "missing"
    UNKNOWN = "unknown"
    """Not looked up: the text belongs to no model, or the database did not answer."""


class Unit(enum.Enum):
    """What widths in a picture measure. The value is its name in pictures and JSON."""

    TOKENS = "tokens"
    CHARACTERS = "characters"
    """Where only a tokenizer that is not at hand would know the tokens."""
    BYTES = "bytes"
    SECONDS = "seconds"


@dataclass(frozen=True, slots=True, kw_only=True)
class PicturedSegment:
    """One segment as a picture shows it."""

    text: str
    parents: tuple[int, ...]
    """The segments that it directly follows, by their numbers in the picture, from 0."""
    state: State
    size: float
    """How wide it is, in the picture's unit."""
    num_tokens: int | None = None
    nbytes: int | None = None
    """The bytes of all its parts that are there."""
    seconds: float | None = None
    """What computing it took, or would take."""
    reason: str | None = None
    """Why it is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What one picture of a prompt shows. `Picture` adds what a user can do with it."""

    segments: tuple[PicturedSegment, ...]
    """Parents before children, in the order written."""
    unit: Unit
    remarks: tuple[str, ...] = ()
    """What the picture says about the whole prompt, a line each."""


class Vocabulary(Protocol):
    """The tokens of one tokenizer, as strings."""

    def pieces(self, text: str, ids: Sequence[int]) -> list[str]:
        """Return one string for each token. Joined they are the text, where these are its tokens."""

    def token(self, token_id: int) -> str:
        """Return what a token adds to a text, or its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSegment:
    """One segment of a result, with its tokens."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    """Natural log-probabilities; NaN where nothing predicts a token."""
    is_computed: bool
